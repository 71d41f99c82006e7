//! What can be wrong with a history.

use disk::DiskError;
use std::fmt;

/// A contradiction in the sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Neither superblock is valid.
    NoSuperblock,
    /// Written by a later version.
    Version {
        /// As found.
        found: u32,
    },
    /// A number in the superblock is out of its bounds.
    Superblock {
        /// Which.
        field: &'static str,
    },
    /// Both slots of an index block are invalid, or later than the superblock.
    Index {
        /// Of which group.
        group: u64,
    },
    /// An index block is an older one than the superblock speaks of.
    Generations,
    /// A block of the journal is gone that was durable.
    Journal {
        /// Which.
        sequence: u64,
    },
    /// A table page is not the one that its index speaks of.
    Page {
        /// Which.
        page: u64,
    },
    /// The list of points is not the one that the superblock speaks of.
    Points,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuperblock => write!(f, "no valid superblock"),
            Self::Version { found } => write!(f, "version {found} is not known here (expected 1)"),
            Self::Superblock { field } => write!(f, "the superblock's {field} is out of bounds"),
            Self::Index { group } => write!(f, "index block {group} is damaged"),
            Self::Generations => write!(f, "an index block is older than the superblock says"),
            Self::Journal { sequence } => write!(f, "journal block {sequence} is damaged"),
            Self::Page { page } => write!(f, "table page {page} is damaged"),
            Self::Points => write!(f, "the list of points is damaged"),
        }
    }
}

/// Why a history cannot do what it was asked for.
#[derive(Debug)]
pub enum HistoryError {
    /// Reading or writing the sidecar or the image failed.
    Disk(DiskError),
    /// The sidecar contradicts itself: the history is lost, the image's data is not.
    Damaged(Damage),
    /// No point bears that name.
    NoSuchPoint {
        /// The name.
        name: String,
    },
    /// A point bears that name already.
    PointExists {
        /// The name.
        name: String,
    },
    /// Not a name for a point.
    BadName {
        /// The name.
        name: String,
    },
    /// There is no room for another point.
    TooManyPoints,
    /// The point's history cannot be trusted.
    Refused {
        /// The point.
        name: String,
        /// Why, with what to do.
        reason: String,
    },
    /// The second point is older than the first.
    Order {
        /// The first.
        since: String,
        /// The second.
        until: String,
    },
    /// Tracking has stopped.
    Stopped {
        /// Why.
        reason: String,
    },
}

impl From<DiskError> for HistoryError {
    fn from(error: DiskError) -> Self {
        Self::Disk(error)
    }
}

impl fmt::Display for HistoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(error) => write!(f, "{error}"),
            Self::Damaged(damage) => write!(f, "the history is damaged: {damage}"),
            Self::NoSuchPoint { name } => write!(f, "there is no mark {name:?}"),
            Self::PointExists { name } => {
                write!(f, "there is a mark {name:?} already; delete it or choose another name")
            }
            Self::BadName { name } => write!(
                f,
                "{name:?} is no name for a mark: expected 1 to {} bytes without control characters",
                crate::MAX_NAME
            ),
            Self::TooManyPoints => write!(f, "there is no room for another mark; delete some"),
            Self::Refused { name, reason } => write!(f, "mark {name:?} cannot be trusted: {reason}"),
            Self::Order { since, until } => write!(f, "mark {until:?} is older than {since:?}; exchange them"),
            Self::Stopped { reason } => write!(f, "tracking has stopped: {reason}"),
        }
    }
}

impl std::error::Error for HistoryError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Disk(error) => std::error::Error::source(error),
            _ => None,
        }
    }
}
