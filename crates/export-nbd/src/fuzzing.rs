//! Both phases of the protocol over arbitrary bytes, without sockets, threads and clocks. For the fuzz
//! targets; unit tests run it too.

use crate::context::{self, MetaContext};
use crate::execute::{Pieces, Target};
use crate::memory_disk::MemoryDisk;
use crate::negotiation::{Agreement, ExportFacts, Negotiation, Step, TlsMode};
use crate::reply::{Answered, Piece};
use crate::request::{Command, judge};
use crate::wire::{
    Cursor, EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, ReplyStyle, RequestHeader, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, chunk,
};
use disk::{Buf, DiskHandle};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// Size of the export "disk" in bytes; it does not end on a page.
const SIZE: u64 = (1 << 20) + 1536;
/// Requests of one run, so that a run ends.
const MAX_REQUESTS: usize = 512;
/// Longest payload or read that a run executes, so that it is fast.
const MAX_BYTES: u64 = 1 << 20;

fn facts() -> ExportFacts {
    ExportFacts {
        name: "disk".into(),
        description: String::new(),
        size: SIZE,
        read_only: false,
        preferred_alignment: 4096,
        contexts: Some(context::Collected { contexts: context::standard(), left_out: 0 }),
    }
}

/// A client's whole side of a connection, beginning with its flags. Bytes behind the agreement are requests.
///
/// # Panics
/// When the server would, or when a reply contradicts the protocol: that is what fuzzing looks for.
pub fn connection(bytes: &[u8]) {
    let mut negotiation = Negotiation::new(TlsMode::Optional);
    let mut fed = false;
    let mut answered = None;
    let agreement = loop {
        let step = answered.take().unwrap_or_else(|| negotiation.advance());
        let _ = negotiation.take_output();
        match step {
            Step::Receive if fed => return,
            Step::Receive => {
                negotiation.receive(bytes);
                fed = true;
            }
            Step::List => negotiation.list([("disk", "")]),
            Step::Lookup { name, .. } => answered = negotiation.found((name.is_empty() || name == "disk").then(facts)),
            Step::StartTls => negotiation.tls_started(), // As if the client had nothing more to say in plain.
            Step::Transmit(agreement) => break agreement,
            Step::Close(_) => return,
        }
    };
    transmit(agreement, &negotiation.into_input());
}

/// Requests alone. The first byte chooses what was negotiated.
pub fn requests(bytes: &[u8]) {
    let Some((choice, bytes)) = bytes.split_first() else { return };
    let style = match choice % 3 {
        0 => ReplyStyle::Simple,
        1 => ReplyStyle::Structured,
        _ => ReplyStyle::Extended,
    };
    let contexts: Vec<Arc<dyn MetaContext>> = if choice & 4 == 0 { context::standard() } else { Vec::new() };
    transmit(Agreement { export: "disk".into(), style, read_only: choice & 8 != 0, contexts }, bytes);
}

fn transmit(agreement: Agreement, mut input: &[u8]) {
    let style = agreement.style;
    let disk = DiskHandle::new(MemoryDisk::new(SIZE));
    let target = Target::new(disk, agreement);
    for _ in 0..MAX_REQUESTS {
        let Some((bytes, rest)) = input.split_at_checked(style.request_header_len()) else { return };
        input = rest;
        let Some(header) = RequestHeader::parse(style, bytes) else { return };
        let Ok(judged) = judge(&header, &target.rules()) else { return };
        let Some((payload, rest)) = usize::try_from(judged.payload).ok().and_then(|len| input.split_at_checked(len))
        else {
            return;
        };
        input = rest;
        let answered = Answered { style, cookie: header.cookie, offset: header.offset };
        let pieces = match judged.command {
            Ok(Command::Disconnect) => return,
            Ok(_) if payload.len() as u64 > MAX_BYTES => continue,
            Ok(command) => {
                let payload = (!payload.is_empty()).then(|| Buf::copy_of(payload));
                poll_to_end(target.execute(answered, command, payload)).pieces
            }
            Err(refusal) => Pieces::One(answered.refused(refusal)),
        };
        let pieces = match pieces {
            Pieces::One(piece) => vec![piece],
            Pieces::Many(pieces) => pieces,
        };
        check(&header, style, &pieces, judged.command.is_ok());
    }
}

/// A disk in memory waits for nothing, but a long question gives way to others now and then.
fn poll_to_end<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return output;
        }
    }
}

/// The reply has the form that was negotiated, and ends where it says it does.
fn check(header: &RequestHeader, style: ReplyStyle, pieces: &[Piece], executed: bool) {
    let mut ended = false;
    for piece in pieces {
        assert!(!ended, "a chunk behind the last");
        let data = piece.data.as_ref().map_or(0, |data| data.len()) as u64;
        let mut cursor = Cursor(piece.head());
        let magic = cursor.u32().expect("a magic");
        if magic == SIMPLE_REPLY_MAGIC {
            assert_ne!(style, ReplyStyle::Extended);
            let error = cursor.u32().expect("an error");
            assert_eq!(cursor.u64(), Some(header.cookie));
            assert!(cursor.is_empty());
            let expected = if header.command == 0 && error == 0 { header.length } else { 0 };
            assert_eq!(data, expected, "bytes behind a simple reply");
            assert!(executed || error != 0);
            assert!(style == ReplyStyle::Simple || header.command != 0, "simple reply to a read");
            ended = true;
            continue;
        }
        let flags = cursor.u16().expect("flags");
        let kind = cursor.u16().expect("a type");
        assert_eq!(cursor.u64(), Some(header.cookie));
        let len = match style {
            ReplyStyle::Simple => panic!("a chunk that was not negotiated"),
            ReplyStyle::Structured => {
                assert_eq!(magic, STRUCTURED_REPLY_MAGIC);
                u64::from(cursor.u32().expect("a length"))
            }
            ReplyStyle::Extended => {
                assert_eq!(magic, EXTENDED_REPLY_MAGIC);
                assert_eq!(cursor.u64(), Some(header.offset));
                cursor.u64().expect("a length")
            }
        };
        assert_eq!(len, cursor.0.len() as u64 + data, "payload of a chunk");
        assert!(executed || kind == chunk::ERROR);
        ended = flags & REPLY_FLAG_DONE != 0;
    }
    assert!(ended, "a reply without an end");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC};

    /// A small generator of our own: tests must not depend on a seed of the day.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        fn below(&mut self, end: u64) -> u64 {
            self.next() % end
        }
    }

    #[test]
    fn plausible_and_broken_requests() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for _ in 0..3000 {
            let choice = random.below(16) as u8;
            let extended = choice % 3 == 2;
            let mut bytes = vec![choice];
            for _ in 0..random.below(12) {
                let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
                let command = random.below(9) as u16;
                let mut flags = 0u16;
                if random.below(3) == 0 {
                    flags |= 1 << random.below(6);
                }
                if extended && command == 1 {
                    flags |= 1 << 5;
                }
                let lengths = [0, 1, 12, 16, 512, 4096, 65536, 300_000, SIZE, u64::from(u32::MAX), u64::MAX];
                let length = lengths[random.below(lengths.len() as u64) as usize];
                let offsets = [0, 0, 1, 4096, 100_000, SIZE - 1, SIZE, u64::MAX - 5];
                let offset = offsets[random.below(offsets.len() as u64) as usize];
                bytes.extend_from_slice(&magic.to_be_bytes());
                bytes.extend_from_slice(&flags.to_be_bytes());
                bytes.extend_from_slice(&command.to_be_bytes());
                bytes.extend_from_slice(&random.next().to_be_bytes());
                bytes.extend_from_slice(&offset.to_be_bytes());
                if extended {
                    bytes.extend_from_slice(&length.to_be_bytes());
                } else {
                    bytes.extend_from_slice(&(length as u32).to_be_bytes());
                }
                if flags & (1 << 5) != 0 || command == 1 {
                    bytes.resize(bytes.len() + length.min(66_000) as usize, random.next() as u8);
                }
            }
            if random.below(4) == 0 {
                let at = random.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << random.below(8);
            }
            requests(&bytes);
        }
    }

    #[test]
    fn mutated_handshakes() {
        let mut seed = vec![0, 0, 0, 3];
        let option = |seed: &mut Vec<u8>, option: u32, data: &[u8]| {
            seed.extend_from_slice(b"IHAVEOPT");
            seed.extend_from_slice(&option.to_be_bytes());
            seed.extend_from_slice(&(data.len() as u32).to_be_bytes());
            seed.extend_from_slice(data);
        };
        option(&mut seed, 8, &[]);
        option(&mut seed, 3, &[]);
        option(&mut seed, 10, b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation");
        option(&mut seed, 6, b"\0\0\0\x04disk\0\x02\0\x03\0\x01");
        option(&mut seed, 11, &[]);
        option(&mut seed, 7, b"\0\0\0\x04disk\0\0");
        let mut random = Random(42);
        connection(&seed);
        for _ in 0..5000 {
            let mut bytes = seed.clone();
            for _ in 0..=random.below(4) {
                let at = random.below(bytes.len() as u64) as usize;
                match random.below(3) {
                    0 => bytes[at] = random.next() as u8,
                    1 => bytes.truncate(at),
                    _ => bytes.insert(at, random.next() as u8),
                }
                if bytes.is_empty() {
                    break;
                }
            }
            connection(&bytes);
        }
    }
}
