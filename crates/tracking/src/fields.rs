//! Numbers and texts as fields of a block.

use crate::layout::BLOCK;

/// Appends fields.
#[derive(Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn u8(&mut self, v: u8) {
        self.0.push(v);
    }
    pub(crate) fn u16(&mut self, v: u16) {
        self.0.extend(v.to_le_bytes());
    }
    pub(crate) fn u32(&mut self, v: u32) {
        self.0.extend(v.to_le_bytes());
    }
    pub(crate) fn u64(&mut self, v: u64) {
        self.0.extend(v.to_le_bytes());
    }
    pub(crate) fn bytes(&mut self, v: &[u8]) {
        self.0.extend(v);
    }
    /// A text behind its length in two bytes; cut at 65,535 bytes.
    pub(crate) fn text(&mut self, v: &str) {
        let bytes = &v.as_bytes()[..v.len().min(usize::from(u16::MAX))];
        self.u16(bytes.len() as u16);
        self.bytes(bytes);
    }
}

/// Takes fields off the front; `None` when there are too few bytes.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }
    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }
    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }
    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }
    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
    pub(crate) fn text(&mut self) -> Option<String> {
        let n = self.u16()?;
        Some(String::from_utf8_lossy(self.bytes(n.into())?).into_owned())
    }
    /// A text for people, without what would move their terminal's cursor.
    pub(crate) fn printable(&mut self) -> Option<String> {
        Some(self.text()?.replace(char::is_control, "\u{fffd}"))
    }
}

/// A block with its checksum in the four bytes at `at`: CRC-32C of the block with these bytes zero.
pub(crate) fn seal(block: &mut [u8], at: usize) {
    block[at..at + 4].fill(0);
    let sum = crc32c::crc32c(block);
    block[at..at + 4].copy_from_slice(&sum.to_le_bytes());
}

/// Whether the checksum is right.
pub(crate) fn is_sealed(block: &[u8], at: usize) -> bool {
    let (before, rest) = block.split_at(at);
    let Some((sum, after)) = rest.split_first_chunk::<4>() else { return false };
    let found = crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]), after);
    u32::from_le_bytes(*sum) == found
}

/// Where the checksum of a small block is, behind its magic number.
const SUM_AT: usize = 4;

/// The beginning of a block of that kind; [`finish_block`] seals it.
pub(crate) fn begin_block(magic: u32) -> Writer {
    let mut w = Writer(Vec::with_capacity(BLOCK as usize));
    w.u32(magic);
    w.u32(0);
    w
}

/// The block, filled up with zeroes and sealed.
pub(crate) fn finish_block(w: Writer) -> Vec<u8> {
    let mut block = w.0;
    block.resize(BLOCK as usize, 0);
    seal(&mut block, SUM_AT);
    block
}

/// What stands behind magic number and checksum, if these bytes are a block of that kind.
pub(crate) fn open_block(bytes: &[u8], magic: u32) -> Option<Reader<'_>> {
    if bytes.len() != BLOCK as usize || !is_sealed(bytes, SUM_AT) {
        return None;
    }
    let mut r = Reader(bytes);
    (r.u32()? == magic).then_some(())?;
    r.u32()?;
    Some(r)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seals() {
        let mut block = vec![7; 64];
        seal(&mut block, 8);
        assert!(is_sealed(&block, 8));
        for at in 0..64 {
            block[at] ^= 1;
            assert!(!is_sealed(&block, 8), "byte {at}");
            block[at] ^= 1;
        }
        assert!(!is_sealed(&[], 0));
        let mut w = begin_block(7);
        w.u16(5);
        let block = finish_block(w);
        assert_eq!(open_block(&block, 7).and_then(|mut r| r.u16()), Some(5));
        assert!(open_block(&block, 8).is_none() && open_block(&block[..64], 7).is_none());
    }
}
