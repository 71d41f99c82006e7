//! Stream sockets: unix and TCP.
#![allow(unsafe_code)] // System calls on buffers that the caller owns; argued at each block.

use crate::executor::current_core;
use crate::op::{Op, Request, SocketRequest, io_result};
use disk::Buf;
use rustix::net::{Shutdown, SocketFlags};
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// No signal when the peer is gone; the kernel goes on after short sends where it can.
pub(crate) const SEND_FLAGS: i32 = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
/// Most pieces of one `sendmsg`.
const MAX_PIECES: usize = 1024;

/// What is being sent: the buffers, and the kernel's description of what remains of them.
pub(crate) struct Message {
    /// Own the bytes that `pieces` points to.
    _bufs: Vec<Buf>,
    pieces: Vec<libc::iovec>,
    /// Pieces that are sent already.
    done: usize,
    header: libc::msghdr,
}

impl Message {
    fn new(mut bufs: Vec<Buf>) -> Self {
        let piece = |buf: &mut Buf| libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        let pieces = bufs.iter_mut().filter(|buf| !buf.is_empty()).map(piece).collect();
        // SAFETY: a msghdr of zeroes is valid: no name, no pieces, no control data.
        let header = unsafe { std::mem::zeroed() };
        Self { _bufs: bufs, pieces, done: 0, header }
    }

    /// The kernel's view of what remains; valid until the message moves or advances.
    pub(crate) fn header(&mut self) -> *const libc::msghdr {
        let rest = &mut self.pieces[self.done..];
        self.header.msg_iov = rest.as_mut_ptr();
        self.header.msg_iovlen = rest.len().min(MAX_PIECES);
        &raw const self.header
    }

    fn is_empty(&self) -> bool {
        self.done == self.pieces.len()
    }

    /// `n` bytes have gone out.
    fn advance(&mut self, mut n: usize) {
        while n > 0 {
            let Some(piece) = self.pieces.get_mut(self.done) else {
                debug_assert!(false, "more was sent than there is");
                return;
            };
            if n < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(n).cast();
                piece.iov_len -= n;
                return;
            }
            n -= piece.iov_len;
            self.done += 1;
        }
    }
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().map_or(-libc::EIO, i32::wrapping_neg)
}

/// Receives what is there.
pub(crate) fn receive_now(socket: &OwnedFd, buf: &mut Buf, flags: i32) -> i32 {
    let flags = (flags & !libc::MSG_WAITALL) | libc::MSG_DONTWAIT;
    let len = buf.len().min(crate::file::MAX_TRANSFER);
    // SAFETY: `buf` is borrowed mutably for the call and holds `len` bytes.
    let n = unsafe { libc::recv(socket.as_raw_fd(), buf.as_mut_ptr().cast(), len, flags) };
    if n < 0 { errno() } else { n as i32 }
}

/// Sends as much as the socket takes.
pub(crate) fn send_now(socket: &OwnedFd, message: &mut Message) -> i32 {
    let header = message.header();
    // SAFETY: the header and the pieces it points to are owned by `message`, borrowed for the call.
    let n = unsafe { libc::sendmsg(socket.as_raw_fd(), header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    if n < 0 { errno() } else { i32::try_from(n).unwrap_or(i32::MAX) }
}

/// A connected stream socket.
///
/// May be moved to another I/O thread between operations. One receive and one send may be under way at the
/// same time. Closed when it and the last operation on it are gone; dropping it with operations under way
/// shuts the connection down, so that they end.
pub struct Socket {
    fd: Arc<OwnedFd>,
    peer: String,
}

impl Socket {
    /// Takes over a connected unix socket.
    pub fn from_unix(stream: UnixStream) -> Self {
        // The peer's process is what tells unix clients apart: their addresses are empty.
        let peer = match rustix::net::sockopt::socket_peercred(&stream) {
            Ok(cred) => format!("unix:pid={},uid={}", cred.pid.as_raw_nonzero(), cred.uid.as_raw()),
            Err(_) => "unix".into(),
        };
        Self { fd: Arc::new(stream.into()), peer }
    }

    /// Takes over a connected TCP socket and turns Nagle's delay off.
    pub fn from_tcp(stream: TcpStream) -> Self {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY");
        }
        let peer = stream.peer_addr().map_or_else(|_| "tcp".into(), |peer| peer.to_string());
        Self { fd: Arc::new(stream.into()), peer }
    }

    /// Who is at the other end, for messages: an address and port, or the process of a unix socket.
    pub fn peer(&self) -> String {
        self.peer.clone()
    }

    /// Receives what is there, at least one byte, into the front of `buf`, and returns how much; 0 when the
    /// peer has closed.
    ///
    /// Bytes that arrive for a receive whose future was dropped are lost.
    pub async fn recv(&self, buf: Buf) -> (io::Result<usize>, Buf) {
        let mut buf = buf;
        loop {
            let (result, back) = self.receive(buf, 0).await;
            buf = back;
            match result {
                Err(error) if is_retried(&error) => {}
                result => return (result, buf),
            }
        }
    }

    /// Fills all of `buf`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the peer closes before.
    pub async fn recv_exact(&self, buf: Buf) -> (io::Result<()>, Buf) {
        let (mut done, mut rest) = (Buf::new(0), buf);
        // At once: who waits for all of it has seen the beginning, and the rest is nearly always there.
        let mut at_once = current_core().is_some_and(|core| core.take_inline(rest.len()));
        let result = loop {
            if rest.is_empty() {
                break Ok(());
            }
            let (result, mut buf) = if at_once {
                (io_result(receive_now(&self.fd, &mut rest, 0)), rest)
            } else {
                self.receive(rest, libc::MSG_WAITALL).await
            };
            at_once = false;
            match result {
                Ok(0) => {
                    rest = buf;
                    break Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(n) => {
                    let front = buf.split_to(n);
                    done = done.join(front);
                    rest = buf;
                }
                Err(error) if is_retried(&error) => rest = buf,
                Err(error) => {
                    rest = buf;
                    break Err(error);
                }
            }
        };
        let whole = done.join(rest);
        (result, whole)
    }

    async fn receive(&self, buf: Buf, flags: i32) -> (io::Result<usize>, Buf) {
        let request = SocketRequest::Receive { socket: Arc::clone(&self.fd), buf, flags };
        match Op::start(Request::Socket(request)).await {
            (result, Request::Socket(SocketRequest::Receive { buf, .. })) => (io_result(result), buf),
            _ => unreachable!("an operation returns the request it was started with"),
        }
    }

    /// Sends all bytes of all buffers, in order.
    pub async fn send_all(&self, bufs: Vec<Buf>) -> io::Result<()> {
        let mut message = Message::new(bufs);
        // At once where the socket has room: cheaper than a turn through the driver, and sooner at the peer.
        let mut at_once = current_core().is_some_and(|core| core.take_inline(0));
        while !message.is_empty() {
            let result = if at_once {
                send_now(&self.fd, &mut message)
            } else {
                let request = SocketRequest::Send { socket: Arc::clone(&self.fd), message: Box::new(message) };
                match Op::start(Request::Socket(request)).await {
                    (result, Request::Socket(SocketRequest::Send { message: back, .. })) => {
                        message = *back;
                        result
                    }
                    _ => unreachable!("an operation returns the request it was started with"),
                }
            };
            match io_result(result) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => message.advance(n),
                Err(error) if is_retried(&error) => {}
                Err(error) => return Err(error),
            }
            at_once = false;
        }
        Ok(())
    }

    /// Ends the connection in both directions: operations under way end, with what they have or an error.
    pub fn shutdown(&self) {
        // Fails when the peer is gone already: the same outcome.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }

    /// Tells the peer that nothing more comes; receiving goes on.
    pub fn shutdown_send(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write); // As above.
    }
}

fn is_retried(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

impl Drop for Socket {
    fn drop(&mut self) {
        if Arc::strong_count(&self.fd) > 1 {
            self.shutdown();
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Socket({})", self.peer)
    }
}

/// A socket that takes connections. A unix socket's file is removed when the listener that made it is dropped.
pub struct Listener {
    fd: Arc<OwnedFd>,
    kind: Kind,
}

enum Kind {
    /// With the file that this listener made: its path, device and inode.
    Unix(Option<(PathBuf, u64, u64)>),
    Tcp,
}

impl Listener {
    /// Listens at `path`. A socket file that is there already is replaced if nobody listens on it.
    ///
    /// # Errors
    /// `AddrInUse` when somebody listens there, or something other than a socket has the name.
    pub fn bind_unix(path: impl AsRef<Path>) -> io::Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let path = path.as_ref();
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let in_use =
                    |what: &str| io::Error::new(io::ErrorKind::AddrInUse, format!("{}: {what}", path.display()));
                if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                    return Err(in_use("exists and is not a socket; remove it or choose another path"));
                }
                match UnixStream::connect(path) {
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                    Ok(_) => return Err(in_use("another process listens on this socket")),
                    Err(error) => return Err(error),
                }
                std::fs::remove_file(path)?;
                UnixListener::bind(path)
            }
            other => other,
        }
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        let made = std::fs::symlink_metadata(path)?;
        listener.set_nonblocking(true)?;
        let kind = Kind::Unix(Some((path.to_owned(), made.dev(), made.ino())));
        Ok(Self { fd: Arc::new(listener.into()), kind })
    }

    /// Listens on a TCP address.
    pub fn bind_tcp(address: impl ToSocketAddrs) -> io::Result<Self> {
        Self::from_tcp(TcpListener::bind(address)?)
    }

    /// Takes over a listening unix socket; its file stays when this is dropped.
    pub fn from_unix(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { fd: Arc::new(listener.into()), kind: Kind::Unix(None) })
    }

    /// Takes over a listening TCP socket.
    pub fn from_tcp(listener: TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { fd: Arc::new(listener.into()), kind: Kind::Tcp })
    }

    /// The address of a TCP listener.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match self.kind {
            Kind::Tcp => TcpListener::from(self.fd.try_clone()?).local_addr(),
            Kind::Unix(_) => Err(io::Error::new(io::ErrorKind::Unsupported, "a unix socket has no port")),
        }
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// Those that one connection has (`ConnectionAborted`), and those of this process, such as too many open
    /// files: wait a little before the next call then.
    pub async fn accept(&self) -> io::Result<Socket> {
        loop {
            match rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC) {
                Ok(fd) => {
                    return Ok(match self.kind {
                        Kind::Tcp => Socket::from_tcp(fd.into()),
                        Kind::Unix(_) => Socket::from_unix(fd.into()),
                    });
                }
                Err(rustix::io::Errno::AGAIN) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let ready = SocketRequest::Ready { fd: Arc::clone(&self.fd), events: libc::POLLIN };
            let (result, _) = Op::start(Request::Socket(ready)).await;
            io_result(result)?;
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        use std::os::unix::fs::MetadataExt;
        if let Kind::Unix(Some((path, device, inode))) = &self.kind {
            // Somebody else may have put another socket there meanwhile.
            let ours = std::fs::symlink_metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (*device, *inode));
            if ours && let Err(error) = std::fs::remove_file(path) {
                tracing::debug!(%error, path = %path.display(), "removing the socket");
            }
        }
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Listener({:?})", self.fd)
    }
}
