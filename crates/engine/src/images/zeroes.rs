//! Finding zeroes in data.

use disk::{Buf, ByteRange};

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // In pieces that the compiler turns into wide instructions, with a way out after each.
    let pieces = bytes.chunks_exact(256);
    let rest = pieces.remainder();
    pieces.into_iter().all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|b| *b == 0)
}

/// A part of a buffer: its place, and its bytes unless all are zero.
pub(crate) type Run = (ByteRange, Option<Buf>);

/// Cuts a buffer that belongs to `offset` into runs of data and of zeroes, without copies. Cuts lie on
/// multiples of `block` (a power of two).
pub(crate) fn split(offset: u64, mut buf: Buf, block: u64) -> Vec<Run> {
    let whole = ByteRange::new(offset, buf.len() as u64);
    let mut ends: Vec<(u64, bool)> = Vec::new();
    let mut at = whole.offset();
    while at < whole.end() {
        let end = (at | (block - 1)).saturating_add(1).min(whole.end());
        let zero = is_zero(&buf[(at - offset) as usize..(end - offset) as usize]);
        match ends.last_mut() {
            Some(last) if last.1 == zero => last.0 = end,
            _ => ends.push((end, zero)),
        }
        at = end;
    }
    let mut from = whole.offset();
    ends.into_iter()
        .map(|(end, zero)| {
            let range = ByteRange::between(from, end);
            let piece = buf.split_to(range.len() as usize);
            from = end;
            (range, (!zero).then_some(piece))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs() {
        let mut buf = Buf::zeroed(10_000);
        buf[4_500] = 1;
        buf[9_999] = 1;
        // The buffer begins 100 bytes before a block's end.
        let runs = split(4096 - 100, buf, 4096);
        let seen: Vec<_> = runs.iter().map(|(r, b)| (r.offset(), r.len(), b.is_some())).collect();
        // Byte 4,500 lies at 8,496 in the disk, byte 9,999 at 13,995.
        assert_eq!(seen, [(3996, 4196, false), (8192, 5804, true)]);
        assert!(runs.iter().all(|(r, b)| b.as_ref().is_none_or(|b| b.len() as u64 == r.len())));
    }

    #[test]
    fn one_byte_anywhere_counts() {
        for len in [1, 255, 256, 257, 5000] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in [0, len / 2, len - 1] {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
        assert!(split(0, Buf::zeroed(70_000), 4096).iter().all(|(_, b)| b.is_none()));
    }
}
