//! The one error of the data path.

use crate::ByteRange;
use std::error::Error as StdError;
use std::fmt;
use std::io;

/// Shorthand for the data path's results.
pub type Result<T> = std::result::Result<T, DiskError>;

/// What went wrong, as far as control flow needs to know. Each protocol maps these to its wire codes in
/// one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The range reaches beyond the end, or arithmetic on it would overflow.
    OutOfRange,
    /// A write to something opened for reading only.
    ReadOnly,
    /// The storage, a quota, or a bound on growth is exhausted.
    NoSpace,
    /// The operating system reported a failure.
    Io,
    /// The image contradicts its format. The layer refuses to write from now on.
    Corrupt,
    /// A feature that this implementation, format or storage does not have.
    Unsupported,
    /// A request that no correct caller makes (length, alignment, flags).
    Invalid,
    /// An earlier failed metadata write or sync left the state on disk unknown; reopen to recover.
    Poisoned,
    /// Somebody else holds the image.
    InUse,
    /// The disk is being closed.
    Closed,
    /// A zeroing that may only be done fast could not be.
    NotFast,
    /// A bound on memory was met.
    NoMemory,
    /// The named thing does not exist.
    NotFound,
}

impl ErrorKind {
    /// All kinds, for the tests that each protocol's mapping owes.
    pub const ALL: [Self; 13] = [
        Self::OutOfRange,
        Self::ReadOnly,
        Self::NoSpace,
        Self::Io,
        Self::Corrupt,
        Self::Unsupported,
        Self::Invalid,
        Self::Poisoned,
        Self::InUse,
        Self::Closed,
        Self::NotFast,
        Self::NoMemory,
        Self::NotFound,
    ];

    const fn words(self) -> &'static str {
        match self {
            Self::OutOfRange => "beyond the end",
            Self::ReadOnly => "read-only",
            Self::NoSpace => "no space left",
            Self::Io => "input/output error",
            Self::Corrupt => "image is corrupt",
            Self::Unsupported => "not supported",
            Self::Invalid => "invalid request",
            Self::Poisoned => "stopped after an earlier failed metadata write or sync; reopen to recover",
            Self::InUse => "in use by another process",
            Self::Closed => "closed",
            Self::NotFast => "cannot be done fast",
            Self::NoMemory => "memory bound reached",
            Self::NotFound => "not found",
        }
    }
}

/// What was being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Opening or reading metadata at open.
    Open,
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Writing zeroes.
    WriteZeroes,
    /// Discarding.
    Discard,
    /// Making earlier writes durable.
    Flush,
    /// Asking where bytes are.
    Map,
    /// Changing the size.
    Resize,
    /// Making a new image.
    Create,
    /// Checking or repairing.
    Check,
    /// Closing.
    Close,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteZeroes => "write zeroes",
            Self::Discard => "discard",
            Self::Flush => "flush",
            Self::Map => "map",
            Self::Resize => "resize",
            Self::Create => "create",
            Self::Check => "check",
            Self::Close => "close",
        })
    }
}

struct Inner {
    kind: ErrorKind,
    operation: Operation,
    range: Option<ByteRange>,
    object: Option<Box<str>>,
    detail: Option<Box<str>>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// A failed operation of the data path: a small kind for control flow; operation, object, range and
/// source for people. One pointer wide, so that `Result`s stay small.
pub struct DiskError(Box<Inner>);

impl DiskError {
    /// An error of this kind, met during this operation.
    pub fn new(kind: ErrorKind, operation: Operation) -> Self {
        Self(Box::new(Inner { kind, operation, range: None, object: None, detail: None, source: None }))
    }

    /// Says where.
    #[must_use]
    pub fn at(mut self, range: ByteRange) -> Self {
        self.0.range = Some(range);
        self
    }

    /// Names the object (a file, a disk); the innermost name is kept.
    #[must_use]
    pub fn on(mut self, object: impl Into<String>) -> Self {
        self.0.object.get_or_insert_with(|| object.into().into_boxed_str());
        self
    }

    /// Says what was expected, what was found, and the next step. Lower case, no full stop.
    #[must_use]
    pub fn because(mut self, detail: impl Into<String>) -> Self {
        self.0.detail = Some(detail.into().into_boxed_str());
        self
    }

    /// Attaches the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.0.source = Some(Box::new(source));
        self
    }

    /// From the operating system's error; full disks and quotas become [`ErrorKind::NoSpace`].
    pub fn from_io(error: io::Error, operation: Operation) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                ErrorKind::NoSpace
            }
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            io::ErrorKind::OutOfMemory => ErrorKind::NoMemory,
            _ => ErrorKind::Io,
        };
        Self::new(kind, operation).caused_by(error)
    }

    /// For control flow.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was being done.
    pub fn operation(&self) -> Operation {
        self.0.operation
    }

    /// Where, if that is known.
    pub fn range(&self) -> Option<ByteRange> {
        self.0.range
    }

    /// The object's name, if one was given.
    pub fn object(&self) -> Option<&str> {
        self.0.object.as_deref()
    }
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind, operation, range, object, detail, .. } = &*self.0;
        if let Some(object) = object {
            write!(f, "{object}: ")?;
        }
        write!(f, "{operation}")?;
        if let Some(range) = range {
            write!(f, " at {range}")?;
        }
        match detail {
            Some(detail) => write!(f, ": {detail}"),
            None => write!(f, ": {}", kind.words()),
        }
    }
}

impl fmt::Debug for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)?;
        match &self.0.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl StdError for DiskError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|s| s as &(dyn StdError + 'static))
    }
}
