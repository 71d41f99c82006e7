//! The transmission phase of one connection, on the home thread of its disk.
//!
//! One task per connection polls a reader and a writer in turn. The reader receives into a staging buffer,
//! takes all requests out of it that are there, and starts each as a task that is polled at once: many are done
//! then and there. Finished requests leave their replies in a queue; the
//! writer sends everything that is in it with one vectored send.
//!
//! Invariant: what a connection holds in memory is bounded by [`Limits`]: a request is admitted only when
//! there is room for its payload or its reply, and the room is given back when the reply was sent. A client
//! that does not read its replies is therefore not read from either.

use crate::connection::{Control, Course};
use crate::errors::{Refusal, WireError};
use crate::execute::{MAX_DESCRIPTORS, Outcome, Pieces, Target};
use crate::reply::{Answered, Piece};
use crate::request::{Command, judge};
use crate::stats::{ExportStats, RequestKind};
use crate::stream::Stream;
use crate::wire::{RequestHeader, command};
use disk::Buf;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// Bytes received at once.
const STAGING: usize = 128 << 10;
/// Payloads of at least this many bytes are received into their own buffer, without a copy.
const LARGE_PAYLOAD: usize = 32 << 10;
/// Replies sent at once: the kernel takes 1,024 pieces, each reply has at most two.
const SEND_BATCH: usize = 256;

const SHUTTING_DOWN: Refusal = Refusal::new(WireError::Shutdown, "server is shutting down");

/// How long a client that has said goodbye may take to receive what it is still owed.
const GOODBYE: Duration = Duration::from_secs(60);
/// What a connection may hold however many there are.
const BYTES_AT_LEAST: u64 = 1 << 20;

/// Bounds of one connection.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// Requests under way.
    pub(crate) requests: usize,
    /// Bytes of payloads and replies under way; one request is always admitted.
    pub(crate) bytes: u64,
    /// Bytes of all the server's connections together, of which each may hold its share.
    pub(crate) total_bytes: u64,
    /// How many connections there are.
    pub(crate) sharers: Arc<AtomicUsize>,
}

impl Limits {
    fn bytes_now(&self) -> u64 {
        let share = self.total_bytes / self.sharers.load(Ordering::Relaxed).max(1) as u64;
        self.bytes.min(share.max(BYTES_AT_LEAST))
    }
}

/// How a connection ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The client said goodbye, or the server's course asked for it.
    Orderly,
    /// The client closed the connection.
    Closed,
    /// The client broke the protocol.
    Violation(&'static str),
    /// The socket failed.
    Failed(io::Error),
}

/// Room taken by a request.
#[derive(Clone, Copy, Default)]
struct Charge {
    requests: usize,
    bytes: u64,
}

struct Queued {
    piece: Piece,
    /// Given back when the piece was sent.
    charge: Charge,
}

/// A place for the one task that waits for something to become true.
#[derive(Default)]
struct Waiter(Cell<Option<Waker>>);

impl Waiter {
    fn wake(&self) {
        if let Some(waker) = self.0.take() {
            waker.wake();
        }
    }

    async fn until(&self, mut condition: impl FnMut() -> bool) {
        poll_fn(|cx| {
            if condition() {
                return Poll::Ready(());
            }
            self.0.set(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }
}

struct Session {
    stream: Stream,
    target: Target,
    stats: Arc<ExportStats>,
    control: Arc<Control>,
    limits: Limits,
    queue: RefCell<Vec<Queued>>,
    /// Room taken by requests whose replies were not sent yet.
    taken: Cell<Charge>,
    /// No more requests come.
    reader_ended: Cell<bool>,
    /// Replies cannot be sent any more.
    broken: Cell<bool>,
    /// The reader lets the writer go first.
    gave_way: Cell<bool>,
    /// The reader polls a request in place: the writer's turn comes without being woken.
    in_place: Cell<bool>,
    reader: Waiter,
    writer: Waiter,
}

/// Serves a connection until it ends. `early` are bytes that arrived during the handshake.
pub(crate) async fn serve(
    stream: Stream,
    early: Vec<u8>,
    target: Target,
    stats: Arc<ExportStats>,
    control: Arc<Control>,
    limits: Limits,
) -> End {
    let session = Rc::new(Session {
        stream,
        target,
        stats,
        control,
        limits,
        queue: RefCell::default(),
        taken: Cell::default(),
        reader_ended: Cell::new(false),
        broken: Cell::new(false),
        gave_way: Cell::new(false),
        in_place: Cell::new(false),
        reader: Waiter::default(),
        writer: Waiter::default(),
    });
    let _connected = Connected::new(&session.stats);
    session.run(early).await
}

/// Counts a connection, until dropped.
struct Connected(Arc<ExportStats>);

impl Connected {
    fn new(stats: &Arc<ExportStats>) -> Self {
        stats.connected();
        Self(Arc::clone(stats))
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.disconnected();
    }
}

impl Session {
    async fn run(self: &Rc<Self>, early: Vec<u8>) -> End {
        let end = {
            let mut writer = pin!(self.write_replies());
            let end = {
                let mut reader = pin!(self.read_requests(early));
                poll_fn(|cx| {
                    loop {
                        if self.control.poll_course(cx.waker()) != Course::Run {
                            return Poll::Ready(End::Orderly);
                        }
                        if let Poll::Ready(end) = reader.as_mut().poll(cx) {
                            return Poll::Ready(end);
                        }
                        if let Poll::Ready(error) = writer.as_mut().poll(cx) {
                            return Poll::Ready(error.map_or(End::Closed, End::Failed));
                        }
                        if !self.gave_way.take() {
                            return Poll::Pending;
                        }
                    }
                })
                .await
            };
            // The reader is gone, and with it a request that was not complete.
            self.reader_ended.set(true);
            if !matches!(end, End::Failed(_)) {
                // Finish what is under way, unless the client does not take it or time has run out.
                let finish = poll_fn(|cx| {
                    if self.control.poll_course(cx.waker()) == Course::Abort {
                        return Poll::Ready(());
                    }
                    writer.as_mut().poll(cx).map(drop)
                });
                dataplane::timeout(GOODBYE, finish).await;
            }
            end
        };
        self.broken.set(true);
        let orderly = self.queue.borrow().is_empty() && !matches!(end, End::Failed(_));
        if orderly && self.control.course() != Course::Abort {
            // Bounded by the course: a client that does not read must not hold up the end.
            let mut close = pin!(self.stream.close());
            poll_fn(|cx| match self.control.poll_course(cx.waker()) {
                Course::Abort => Poll::Ready(()),
                _ => close.as_mut().poll(cx),
            })
            .await;
        }
        self.stream.abort();
        // Requests are drained, never cancelled.
        self.discard_queue();
        self.reader.until(|| self.taken.get().requests == 0).await;
        end
    }

    fn has_room(&self, bytes: u64) -> bool {
        let taken = self.taken.get();
        taken.requests == 0
            || (taken.requests < self.limits.requests && taken.bytes.saturating_add(bytes) <= self.limits.bytes_now())
    }

    async fn admit(&self, bytes: u64) -> Charge {
        if !self.has_room(bytes) {
            self.reader.until(|| self.has_room(bytes)).await;
        }
        let taken = self.taken.get();
        self.taken.set(Charge { requests: taken.requests + 1, bytes: taken.bytes + bytes });
        Charge { requests: 1, bytes }
    }

    fn release(&self, charge: Charge) {
        let taken = self.taken.get();
        self.taken.set(Charge { requests: taken.requests - charge.requests, bytes: taken.bytes - charge.bytes });
        self.reader.wake();
    }

    /// Queues a request's reply; the charge goes with its last piece.
    fn reply(&self, pieces: Pieces, charge: Charge) {
        if self.broken.get() {
            self.release(charge);
            return;
        }
        let mut queue = self.queue.borrow_mut();
        match pieces {
            Pieces::One(piece) => queue.push(Queued { piece, charge }),
            Pieces::Many(pieces) => {
                queue.extend(pieces.into_iter().map(|piece| Queued { piece, charge: Charge::default() }));
                if let Some(last) = queue.last_mut() {
                    last.charge = charge;
                }
            }
        }
        drop(queue);
        if !self.in_place.get() {
            self.writer.wake();
        }
    }

    fn discard_queue(&self) {
        for queued in std::mem::take(&mut *self.queue.borrow_mut()) {
            self.release(queued.charge);
        }
    }

    /// Lets the writer send what is queued before more is received.
    async fn give_way(&self) {
        if self.queue.borrow().is_empty() {
            return;
        }
        let mut gave = false;
        poll_fn(|_| {
            if gave {
                return Poll::Ready(());
            }
            gave = true;
            self.gave_way.set(true);
            Poll::Pending
        })
        .await;
    }

    async fn read_requests(self: &Rc<Self>, early: Vec<u8>) -> End {
        let mut staging = Staging::new(&early);
        drop(early);
        let header_len = self.target.agreement.style.request_header_len();
        loop {
            while let Some(bytes) = staging.peek(header_len) {
                let Some(header) = RequestHeader::parse(self.target.agreement.style, bytes) else {
                    return End::Violation("wrong magic in front of a request");
                };
                staging.consume(header_len);
                match self.take_request(header, &mut staging).await {
                    Ok(()) => {}
                    Err(end) => return end,
                }
            }
            self.give_way().await;
            match staging.receive(&self.stream, header_len).await {
                Ok(0) => return End::Closed,
                Ok(_) => {}
                Err(error) => return End::Failed(error),
            }
            if self.stream.wants_send() {
                self.writer.wake();
            }
        }
    }

    /// Judges a request, receives its payload, starts it.
    async fn take_request(self: &Rc<Self>, header: RequestHeader, staging: &mut Staging) -> Result<(), End> {
        let arrived = Instant::now();
        let style = self.target.agreement.style;
        let answered = Answered { style, cookie: header.cookie, offset: header.offset };
        let judged = judge(&header, &self.target.rules()).map_err(|fatal| End::Violation(fatal.0))?;
        let kind = kind_of(header.command);
        let command = match judged.command {
            Ok(Command::Disconnect) => return Err(End::Orderly),
            Ok(_) if self.control.course() != Course::Run => Err(SHUTTING_DOWN),
            other => other,
        };
        let command = match command {
            Ok(command) => command,
            Err(refusal) => {
                staging.discard(&self.stream, judged.payload).await?;
                let charge = self.admit(0).await;
                self.stats.count(kind, None, arrived.elapsed());
                self.reply(Outcome::refused(&answered, refusal).pieces, charge);
                return Ok(());
            }
        };
        let charge = Some(self.admit(self.cost(&command, judged.payload)).await);
        let mut ticket = Ticket { session: Rc::clone(self), charge, begun: false, answered, kind, arrived };
        let payload = match judged.payload {
            0 => None,
            // Judged to be at most 32 MiB when the command is valid.
            len => Some(staging.payload(&self.stream, usize::try_from(len).expect("bounded")).await?),
        };
        ticket.begun = true;
        self.in_place.set(true);
        dataplane::start_local(async move {
            let outcome = ticket.session.target.execute(answered, command, payload).await;
            ticket.finish(outcome);
        });
        self.in_place.set(false);
        Ok(())
    }

    /// Bytes that a request holds until its reply was sent.
    fn cost(&self, command: &Command, payload: u64) -> u64 {
        match command {
            Command::Read { range, .. } => range.len(),
            Command::BlockStatus { .. } | Command::BlockStatusPayload { .. } => {
                let descriptors = self.target.agreement.contexts.len() * MAX_DESCRIPTORS;
                payload + 16 * descriptors as u64
            }
            Command::Cache { range } => range.len().min(1 << 20),
            _ => payload,
        }
    }

    /// Sends replies as they come. Ends when no more come (`None`), or when the socket fails.
    async fn write_replies(&self) -> Option<io::Error> {
        loop {
            self.writer
                .until(|| {
                    let finished = self.reader_ended.get() && self.taken.get().requests == 0;
                    finished || !self.queue.borrow().is_empty() || self.stream.wants_send()
                })
                .await;
            let batch: Vec<Queued> = {
                let mut queue = self.queue.borrow_mut();
                if queue.len() <= SEND_BATCH {
                    std::mem::take(&mut *queue)
                } else {
                    queue.drain(..SEND_BATCH).collect()
                }
            };
            if batch.is_empty() && !self.stream.wants_send() {
                return None;
            }
            let (bufs, charge) = assemble(batch);
            // Given back also when the writer is dropped while it sends.
            let sending = Sending { session: self, charge };
            if let Err(error) = self.stream.send(bufs).await {
                return Some(error);
            }
            drop(sending);
        }
    }
}

/// Room taken by replies on their way.
struct Sending<'a> {
    session: &'a Session,
    charge: Charge,
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        self.session.release(self.charge);
    }
}

/// A request under way: whatever becomes of it, its room is given back and it is answered.
struct Ticket {
    session: Rc<Session>,
    /// Taken by `finish`.
    charge: Option<Charge>,
    /// The request is complete and has reached the disk.
    begun: bool,
    answered: Answered,
    kind: RequestKind,
    arrived: Instant,
}

impl Ticket {
    fn finish(mut self, outcome: Outcome) {
        if let Some(charge) = self.charge.take() {
            self.session.stats.count(self.kind, outcome.bytes, self.arrived.elapsed());
            self.session.reply(outcome.pieces, charge);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let Some(charge) = self.charge.take() else { return };
        if self.begun {
            // A panic in the disk, or an I/O thread that stops: the client learns of it.
            let refusal = Refusal::new(WireError::Io, "request was given up by the server");
            self.session.stats.count(self.kind, None, self.arrived.elapsed());
            self.session.reply(Pieces::One(self.answered.refused(refusal)), charge);
        } else {
            self.session.release(charge); // The connection ended within the request's payload.
        }
    }
}

fn kind_of(command: u16) -> RequestKind {
    match command {
        command::READ => RequestKind::Read,
        command::WRITE => RequestKind::Write,
        command::FLUSH => RequestKind::Flush,
        command::TRIM => RequestKind::Trim,
        command::CACHE => RequestKind::Cache,
        command::WRITE_ZEROES => RequestKind::WriteZeroes,
        command::BLOCK_STATUS => RequestKind::BlockStatus,
        _ => RequestKind::Unknown,
    }
}

/// The buffers of a batch, heads gathered in one buffer, and the room they give back.
fn assemble(batch: Vec<Queued>) -> (Vec<Buf>, Charge) {
    let heads: usize = batch.iter().map(|queued| queued.piece.head().len()).sum();
    let mut head = Buf::new(heads);
    let mut at = 0;
    for queued in &batch {
        let bytes = queued.piece.head();
        head[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    }
    let mut bufs = Vec::with_capacity(2 * batch.len());
    let mut charge = Charge::default();
    let mut pending = 0; // Head bytes not handed out yet.
    for queued in batch {
        pending += queued.piece.head().len();
        charge.requests += queued.charge.requests;
        charge.bytes += queued.charge.bytes;
        if let Some(data) = queued.piece.data {
            bufs.push(head.split_to(pending));
            bufs.push(data);
            pending = 0;
        }
    }
    if pending > 0 {
        bufs.push(head);
    }
    (bufs, charge)
}

/// Received bytes that were not used yet.
struct Staging {
    /// Away while bytes are received into it, and for good when that was cut short.
    buf: Buf,
    start: usize,
    end: usize,
    /// The last payload was large: do not copy the next one through here.
    after_large: bool,
}

impl Staging {
    fn new(early: &[u8]) -> Self {
        let mut buf = Buf::new(STAGING.max(early.len()));
        buf[..early.len()].copy_from_slice(early);
        Self { buf, start: 0, end: early.len(), after_large: false }
    }

    fn len(&self) -> usize {
        self.end - self.start
    }

    fn peek(&self, len: usize) -> Option<&[u8]> {
        (self.len() >= len).then(|| &self.buf[self.start..self.start + len])
    }

    fn consume(&mut self, len: usize) {
        self.start += len;
        debug_assert!(self.start <= self.end);
    }

    /// Receives more behind what is there, which is less than a header.
    async fn receive(&mut self, stream: &Stream, header_len: usize) -> io::Result<usize> {
        self.buf.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let mut buf = std::mem::replace(&mut self.buf, Buf::new(0));
        let mut tail = buf.split_off(self.end);
        let rest = if self.after_large { Some(tail.split_off(header_len - self.end)) } else { None };
        self.after_large = false;
        let (result, tail) = stream.receive(tail).await;
        self.buf = buf.join(tail);
        if let Some(rest) = rest {
            self.buf = std::mem::replace(&mut self.buf, Buf::new(0)).join(rest);
        }
        let n = result?;
        self.end += n;
        Ok(n)
    }

    /// The next `len` bytes as a buffer of their own.
    async fn payload(&mut self, stream: &Stream, len: usize) -> Result<Buf, End> {
        let here = self.len().min(len);
        let mut payload = Buf::new(len);
        payload[..here].copy_from_slice(&self.buf[self.start..self.start + here]);
        self.consume(here);
        self.after_large = len >= LARGE_PAYLOAD;
        if here == len {
            return Ok(payload);
        }
        let rest = payload.split_off(here);
        let (result, rest) = stream.receive_exact(rest).await;
        match result {
            Ok(()) => Ok(payload.join(rest)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(End::Closed),
            Err(error) => Err(End::Failed(error)),
        }
    }

    /// Receives and drops the next `len` bytes.
    async fn discard(&mut self, stream: &Stream, len: u64) -> Result<(), End> {
        let mut left = len;
        loop {
            let here = usize::try_from(left).map_or(self.len(), |left| self.len().min(left));
            self.consume(here);
            left -= here as u64;
            if left == 0 {
                return Ok(());
            }
            let most = usize::try_from(left).map_or(STAGING, |left| left.min(STAGING));
            let mut buf = std::mem::replace(&mut self.buf, Buf::new(0));
            let rest = buf.split_off(most);
            let (result, buf) = stream.receive(buf).await;
            self.buf = buf.join(rest);
            (self.start, self.end) = (0, 0);
            match result {
                Ok(0) => return Err(End::Closed),
                Ok(n) => self.end = n,
                Err(error) => return Err(End::Failed(error)),
            }
        }
    }
}
