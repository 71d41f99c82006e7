//! Judging requests: what a header asks for, how many bytes follow it, and what is wrong with it
//! (proto.md, "Request message", "Request types", "Size constraints").

use crate::context::MAX_SELECTED;
use crate::errors::{Refusal, WireError};
use crate::wire::{Cursor, MAX_PAYLOAD, ReplyStyle, RequestHeader, command, command_flag as flag};
use disk::ByteRange;

/// Longest payload that is received and dropped so that the connection survives; longer ones end it.
const MAX_DROPPED_PAYLOAD: u64 = 64 << 20;
/// Payload of a block status request that names all contexts a connection can have.
const MAX_STATUS_PAYLOAD: u64 = 8 + 4 * MAX_SELECTED as u64;

/// A valid request, but for its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// At most [`MAX_PAYLOAD`] bytes; may be empty.
    Read {
        range: ByteRange,
        /// One chunk, no holes (`NBD_CMD_FLAG_DF`).
        whole: bool,
    },
    /// The payload has the range's length; at most [`MAX_PAYLOAD`] bytes, may be empty.
    Write {
        range: ByteRange,
        fua: bool,
    },
    Flush,
    Trim {
        range: ByteRange,
        fua: bool,
    },
    Cache {
        range: ByteRange,
    },
    WriteZeroes {
        range: ByteRange,
        fua: bool,
        /// Space may be given back (no `NBD_CMD_FLAG_NO_HOLE`).
        unmap: bool,
        /// `NBD_CMD_FLAG_FAST_ZERO`
        fast_only: bool,
    },
    /// The range is not empty.
    BlockStatus {
        range: ByteRange,
        /// `NBD_CMD_FLAG_REQ_ONE`
        one: bool,
    },
    /// A block status request whose range and contexts are in its payload.
    BlockStatusPayload {
        offset: u64,
        one: bool,
    },
    /// The client goes.
    Disconnect,
}

/// What is known once a header was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Judged {
    /// Bytes that follow the header.
    pub(crate) payload: u64,
    /// What to do, or what to answer when the payload has been dropped.
    pub(crate) command: Result<Command, Refusal>,
}

/// The header makes it impossible to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fatal(pub(crate) &'static str);

/// What the session allows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) style: ReplyStyle,
    pub(crate) read_only: bool,
    /// Whether metadata contexts were selected.
    pub(crate) has_contexts: bool,
    /// The export's size now, in bytes.
    pub(crate) size: u64,
}

const fn invalid(text: &'static str) -> Refusal {
    Refusal::new(WireError::Invalid, text)
}

const NO_PAYLOAD: Refusal = invalid("command takes no payload");

/// Judges a header.
pub(crate) fn judge(header: &RequestHeader, rules: &Rules) -> Result<Judged, Fatal> {
    let extended = rules.style == ReplyStyle::Extended;
    let announced = header.flags & flag::PAYLOAD_LEN != 0;
    let payload = match (extended, announced) {
        (true, true) => header.length,
        // QEMU's client (10.0 at least) forgets the flag: its payload follows nevertheless, as the server of
        // QEMU takes it, and without a payload the request would make no sense.
        _ if header.command == command::WRITE => header.length,
        _ => 0,
    };
    // proto.md: with extended headers, disconnect above the maximum payload; otherwise longer payloads
    // are an error, but not yet an attack.
    if payload > if extended { u64::from(MAX_PAYLOAD) } else { MAX_DROPPED_PAYLOAD } {
        return Err(Fatal("payload is longer than the server takes"));
    }
    Ok(Judged { payload, command: command_of(header, rules) })
}

fn command_of(header: &RequestHeader, rules: &Rules) -> Result<Command, Refusal> {
    let payload_flag = header.flags & flag::PAYLOAD_LEN != 0;
    if payload_flag && rules.style != ReplyStyle::Extended {
        return Err(invalid("payload flag without extended headers"));
    }
    let allowed = match header.command {
        command::READ if rules.style.is_chunked() => flag::FUA | flag::DF,
        command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
        command::BLOCK_STATUS => flag::FUA | flag::REQ_ONE | flag::PAYLOAD_LEN,
        command::WRITE => flag::FUA | flag::PAYLOAD_LEN,
        command::READ | command::FLUSH | command::TRIM | command::CACHE => flag::FUA,
        command::DISC => return Ok(Command::Disconnect),
        _ => return Err(invalid("unknown command")),
    };
    if header.flags & !(allowed | flag::PAYLOAD_LEN) != 0 {
        return Err(invalid("flag does not apply to the command"));
    }
    if payload_flag && allowed & flag::PAYLOAD_LEN == 0 {
        return Err(NO_PAYLOAD);
    }
    let has = |bit| header.flags & bit != 0;
    let fua = has(flag::FUA);
    match header.command {
        command::READ => {
            let range = inside(header, rules, WireError::Invalid)?;
            if range.len() > u64::from(MAX_PAYLOAD) {
                let error = if rules.style.is_chunked() { WireError::Overflow } else { WireError::Invalid };
                return Err(Refusal::new(error, "read is longer than 32 MiB"));
            }
            Ok(Command::Read { range, whole: has(flag::DF) })
        }
        command::WRITE => {
            writable(rules)?;
            if header.length > u64::from(MAX_PAYLOAD) {
                return Err(invalid("write is longer than 32 MiB"));
            }
            Ok(Command::Write { range: inside(header, rules, WireError::NoSpace)?, fua })
        }
        command::FLUSH => match (header.offset, header.length) {
            (0, 0) => Ok(Command::Flush),
            _ => Err(invalid("flush with an offset or a length")),
        },
        command::TRIM => {
            writable(rules)?;
            Ok(Command::Trim { range: inside(header, rules, WireError::Invalid)?, fua })
        }
        command::CACHE => Ok(Command::Cache { range: inside(header, rules, WireError::Invalid)? }),
        command::WRITE_ZEROES => {
            writable(rules)?;
            let range = inside(header, rules, WireError::NoSpace)?;
            Ok(Command::WriteZeroes { range, fua, unmap: !has(flag::NO_HOLE), fast_only: has(flag::FAST_ZERO) })
        }
        _ => {
            let one = has(flag::REQ_ONE);
            if !rules.has_contexts {
                return Err(invalid("no metadata context was selected"));
            }
            if payload_flag {
                return match header.length {
                    12..=MAX_STATUS_PAYLOAD if header.length.is_multiple_of(4) => {
                        Ok(Command::BlockStatusPayload { offset: header.offset, one })
                    }
                    _ => Err(invalid("payload of block status is malformed")),
                };
            }
            let range = inside(header, rules, WireError::Invalid)?;
            if range.is_empty() {
                return Err(invalid("block status of no bytes"));
            }
            Ok(Command::BlockStatus { range, one })
        }
    }
}

fn writable(rules: &Rules) -> Result<(), Refusal> {
    if rules.read_only {
        return Err(Refusal::new(WireError::NotPermitted, "export is read-only"));
    }
    Ok(())
}

fn inside(header: &RequestHeader, rules: &Rules, beyond: WireError) -> Result<ByteRange, Refusal> {
    match ByteRange::checked(header.offset, header.length) {
        Some(range) if range.end() <= rules.size => Ok(range),
        _ => Err(Refusal::new(beyond, "range beyond the end of the export")),
    }
}

/// A block status request that names its contexts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StatusPayload {
    /// Not empty.
    pub(crate) range: ByteRange,
    /// Positions in the agreement's contexts, without repetition.
    pub(crate) contexts: Vec<u32>,
}

impl StatusPayload {
    /// Reads the payload of [`Command::BlockStatusPayload`], where `contexts` is how many were selected.
    pub(crate) fn parse(bytes: &[u8], offset: u64, rules: &Rules, contexts: usize) -> Result<Self, Refusal> {
        let mut cursor = Cursor(bytes);
        let length = cursor.u64().ok_or(NO_PAYLOAD)?;
        let mut ids = Vec::with_capacity(cursor.0.len() / 4);
        while let Some(id) = cursor.u32() {
            if ids.contains(&id) || u64::from(id) >= contexts as u64 {
                return Err(invalid("unknown or repeated metadata context"));
            }
            ids.push(id);
        }
        match ByteRange::checked(offset, length) {
            Some(range) if range.end() <= rules.size && !range.is_empty() => Ok(Self { range, contexts: ids }),
            _ => Err(invalid("range beyond the end of the export")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { style: ReplyStyle::Structured, read_only: false, has_contexts: true, size: 64 << 20 };

    fn header(command: u16, flags: u16, offset: u64, length: u64) -> RequestHeader {
        RequestHeader { flags, command, cookie: 7, offset, length }
    }

    fn error(header: RequestHeader, rules: Rules) -> WireError {
        judge(&header, &rules).unwrap().command.unwrap_err().error
    }

    #[test]
    fn every_command_rejects_flags_that_are_not_its_own() {
        use command::*;
        let own = [
            (READ, flag::FUA | flag::DF),
            (WRITE, flag::FUA),
            (FLUSH, flag::FUA),
            (TRIM, flag::FUA),
            (CACHE, flag::FUA),
            (WRITE_ZEROES, flag::FUA | flag::NO_HOLE | flag::FAST_ZERO),
            (BLOCK_STATUS, flag::FUA | flag::REQ_ONE),
        ];
        for (command, own) in own {
            let length = if command == FLUSH { 0 } else { 512 };
            for bit in 0..16 {
                let judged = judge(&header(command, 1 << bit, 0, length), &RULES).unwrap();
                let expected_ok = own & (1 << bit) != 0;
                assert_eq!(judged.command.is_ok(), expected_ok, "command {command}, bit {bit}");
                assert_eq!(judged.payload, if command == WRITE { 512 } else { 0 });
                if !expected_ok {
                    assert_eq!(judged.command.unwrap_err().error, WireError::Invalid);
                }
            }
        }
        assert_eq!(
            error(header(READ, flag::DF, 0, 1), Rules { style: ReplyStyle::Simple, ..RULES }),
            WireError::Invalid
        );
        assert_eq!(error(header(8, 0, 0, 0), RULES), WireError::Invalid);
        assert_eq!(error(header(0xffff, 0, 0, 0), RULES), WireError::Invalid);
    }

    #[test]
    fn beyond_the_end() {
        let end = RULES.size;
        for (command, expected) in [
            (command::READ, WireError::Invalid),
            (command::WRITE, WireError::NoSpace),
            (command::TRIM, WireError::Invalid),
            (command::CACHE, WireError::Invalid),
            (command::WRITE_ZEROES, WireError::NoSpace),
            (command::BLOCK_STATUS, WireError::Invalid),
        ] {
            assert_eq!(error(header(command, 0, end - 1, 2), RULES), expected);
            assert_eq!(error(header(command, 0, u64::MAX, 2), RULES), expected);
            assert!(judge(&header(command, 0, end - 1, 1), &RULES).unwrap().command.is_ok());
        }
    }

    #[test]
    fn read_only_exports_refuse_writes() {
        let rules = Rules { read_only: true, ..RULES };
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(error(header(command, 0, 0, 512), rules), WireError::NotPermitted);
        }
        assert_eq!(judge(&header(command::FLUSH, 0, 0, 0), &rules).unwrap().command, Ok(Command::Flush));
        assert_eq!(judge(&header(command::WRITE, 0, 0, 512), &rules).unwrap().payload, 512, "is dropped");
    }

    #[test]
    fn payload_lengths() {
        let write = |length| judge(&header(command::WRITE, 0, 0, length), &RULES);
        assert!(write(32 << 20).unwrap().command.is_ok());
        let long = write((32 << 20) + 1).unwrap();
        assert_eq!((long.payload, long.command.unwrap_err().error), ((32 << 20) + 1, WireError::Invalid));
        assert!(write((64 << 20) + 1).is_err());

        let rules = Rules { style: ReplyStyle::Extended, ..RULES };
        let extended = |flags, length| judge(&header(command::WRITE, flags, 0, length), &rules);
        assert!(extended(flag::PAYLOAD_LEN, 512).unwrap().command.is_ok());
        assert!(extended(flag::PAYLOAD_LEN, (32 << 20) + 1).is_err());
        assert!(extended(flag::PAYLOAD_LEN, u64::MAX).is_err());
        let bare = extended(0, 512).unwrap();
        assert_eq!((bare.payload, bare.command.is_ok()), (512, true), "as QEMU's client sends it");
        assert!(extended(0, (32 << 20) + 1).is_err());
        let read = judge(&header(command::READ, flag::PAYLOAD_LEN, 0, 512), &rules).unwrap();
        assert_eq!((read.payload, read.command), (512, Err(NO_PAYLOAD)), "drained, then refused");
        assert_eq!(error(header(command::WRITE, flag::PAYLOAD_LEN, 0, 512), RULES), WireError::Invalid);
    }

    #[test]
    fn long_reads() {
        let long = header(command::READ, 0, 0, (32 << 20) + 1);
        assert_eq!(error(long, RULES), WireError::Overflow);
        assert_eq!(error(long, Rules { style: ReplyStyle::Simple, ..RULES }), WireError::Invalid);
    }

    #[test]
    fn block_status_needs_a_context_and_bytes() {
        let ask = header(command::BLOCK_STATUS, 0, 0, 512);
        assert_eq!(error(ask, Rules { has_contexts: false, ..RULES }), WireError::Invalid);
        assert_eq!(error(header(command::BLOCK_STATUS, 0, 0, 0), RULES), WireError::Invalid);
    }

    #[test]
    fn flush_has_no_range() {
        assert_eq!(error(header(command::FLUSH, 0, 1, 0), RULES), WireError::Invalid);
        assert_eq!(error(header(command::FLUSH, 0, 0, 1), RULES), WireError::Invalid);
    }

    #[test]
    fn status_payload() {
        let rules = Rules { style: ReplyStyle::Extended, ..RULES };
        let mut bytes = 4096u64.to_be_bytes().to_vec();
        bytes.extend_from_slice(&1u32.to_be_bytes());
        let parse = |bytes: &[u8]| StatusPayload::parse(bytes, 512, &rules, 2);
        assert_eq!(parse(&bytes), Ok(StatusPayload { range: ByteRange::new(512, 4096), contexts: vec![1] }));
        let mut twice = bytes.clone();
        twice.extend_from_slice(&1u32.to_be_bytes());
        assert!(parse(&twice).is_err());
        assert!(StatusPayload::parse(&bytes, 512, &rules, 1).is_err(), "unknown context");
        assert!(StatusPayload::parse(&bytes, rules.size, &rules, 2).is_err());
        let ask = |length| judge(&header(command::BLOCK_STATUS, flag::PAYLOAD_LEN, 512, length), &rules).unwrap();
        assert!(ask(12).command.is_ok());
        for length in [0, 8, 13, MAX_STATUS_PAYLOAD + 4] {
            assert!(ask(length).command.is_err(), "{length}");
            assert_eq!(ask(length).payload, length);
        }
    }
}
