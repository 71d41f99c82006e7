//! Pictures of where a disk was changed: a chart for the terminal, and a PNG file.
//!
//! Both divide the disk into cells of equal size and show of each how much was changed, and how. The chart is in rows
//! with their offsets, so that a place can be read off. The file follows a Hilbert curve, where what is near on the
//! disk is near in the picture: a gigabyte that was rewritten in a terabyte is a spot rather than a line one pixel
//! high, and scattered writes are seen at once as such.

mod cells;
pub(crate) mod chart;
mod hilbert;
pub(crate) mod png_file;

use api::KindOfChange;
use disk::ByteRange;

/// How bytes were changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChangeKind {
    /// They may hold anything.
    Data,
    /// They were written with zeroes.
    Zero,
    /// They were given back.
    Discarded,
}

impl ChangeKind {
    const ALL: [Self; 3] = [Self::Data, Self::Zero, Self::Discarded];

    /// The same as the engine has it.
    pub(crate) const fn of(kind: KindOfChange) -> Self {
        match kind {
            KindOfChange::Data => Self::Data,
            KindOfChange::Zero => Self::Zero,
            KindOfChange::Discarded => Self::Discarded,
        }
    }

    /// The word in legends.
    const fn word(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Zero => "zero",
            Self::Discarded => "discarded",
        }
    }
}

/// A run of changed bytes. Runs are given by offset, and do not overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) range: ByteRange,
    pub(crate) kind: ChangeKind,
}

#[cfg(test)]
fn changes(runs: &[(u64, u64, ChangeKind)]) -> Vec<Change> {
    runs.iter().map(|&(start, len, kind)| Change { range: ByteRange::new(start, len), kind }).collect()
}
