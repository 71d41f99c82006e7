//! A client that says exactly what it is told, and takes replies apart.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;

pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 2;
pub(crate) const DF: u16 = 4;
pub(crate) const REQ_ONE: u16 = 8;
pub(crate) const FAST_ZERO: u16 = 16;
pub(crate) const PAYLOAD_LEN: u16 = 32;

pub(crate) const OPT_STARTTLS: u32 = 5;
pub(crate) const OPT_GO: u32 = 7;
pub(crate) const OPT_STRUCTURED: u32 = 8;
pub(crate) const OPT_LIST_META: u32 = 9;
pub(crate) const OPT_SET_META: u32 = 10;
pub(crate) const OPT_EXTENDED: u32 = 11;
pub(crate) const REP_ACK: u32 = 1;
pub(crate) const REP_META_CONTEXT: u32 = 4;
pub(crate) const REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;
pub(crate) const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Simple,
    Structured,
    Extended,
}

/// One part of a reply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// A simple reply without error, or the end of a chunked one.
    Done,
    Data {
        offset: u64,
        bytes: Vec<u8>,
    },
    Hole {
        offset: u64,
        len: u64,
    },
    Status {
        context: u32,
        runs: Vec<(u64, u64)>,
    },
    Error(u32),
}

/// A whole reply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) parts: Vec<Part>,
}

impl Reply {
    /// The error, 0 for none.
    pub(crate) fn error(&self) -> u32 {
        let error = |part: &Part| if let Part::Error(error) = part { Some(*error) } else { None };
        self.parts.iter().find_map(error).unwrap_or(0)
    }

    /// The bytes of a read, holes filled with zeroes.
    pub(crate) fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut all = vec![0xEE; len];
        let mut covered = 0;
        for part in &self.parts {
            match part {
                Part::Data { offset: at, bytes } => {
                    let start = (at - offset) as usize;
                    all[start..start + bytes.len()].copy_from_slice(bytes);
                    covered += bytes.len();
                }
                Part::Hole { offset: at, len } => {
                    let start = (at - offset) as usize;
                    all[start..start + *len as usize].fill(0);
                    covered += *len as usize;
                }
                Part::Done => {}
                other => panic!("not part of a read: {other:?}"),
            }
        }
        assert_eq!(covered, len, "chunks cover the read");
        all
    }
}

pub(crate) struct RawClient<S = UnixStream> {
    pub(crate) stream: S,
    pub(crate) style: Style,
}

pub(crate) fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// The data of `NBD_OPT_GO` without information requests.
pub(crate) fn go_data(name: &str) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&[0, 0]);
    data
}

/// The data of the options that list and select metadata contexts of the export "disk".
pub(crate) fn meta_data(queries: &[impl AsRef<str>]) -> Vec<u8> {
    let mut data = b"\x00\x00\x00\x04disk".to_vec();
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.as_ref().len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_ref().as_bytes());
    }
    data
}

impl RawClient {
    /// Connects; nothing is said yet.
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        // A server that does not answer fails the test instead of hanging it.
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { stream, style: Style::Simple }
    }

    /// Connects and exchanges flags.
    pub(crate) fn greeted(socket: &Path) -> Self {
        let mut client = Self::connect(socket);
        client.greet();
        client
    }

    /// Connects and goes to transmission on "disk".
    pub(crate) fn transmitting(socket: &Path, style: Style) -> Self {
        let mut client = Self::greeted(socket);
        client.negotiate(style);
        assert_eq!(client.option(OPT_GO, &go_data("disk")).last().unwrap().0, REP_ACK);
        client
    }
}

impl<S: Read + Write> RawClient<S> {
    pub(crate) fn greet(&mut self) {
        assert_eq!(self.take(18), b"NBDMAGICIHAVEOPT\x00\x03");
        self.stream.write_all(&[0, 0, 0, 3]).unwrap();
    }

    /// Agrees on the style, and on base:allocation and qemu:allocation-depth where there are chunks.
    pub(crate) fn negotiate(&mut self, style: Style) {
        self.style = style;
        let option = match style {
            Style::Simple => return,
            Style::Structured => OPT_STRUCTURED,
            Style::Extended => OPT_EXTENDED,
        };
        assert_eq!(self.option(option, &[])[0].0, REP_ACK);
        let data = b"\0\0\0\x04disk\0\0\0\x02\0\0\0\x0fbase:allocation\0\0\0\x15qemu:allocation-depth";
        assert_eq!(self.option(OPT_SET_META, data).len(), 3);
    }

    pub(crate) fn take(&mut self, len: usize) -> Vec<u8> {
        self.try_take(len).unwrap()
    }

    pub(crate) fn try_take(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// Sends an option and returns its replies up to the last.
    pub(crate) fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.stream.write_all(&option_bytes(option, data)).unwrap();
        self.option_replies(option)
    }

    pub(crate) fn option_replies(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.u64(), 0x0003_e889_0455_65a9);
            assert_eq!(self.u32(), option);
            let kind = self.u32();
            let len = self.u32() as usize;
            replies.push((kind, self.take(len)));
            if kind == REP_ACK || kind >= 1 << 31 {
                return replies;
            }
        }
    }

    /// A request's header.
    pub(crate) fn header(&self, command: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let extended = self.style == Style::Extended;
        let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
        bytes.extend_from_slice(&magic.to_be_bytes());
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        if extended {
            bytes.extend_from_slice(&length.to_be_bytes());
        } else {
            bytes.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
        }
        bytes
    }

    /// Sends a request without payload and returns its reply.
    pub(crate) fn request(&mut self, command: u16, flags: u16, offset: u64, length: u64) -> Reply {
        let header = self.header(command, flags, 77, offset, length);
        self.stream.write_all(&header).unwrap();
        let expected = if command == READ { length } else { 0 };
        let reply = self.reply(expected);
        assert_eq!(reply.cookie, 77);
        reply
    }

    /// Sends a request with payload and returns its reply.
    pub(crate) fn send(&mut self, command: u16, flags: u16, offset: u64, payload: &[u8]) -> Reply {
        let flags = if self.style == Style::Extended { flags | PAYLOAD_LEN } else { flags };
        let header = self.header(command, flags, 78, offset, payload.len() as u64);
        self.stream.write_all(&header).unwrap();
        self.stream.write_all(payload).unwrap();
        let reply = self.reply(0);
        assert_eq!(reply.cookie, 78);
        reply
    }

    /// The next reply; `expected` bytes follow a simple reply without error.
    pub(crate) fn reply(&mut self, expected: u64) -> Reply {
        let mut parts = Vec::new();
        loop {
            let magic = self.u32();
            if magic == 0x6744_6698 {
                assert_ne!(self.style, Style::Extended);
                let error = self.u32();
                let cookie = self.u64();
                match error {
                    0 if expected > 0 => {
                        assert_eq!(self.style, Style::Simple, "a simple reply to a read");
                        parts.push(Part::Data { offset: u64::MAX, bytes: self.take(expected as usize) });
                    }
                    0 => parts.push(Part::Done),
                    error => parts.push(Part::Error(error)),
                }
                return Reply { cookie, parts };
            }
            let flags = self.u16();
            let kind = self.u16();
            let cookie = self.u64();
            let len = match self.style {
                Style::Simple => panic!("a chunk that was not negotiated"),
                Style::Structured => {
                    assert_eq!(magic, 0x668e_33ef);
                    u64::from(self.u32())
                }
                Style::Extended => {
                    assert_eq!(magic, 0x6e8a_278c);
                    self.u64(); // The request's offset.
                    self.u64()
                }
            };
            let payload = self.take(len as usize);
            parts.push(part(kind, &payload));
            if flags & 1 != 0 {
                return Reply { cookie, parts };
            }
        }
    }

    /// Whether the server has closed the connection.
    pub(crate) fn is_closed(&mut self) -> bool {
        loop {
            match self.stream.read(&mut [0]) {
                Ok(0) => return true,
                Ok(_) => panic!("the server says something instead of closing"),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

fn part(kind: u16, payload: &[u8]) -> Part {
    match kind {
        0 => Part::Done,
        1 => Part::Data { offset: number(&payload[..8]), bytes: payload[8..].to_vec() },
        2 => Part::Hole { offset: number(&payload[..8]), len: number(&payload[8..12]) },
        5 => Part::Status {
            context: number(&payload[..4]) as u32,
            runs: payload[4..].chunks(8).map(|run| (number(&run[..4]), number(&run[4..]))).collect(),
        },
        6 => {
            let runs: Vec<_> = payload[8..].chunks(16).map(|run| (number(&run[..8]), number(&run[8..]))).collect();
            assert_eq!(number(&payload[4..8]), runs.len() as u64);
            Part::Status { context: number(&payload[..4]) as u32, runs }
        }
        0x8001 => {
            let text = number(&payload[4..6]) as usize;
            assert_eq!(payload.len(), 6 + text);
            assert!(text > 0, "errors say why");
            Part::Error(number(&payload[..4]) as u32)
        }
        other => panic!("chunk of type {other}"),
    }
}
