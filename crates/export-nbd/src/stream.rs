//! A client's byte stream: a socket, with or without TLS.

use crate::tls::{Records, TlsIdentity};
use dataplane::net::Socket;
use disk::Buf;
use std::cell::{Cell, RefCell};
use std::io;
use std::time::Duration;

/// Ciphertext received at once.
const RECEIVE: usize = 64 << 10;
/// Plaintext encrypted at once, so that a long reply is not in memory twice.
const ENCRYPT: usize = 1 << 20;

/// How long the peer may take to end its side.
const LINGER: Duration = Duration::from_secs(1);

/// One connection. Can be moved to another thread between operations. One receiver and one sender may be at
/// work at the same time.
pub(crate) struct Stream {
    socket: Socket,
    tls: Option<Secured>,
}

struct Secured {
    records: RefCell<Records>,
    /// Ciphertext that was received and is not decrypted yet.
    staging: Cell<Option<Staged>>,
}

struct Staged {
    buf: Buf,
    start: usize,
    end: usize,
}

impl Stream {
    pub(crate) fn plain(socket: Socket) -> Self {
        Self { socket, tls: None }
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Does the TLS handshake.
    pub(crate) async fn start_tls(&mut self, identity: &TlsIdentity) -> io::Result<()> {
        let records = Records::new(identity).map_err(io::Error::other)?;
        let secured = self.tls.insert(Secured { records: RefCell::new(records), staging: Cell::default() });
        loop {
            let out = secured.records.borrow_mut().take_records()?;
            if !out.is_empty() {
                self.socket.send_all(out).await?;
            }
            if !secured.records.borrow().is_handshaking() {
                return Ok(());
            }
            if let Err(error) = secured.receive(&self.socket).await {
                // The alert tells the peer why.
                let out = secured.records.borrow_mut().take_records()?;
                if !out.is_empty() {
                    self.socket.send_all(out).await?;
                }
                return Err(error);
            }
        }
    }

    /// Receives at least one byte into the front of `buf`, which is not empty; 0 at the end of the stream.
    pub(crate) async fn receive(&self, mut buf: Buf) -> (io::Result<usize>, Buf) {
        let Some(secured) = &self.tls else {
            return self.socket.recv(buf).await;
        };
        loop {
            let read = secured.records.borrow_mut().read(&mut buf);
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return (result, buf),
            }
            if let Err(error) = secured.receive(&self.socket).await {
                return (Err(error), buf);
            }
        }
    }

    /// Fills all of `buf`.
    pub(crate) async fn receive_exact(&self, buf: Buf) -> (io::Result<()>, Buf) {
        if self.tls.is_none() {
            return self.socket.recv_exact(buf).await;
        }
        let mut done = Buf::new(0);
        let mut rest = buf;
        while !rest.is_empty() {
            let (result, mut buf) = self.receive(rest).await;
            let n = match result {
                Ok(0) => return (Err(io::ErrorKind::UnexpectedEof.into()), buf),
                Ok(n) => n,
                Err(error) => return (Err(error), buf),
            };
            let front = buf.split_to(n);
            done = done.join(front);
            rest = buf;
        }
        (Ok(()), done)
    }

    /// Whether something waits to be sent besides replies (TLS's own messages).
    pub(crate) fn wants_send(&self) -> bool {
        self.tls.as_ref().is_some_and(|secured| secured.records.borrow().wants_write())
    }

    /// Sends all.
    pub(crate) async fn send(&self, bufs: Vec<Buf>) -> io::Result<()> {
        let Some(secured) = &self.tls else {
            return self.socket.send_all(bufs).await;
        };
        let mut pending = 0;
        for buf in &bufs {
            for part in buf.chunks(ENCRYPT) {
                secured.records.borrow_mut().write(part)?;
                pending += part.len();
                if pending >= ENCRYPT {
                    pending = 0;
                    let records = secured.records.borrow_mut().take_records()?;
                    self.socket.send_all(records).await?;
                }
            }
        }
        let records = secured.records.borrow_mut().take_records()?;
        self.socket.send_all(records).await
    }

    /// Ends the stream properly. Call when nothing is being sent.
    pub(crate) async fn close(&self) {
        if let Some(secured) = &self.tls {
            let records = {
                let mut records = secured.records.borrow_mut();
                records.close();
                records.take_records()
            };
            // The peer may be gone already, which ends the stream as well.
            if let Ok(records) = records
                && let Err(error) = self.socket.send_all(records).await
            {
                tracing::debug!(%error, "closing TLS");
            }
        }
        // With unread bytes there, the end of the socket would have the kernel throw away what is still on its way.
        self.socket.shutdown_send();
        let rest = async {
            let mut buf = Buf::new(RECEIVE);
            loop {
                let (result, back) = self.socket.recv(buf).await;
                match result {
                    Ok(0) | Err(_) => return,
                    Ok(_) => buf = back,
                }
            }
        };
        dataplane::timeout(LINGER, rest).await;
        self.socket.shutdown();
    }

    /// Ends the connection at once; operations under way fail.
    pub(crate) fn abort(&self) {
        self.socket.shutdown();
    }
}

impl Secured {
    /// Decrypts some ciphertext, received now or before. Not at the same time as another call.
    async fn receive(&self, socket: &Socket) -> io::Result<()> {
        let mut staged = self.staging.take().unwrap_or_else(|| Staged { buf: Buf::new(RECEIVE), start: 0, end: 0 });
        if staged.start == staged.end {
            let (result, buf) = socket.recv(staged.buf).await;
            let end = result?;
            if end == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            staged = Staged { buf, start: 0, end };
        }
        staged.start += self.records.borrow_mut().receive(&staged.buf[staged.start..staged.end])?;
        self.staging.set(Some(staged));
        Ok(())
    }
}
