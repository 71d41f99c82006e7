//! A disk in cells of equal size, and how much of each was changed.

use super::{Change, ChangeKind};
use disk::ByteRange;

/// What became of the bytes of one cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cell {
    /// Bytes of the disk in the cell; fewer in the last one, none beyond the disk's end.
    pub(super) len: u64,
    /// Bytes changed, by kind in the order of [`ChangeKind::ALL`]; together at most `len`.
    pub(super) changed: [u64; 3],
}

impl Cell {
    pub(super) fn changed_bytes(&self) -> u64 {
        self.changed.iter().sum()
    }

    /// The changed part of the cell in `parts`, rounded up: 0 means that nothing was changed.
    pub(super) fn share(&self, parts: u32) -> u32 {
        if self.len == 0 {
            return 0;
        }
        let share = (u128::from(self.changed_bytes()) * u128::from(parts)).div_ceil(u128::from(self.len));
        u32::try_from(share).unwrap_or(parts).min(parts)
    }

    /// The kind that most of the changed bytes have; the first of equals.
    pub(super) fn main_kind(&self) -> Option<ChangeKind> {
        let most = self.changed.iter().copied().max().filter(|most| *most > 0)?;
        ChangeKind::ALL.into_iter().zip(self.changed).find(|(_, bytes)| *bytes == most).map(|(kind, _)| kind)
    }
}

/// The first `count` cells of `cell` bytes (at least 1) of a disk of `size` bytes. What runs say beyond the disk's end
/// does not count.
pub(super) fn divide(size: u64, cell: u64, count: usize, changes: &[Change]) -> Vec<Cell> {
    let range_of = |n: usize| {
        let start = cell.saturating_mul(n as u64).min(size);
        ByteRange::between(start, start.saturating_add(cell).min(size))
    };
    let mut cells: Vec<Cell> = (0..count).map(|n| Cell { len: range_of(n).len(), ..Cell::default() }).collect();
    for change in changes {
        let Ok(first) = usize::try_from(change.range.offset() / cell) else { continue };
        for (n, cell) in cells.iter_mut().enumerate().skip(first) {
            let part = range_of(n).intersect(change.range).len();
            if part == 0 {
                break;
            }
            cell.changed[change.kind as usize] += part;
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::ChangeKind::{Data, Discarded, Zero};
    use super::*;
    use crate::change_picture::changes;

    #[test]
    fn runs_are_shared_out() {
        let cells = divide(25, 10, 4, &changes(&[(2, 3, Data), (8, 10, Zero), (19, 1, Data), (22, 3, Discarded)]));
        let cell = |len, changed| Cell { len, changed };
        assert_eq!(cells, [cell(10, [3, 2, 0]), cell(10, [1, 8, 0]), cell(5, [0, 0, 3]), cell(0, [0; 3])]);
        assert_eq!(cells.iter().map(|cell| cell.share(4)).collect::<Vec<_>>(), [2, 4, 3, 0]);
        let kinds: Vec<Option<ChangeKind>> = cells.iter().map(Cell::main_kind).collect();
        assert_eq!(kinds, [Some(Data), Some(Zero), Some(Discarded), None]);
    }

    #[test]
    fn a_single_byte_shows() {
        let cells = divide(1 << 40, 1 << 30, 1024, &changes(&[((1 << 39) + 5, 1, Data)]));
        assert_eq!(cells.iter().position(|cell| cell.share(255) > 0), Some(512));
        assert_eq!(cells[512].share(255), 1);
    }

    #[test]
    fn the_largest_disk() {
        let size = i64::MAX as u64;
        let cells = divide(size, size.div_ceil(1 << 20), 1 << 20, &changes(&[(0, size, Zero)]));
        assert!(cells.iter().all(|cell| cell.share(255) == 255));
        assert_eq!(cells.iter().map(Cell::changed_bytes).sum::<u64>(), size);
    }
}
