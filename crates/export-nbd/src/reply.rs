//! Encoding replies (proto.md, "Simple reply message", "Structured reply chunk message", "Extended reply
//! chunk message").
//!
//! A reply is a row of [`Piece`]s: a small head that needs no allocation, and perhaps data that is sent
//! from the buffer it was read into.

use crate::errors::Refusal;
use crate::wire::{
    EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, ReplyStyle, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk,
};
use disk::{Buf, ByteRange};

/// Longest head: an extended header with the payload of an error.
const HEAD: usize = 32 + 6 + Refusal::MAX_TEXT;

/// A head and the data behind it.
#[derive(Debug)]
pub(crate) struct Piece {
    head: [u8; HEAD],
    len: u8,
    /// Bytes behind the head, sent as they are.
    pub(crate) data: Option<Buf>,
}

impl Piece {
    fn new() -> Self {
        Self { head: [0; HEAD], len: 0, data: None }
    }

    pub(crate) fn head(&self) -> &[u8] {
        &self.head[..usize::from(self.len)]
    }

    fn put(mut self, bytes: &[u8]) -> Self {
        let start = usize::from(self.len);
        self.head[start..start + bytes.len()].copy_from_slice(bytes);
        self.len = u8::try_from(start + bytes.len()).expect("a head is short");
        self
    }

    fn data(mut self, data: Buf) -> Self {
        self.data = Some(data);
        self
    }
}

/// The request that is answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answered {
    pub(crate) style: ReplyStyle,
    pub(crate) cookie: u64,
    /// The request's offset, which extended replies repeat.
    pub(crate) offset: u64,
}

impl Answered {
    /// A chunk's header. `payload` counts the bytes that the caller puts behind it, data included.
    fn chunk(&self, flags: u16, kind: u16, payload: u64) -> Piece {
        match self.style {
            ReplyStyle::Extended => Piece::new()
                .put(&EXTENDED_REPLY_MAGIC.to_be_bytes())
                .put(&flags.to_be_bytes())
                .put(&kind.to_be_bytes())
                .put(&self.cookie.to_be_bytes())
                .put(&self.offset.to_be_bytes())
                .put(&payload.to_be_bytes()),
            ReplyStyle::Simple | ReplyStyle::Structured => Piece::new()
                .put(&STRUCTURED_REPLY_MAGIC.to_be_bytes())
                .put(&flags.to_be_bytes())
                .put(&kind.to_be_bytes())
                .put(&self.cookie.to_be_bytes())
                // Payloads are at most 32 MiB and a few numbers.
                .put(&u32::try_from(payload).expect("payload is bounded").to_be_bytes()),
        }
    }

    fn simple(&self, error: u32) -> Piece {
        Piece::new().put(&SIMPLE_REPLY_MAGIC.to_be_bytes()).put(&error.to_be_bytes()).put(&self.cookie.to_be_bytes())
    }

    /// Success without data.
    pub(crate) fn done(&self) -> Piece {
        match self.style {
            // 16 bytes instead of 20: clients that took structured replies take these too (but for reads,
            // which come here only as NBD_REPLY_TYPE_NONE of an empty read, see `empty_read`).
            ReplyStyle::Simple | ReplyStyle::Structured => self.simple(0),
            ReplyStyle::Extended => self.chunk(REPLY_FLAG_DONE, chunk::NONE, 0),
        }
    }

    /// Failure of any request.
    pub(crate) fn refused(&self, refusal: Refusal) -> Piece {
        if !self.style.is_chunked() {
            return self.simple(refusal.error as u32);
        }
        let text = refusal.text.as_bytes();
        let len = u16::try_from(text.len()).expect("bounded by Refusal::new");
        self.chunk(REPLY_FLAG_DONE, chunk::ERROR, 6 + u64::from(len))
            .put(&(refusal.error as u32).to_be_bytes())
            .put(&len.to_be_bytes())
            .put(text)
    }

    /// A read's bytes from `offset`; `last` when nothing follows.
    pub(crate) fn data(&self, offset: u64, data: Buf, last: bool) -> Piece {
        if !self.style.is_chunked() {
            return self.simple(0).data(data);
        }
        let flags = if last { REPLY_FLAG_DONE } else { 0 };
        self.chunk(flags, chunk::OFFSET_DATA, 8 + data.len() as u64).put(&offset.to_be_bytes()).data(data)
    }

    /// The success of a read of no bytes.
    pub(crate) fn empty_read(&self) -> Piece {
        match self.style {
            ReplyStyle::Simple => self.simple(0),
            ReplyStyle::Structured | ReplyStyle::Extended => self.chunk(REPLY_FLAG_DONE, chunk::NONE, 0),
        }
    }

    /// Zeroes within a read, in chunked styles only. The range is at most 32 MiB.
    pub(crate) fn hole(&self, range: ByteRange, last: bool) -> Piece {
        debug_assert!(self.style.is_chunked());
        let flags = if last { REPLY_FLAG_DONE } else { 0 };
        let len = u32::try_from(range.len()).expect("inside a read");
        self.chunk(flags, chunk::OFFSET_HOLE, 12).put(&range.offset().to_be_bytes()).put(&len.to_be_bytes())
    }

    /// One context's descriptors, in chunked styles only; `last` when no context follows.
    pub(crate) fn status(&self, context: u32, descriptors: &Descriptors, last: bool) -> Piece {
        debug_assert!(self.style.is_chunked());
        let flags = if last { REPLY_FLAG_DONE } else { 0 };
        let data = Buf::copy_of(&descriptors.bytes);
        match self.style {
            ReplyStyle::Extended => {
                let count = u32::try_from(descriptors.count).expect("bounded number of descriptors");
                self.chunk(flags, chunk::BLOCK_STATUS_EXT, 8 + data.len() as u64)
                    .put(&context.to_be_bytes())
                    .put(&count.to_be_bytes())
                    .data(data)
            }
            _ => self.chunk(flags, chunk::BLOCK_STATUS, 4 + data.len() as u64).put(&context.to_be_bytes()).data(data),
        }
    }
}

/// Block status descriptors of one context, encoded.
#[derive(Debug)]
pub(crate) struct Descriptors {
    extended: bool,
    bytes: Vec<u8>,
    count: usize,
}

impl Descriptors {
    pub(crate) fn new(style: ReplyStyle) -> Self {
        Self { extended: style == ReplyStyle::Extended, bytes: Vec::new(), count: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Appends a run. In the compact form its length is inside a request's, which has 32 bits.
    pub(crate) fn push(&mut self, len: u64, status: u32) {
        self.count += 1;
        if self.extended {
            self.bytes.extend_from_slice(&len.to_be_bytes());
            self.bytes.extend_from_slice(&u64::from(status).to_be_bytes());
        } else {
            let len = u32::try_from(len).expect("inside a compact request");
            self.bytes.extend_from_slice(&len.to_be_bytes());
            self.bytes.extend_from_slice(&status.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::WireError;

    fn answered(style: ReplyStyle) -> Answered {
        Answered { style, cookie: 0x0102_0304_0506_0708, offset: 0x1000 }
    }

    fn bytes(piece: &Piece) -> Vec<u8> {
        let mut all = piece.head().to_vec();
        all.extend_from_slice(piece.data.as_deref().unwrap_or(&[]));
        all
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    }

    #[test]
    fn simple() {
        let a = answered(ReplyStyle::Simple);
        assert_eq!(bytes(&a.done()), hex("67446698 00000000 0102030405060708"));
        let refusal = Refusal::new(WireError::NoSpace, "full");
        assert_eq!(bytes(&a.refused(refusal)), hex("67446698 0000001c 0102030405060708"));
        let data = a.data(0x1000, Buf::copy_of(b"ab"), true);
        assert_eq!(bytes(&data), hex("67446698 00000000 0102030405060708 6162"));
    }

    #[test]
    fn structured() {
        let a = answered(ReplyStyle::Structured);
        let refusal = Refusal::new(WireError::NotSupported, "ab");
        assert_eq!(bytes(&a.refused(refusal)), hex("668e33ef 0001 8001 0102030405060708 00000008 0000005f 0002 6162"));
        let data = a.data(0x2000, Buf::copy_of(b"ab"), false);
        assert_eq!(bytes(&data), hex("668e33ef 0000 0001 0102030405060708 0000000a 0000000000002000 6162"));
        let hole = a.hole(ByteRange::new(0x2000, 0x100), true);
        assert_eq!(bytes(&hole), hex("668e33ef 0001 0002 0102030405060708 0000000c 0000000000002000 00000100"));
        assert_eq!(bytes(&a.empty_read()), hex("668e33ef 0001 0000 0102030405060708 00000000"));
        let mut descriptors = Descriptors::new(ReplyStyle::Structured);
        descriptors.push(0x200, 3);
        descriptors.push(0x300, 0);
        assert_eq!(
            bytes(&a.status(1, &descriptors, true)),
            hex("668e33ef 0001 0005 0102030405060708 00000014 00000001 00000200 00000003 00000300 00000000")
        );
    }

    #[test]
    fn extended() {
        let a = answered(ReplyStyle::Extended);
        let begin = "0102030405060708 0000000000001000";
        assert_eq!(bytes(&a.done()), hex(&format!("6e8a278c 0001 0000 {begin} 0000000000000000")));
        let data = a.data(0x2000, Buf::copy_of(b"ab"), true);
        assert_eq!(bytes(&data), hex(&format!("6e8a278c 0001 0001 {begin} 000000000000000a 0000000000002000 6162")));
        let mut descriptors = Descriptors::new(ReplyStyle::Extended);
        descriptors.push(1 << 40, 3);
        assert_eq!(
            bytes(&a.status(0, &descriptors, false)),
            hex(&format!(
                "6e8a278c 0000 0006 {begin} 0000000000000018 00000000 00000001 0000010000000000 0000000000000003"
            ))
        );
    }

    #[test]
    fn the_longest_error_fits() {
        const TEXT: &str = "0123456789012345678901234567890123456789012345678901234567890123456789ab";
        let piece = answered(ReplyStyle::Extended).refused(Refusal::new(WireError::Io, TEXT));
        assert_eq!(piece.head().len(), HEAD);
    }
}
