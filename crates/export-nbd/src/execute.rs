//! Carrying out one request on a disk, and putting the reply together.

use crate::context::MetaContext;
use crate::errors::{Refusal, WireError};
use crate::negotiation::Agreement;
use crate::occasional::Occasional;
use crate::reply::{Answered, Descriptors, Piece};
use crate::request::{Command, Rules, StatusPayload};
use crate::wire::ReplyStyle;
use disk::{Buf, ByteRange, DiskError, DiskHandle, ErrorKind, Operation, Result, WriteFlags, ZeroMode};
use std::cell::Cell;
use std::sync::Arc;

/// Reads of at least this many bytes are asked for holes.
const SPARSE_READ: u64 = 256 << 10;
/// Questions about one read; what is not known by then is read.
const SPARSE_QUESTIONS: u32 = 16;
/// Most reads in a row that are not asked, after others had no holes.
const SPARSE_BACKOFF: u32 = 64;
/// Descriptors of one context in a reply.
pub(crate) const MAX_DESCRIPTORS: usize = 8192;
/// Questions to a context for one descriptor list: neighbours of one status are joined.
const MAX_STATUS_QUESTIONS: usize = MAX_DESCRIPTORS;
/// Questions in a row, before others on the thread have their turn.
const QUESTIONS_PER_TURN: usize = 64;
/// Questions for the single descriptor of `NBD_CMD_FLAG_REQ_ONE`.
const ONE_STATUS_QUESTIONS: usize = 64;
/// A cache request reads in pieces of this many bytes,
const CACHE_PIECE: u64 = 256 << 10;
/// and at most this many.
const CACHE_MAX: u64 = 32 << 20;

/// A reply, ready to be sent.
pub(crate) struct Outcome {
    pub(crate) pieces: Pieces,
    /// Bytes that the request had effect on; `None` when it failed.
    pub(crate) bytes: Option<u64>,
}

/// One piece nearly always.
pub(crate) enum Pieces {
    One(Piece),
    Many(Vec<Piece>),
}

impl Outcome {
    pub(crate) fn refused(answered: &Answered, refusal: Refusal) -> Self {
        Self { pieces: Pieces::One(answered.refused(refusal)), bytes: None }
    }

    fn done(piece: Piece, bytes: u64) -> Self {
        Self { pieces: Pieces::One(piece), bytes: Some(bytes) }
    }
}

/// Remembers whether asking for holes was worth it lately.
#[derive(Debug, Default)]
struct SparseHint {
    /// Reads that are not to be asked.
    skip: Cell<u32>,
    /// How many were decided last.
    backoff: Cell<u32>,
}

impl SparseHint {
    fn worth_asking(&self) -> bool {
        match self.skip.get() {
            0 => true,
            left => {
                self.skip.set(left - 1);
                false
            }
        }
    }

    fn learnt(&self, found_holes: bool) {
        let backoff = if found_holes { 0 } else { (self.backoff.get() * 2).clamp(1, SPARSE_BACKOFF) };
        self.backoff.set(backoff);
        self.skip.set(backoff);
    }
}

/// Tells the operator of failures, but not of each: a guest whose disk is full tries again and again.
#[derive(Debug, Default)]
struct FailureLog(Occasional);

impl FailureLog {
    /// A client's mistakes are its own matter; failures of the disk are the operator's.
    fn report(&self, export: &str, error: &DiskError) {
        if !matches!(Refusal::from(error).error, WireError::Io | WireError::NoMemory | WireError::NoSpace) {
            return tracing::debug!(export, ?error, "request refused");
        }
        if let Some(unsaid) = self.0.due() {
            tracing::warn!(export, ?error, unsaid, "request failed");
        }
    }
}

/// What requests of one connection share.
pub(crate) struct Target {
    disk: DiskHandle,
    pub(crate) agreement: Agreement,
    sparse: SparseHint,
    failures: FailureLog,
}

impl Target {
    pub(crate) fn new(disk: DiskHandle, agreement: Agreement) -> Self {
        Self { disk, agreement, sparse: SparseHint::default(), failures: FailureLog::default() }
    }

    pub(crate) fn rules(&self) -> Rules {
        let geometry = self.disk.geometry();
        Rules {
            style: self.agreement.style,
            read_only: self.agreement.read_only || geometry.read_only,
            has_contexts: self.agreement.style.is_chunked() && !self.agreement.contexts.is_empty(),
            size: geometry.size,
        }
    }

    /// Carries out a command; `payload` is what followed its header.
    pub(crate) async fn execute(&self, answered: Answered, command: Command, payload: Option<Buf>) -> Outcome {
        match self.try_execute(&answered, command, payload).await {
            Ok(outcome) => outcome,
            Err(error) => {
                self.failures.report(&self.agreement.export, &error);
                Outcome::refused(&answered, Refusal::from(&error))
            }
        }
    }

    async fn try_execute(&self, answered: &Answered, command: Command, payload: Option<Buf>) -> Result<Outcome> {
        let disk = &self.disk;
        match command {
            Command::Read { range, .. } if range.is_empty() => Ok(Outcome::done(answered.empty_read(), 0)),
            Command::Read { range, whole } => {
                let sparse = range.len() >= SPARSE_READ && !whole && answered.style.is_chunked();
                if sparse && self.sparse.worth_asking() {
                    return self.sparse_read(answered, range).await;
                }
                let buf = disk.read(range.offset(), Buf::new(length(range))).await?;
                Ok(Outcome::done(answered.data(range.offset(), buf, true), range.len()))
            }
            Command::Write { range, fua } => {
                let payload = payload.unwrap_or_else(|| Buf::new(0));
                debug_assert_eq!(payload.len() as u64, range.len());
                disk.write(range.offset(), payload, WriteFlags { fua }).await?;
                Ok(Outcome::done(answered.done(), range.len()))
            }
            Command::Flush => {
                disk.flush().await?;
                Ok(Outcome::done(answered.done(), 0))
            }
            Command::Trim { range, fua } => {
                disk.discard(range, WriteFlags { fua }).await?;
                Ok(Outcome::done(answered.done(), range.len()))
            }
            Command::WriteZeroes { range, fua, unmap, fast_only } => {
                disk.write_zeroes(range, ZeroMode { unmap, fast_only }, WriteFlags { fua }).await?;
                Ok(Outcome::done(answered.done(), range.len()))
            }
            Command::Cache { range } => {
                self.cache(range.prefix(CACHE_MAX)).await?;
                Ok(Outcome::done(answered.done(), range.len()))
            }
            Command::BlockStatus { range, one } => {
                let position = |n| u32::try_from(n).expect("a bounded number of contexts");
                let all = self.agreement.contexts.iter().enumerate().map(|(n, context)| (position(n), context));
                self.block_status(answered, range, one, all).await
            }
            Command::BlockStatusPayload { offset, one } => {
                let bytes = payload.as_deref().unwrap_or(&[]);
                let contexts = &self.agreement.contexts;
                let asked = match StatusPayload::parse(bytes, offset, &self.rules(), contexts.len()) {
                    Ok(asked) => asked,
                    Err(refusal) => return Ok(Outcome::refused(answered, refusal)),
                };
                let chosen = asked.contexts.iter().map(|id| (*id, &contexts[*id as usize]));
                self.block_status(answered, asked.range, one, chosen).await
            }
            // Never reaches the disk: the session ends.
            Command::Disconnect => Ok(Outcome::done(answered.done(), 0)),
        }
    }

    /// Reads what is data and names what is zero.
    async fn sparse_read(&self, answered: &Answered, range: ByteRange) -> Result<Outcome> {
        let mut pieces = Vec::new();
        let mut rest = range;
        let mut holes = false;
        // Bytes of data before `rest` that were not read yet.
        let mut data = rest.prefix(0);
        for _ in 0..SPARSE_QUESTIONS {
            if rest.is_empty() {
                break;
            }
            let extent = self.disk.map(rest).await?;
            let run = extent.range.intersect(rest);
            if run.is_empty() {
                break; // An implementation that makes no progress does not hang us.
            }
            rest = rest.skip(run.len());
            if extent.zero {
                holes = true;
                self.read_piece(answered, data, false, &mut pieces).await?;
                pieces.push(answered.hole(run, rest.is_empty()));
                data = rest.prefix(0);
            } else {
                data = ByteRange::between(data.offset(), run.end());
            }
        }
        let data = ByteRange::between(data.offset(), range.end());
        self.read_piece(answered, data, true, &mut pieces).await?;
        self.sparse.learnt(holes);
        Ok(Outcome { pieces: Pieces::Many(pieces), bytes: Some(range.len()) })
    }

    async fn read_piece(
        &self,
        answered: &Answered,
        range: ByteRange,
        last: bool,
        pieces: &mut Vec<Piece>,
    ) -> Result<()> {
        if !range.is_empty() {
            let buf = self.disk.read(range.offset(), Buf::new(length(range))).await?;
            pieces.push(answered.data(range.offset(), buf, last));
        }
        Ok(())
    }

    /// Reads through the range, so that whatever caches there are hold it.
    async fn cache(&self, range: ByteRange) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let piece = rest.prefix(CACHE_PIECE);
            self.disk.read(piece.offset(), Buf::new(length(piece))).await?;
            rest = rest.skip(piece.len());
        }
        Ok(())
    }

    async fn block_status<'a>(
        &self,
        answered: &Answered,
        range: ByteRange,
        one: bool,
        contexts: impl ExactSizeIterator<Item = (u32, &'a Arc<dyn MetaContext>)>,
    ) -> Result<Outcome> {
        let mut pieces = Vec::with_capacity(contexts.len());
        let mut left = contexts.len();
        for (id, context) in contexts {
            left -= 1;
            let descriptors = self.descriptors(context.as_ref(), range, one, answered.style).await?;
            pieces.push(answered.status(id, &descriptors, left == 0));
        }
        Ok(Outcome { pieces: Pieces::Many(pieces), bytes: Some(range.len()) })
    }

    async fn descriptors(
        &self,
        context: &dyn MetaContext,
        range: ByteRange,
        one: bool,
        style: ReplyStyle,
    ) -> Result<Descriptors> {
        let (most, questions) = if one { (1, ONE_STATUS_QUESTIONS) } else { (MAX_DESCRIPTORS, MAX_STATUS_QUESTIONS) };
        let mut descriptors = Descriptors::new(style);
        let mut rest = range;
        let mut joined: Option<(u64, u32)> = None;
        for question in 0..questions {
            if rest.is_empty() {
                break;
            }
            if question % QUESTIONS_PER_TURN == QUESTIONS_PER_TURN - 1 {
                dataplane::yield_now().await;
            }
            let run = context.status(&self.disk, rest).await?;
            let len = run.len.min(rest.len());
            if len == 0 {
                break;
            }
            match &mut joined {
                Some((total, status)) if *status == run.status => *total += len,
                _ => {
                    if let Some((total, status)) = joined {
                        descriptors.push(total, status);
                        if descriptors.len() == most {
                            joined = None;
                            break;
                        }
                    }
                    joined = Some((len, run.status));
                }
            }
            rest = rest.skip(len);
        }
        if let Some((total, status)) = joined {
            descriptors.push(total, status);
        }
        if descriptors.len() == 0 {
            let error = DiskError::new(ErrorKind::Io, Operation::Map).at(range);
            return Err(error.because(format!("metadata context {} knows no status", context.name())));
        }
        Ok(descriptors)
    }
}

/// The range is inside a request's payload: at most 32 MiB.
fn length(range: ByteRange) -> usize {
    usize::try_from(range.len()).expect("at most 32 MiB")
}
