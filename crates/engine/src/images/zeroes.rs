//! Finding zeroes in data.

use disk::ByteRange;

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // In pieces that the compiler turns into wide instructions, with a way out after each.
    let pieces = bytes.chunks_exact(256);
    let rest = pieces.remainder();
    pieces.into_iter().all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|b| *b == 0)
}

/// A part of a piece of a disk, and whether all its bytes are zero.
pub(crate) type Run = (ByteRange, bool);

/// Cuts bytes that belong to `offset` into runs of data and of zeroes. Cuts lie on multiples of `block` (a power of
/// two). A block of data is looked at up to its first byte that is not zero, so data cost next to nothing.
pub(crate) fn runs(offset: u64, bytes: &[u8], block: u64) -> Vec<Run> {
    let whole = ByteRange::new(offset, bytes.len() as u64);
    let mut runs: Vec<Run> = Vec::new();
    let mut at = whole.offset();
    while at < whole.end() {
        let end = (at | (block - 1)).saturating_add(1).min(whole.end());
        let zero = is_zero(&bytes[(at - offset) as usize..(end - offset) as usize]);
        match runs.last_mut() {
            Some((range, last)) if *last == zero => *range = ByteRange::between(range.offset(), end),
            _ => runs.push((ByteRange::between(at, end), zero)),
        }
        at = end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_at_blocks() {
        let mut bytes = vec![0; 10_000];
        bytes[4_500] = 1;
        bytes[9_999] = 1;
        // The bytes begin 100 bytes before a block's end.
        let seen: Vec<_> =
            runs(4096 - 100, &bytes, 4096).iter().map(|(r, zero)| (r.offset(), r.len(), *zero)).collect();
        // Byte 4,500 lies at 8,496 in the disk, byte 9,999 at 13,995.
        assert_eq!(seen, [(3996, 4196, true), (8192, 5804, false)]);
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
        assert_eq!(runs(0, &vec![0; 70_000], 4096), [(ByteRange::new(0, 70_000), true)]);
    }
}
