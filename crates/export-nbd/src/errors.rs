//! The one place where the data path's errors become the protocol's (proto.md, "Error values").

use disk::{DiskError, ErrorKind, Operation};

/// The protocol's error values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub(crate) enum WireError {
    /// `NBD_EPERM`
    NotPermitted = 1,
    /// `NBD_EIO`
    Io = 5,
    /// `NBD_ENOMEM`
    NoMemory = 12,
    /// `NBD_EINVAL`
    Invalid = 22,
    /// `NBD_ENOSPC`
    NoSpace = 28,
    /// `NBD_EOVERFLOW`
    Overflow = 75,
    /// `NBD_ENOTSUP`
    NotSupported = 95,
    /// `NBD_ESHUTDOWN`
    Shutdown = 108,
}

/// What is told to the client. The text says no names of files or hosts: the client may be a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) error: WireError,
    /// At most [`Refusal::MAX_TEXT`] bytes.
    pub(crate) text: &'static str,
}

impl Refusal {
    /// Longest text in bytes, so that error replies need no allocation.
    pub(crate) const MAX_TEXT: usize = 72;

    pub(crate) const fn new(error: WireError, text: &'static str) -> Self {
        assert!(text.len() <= Self::MAX_TEXT);
        Self { error, text }
    }
}

impl From<&DiskError> for Refusal {
    fn from(error: &DiskError) -> Self {
        refuse(error.kind(), error.operation())
    }
}

/// Maps a kind. `NBD_ENOTSUP` is for fast zeroing alone and `NBD_EOVERFLOW` for lengths alone, as the
/// specification asks; a write beyond the end is `NBD_ENOSPC`, everything else beyond it `NBD_EINVAL`.
fn refuse(kind: ErrorKind, operation: Operation) -> Refusal {
    let writes = matches!(operation, Operation::Write | Operation::WriteZeroes);
    match kind {
        ErrorKind::OutOfRange if writes => Refusal::new(WireError::NoSpace, "write beyond the end of the export"),
        ErrorKind::OutOfRange => Refusal::new(WireError::Invalid, "range beyond the end of the export"),
        ErrorKind::ReadOnly => Refusal::new(WireError::NotPermitted, "export is read-only"),
        ErrorKind::NoSpace => Refusal::new(WireError::NoSpace, "no space left on the server"),
        ErrorKind::Io => Refusal::new(WireError::Io, "input/output error on the server"),
        ErrorKind::Corrupt => Refusal::new(WireError::Io, "image is corrupt"),
        ErrorKind::Unsupported => Refusal::new(WireError::Invalid, "not supported by this export"),
        ErrorKind::Invalid => Refusal::new(WireError::Invalid, "invalid request"),
        ErrorKind::Poisoned => Refusal::new(WireError::Io, "export stopped after an earlier failed write"),
        ErrorKind::InUse => Refusal::new(WireError::NotPermitted, "image is in use by another process"),
        ErrorKind::Closed => Refusal::new(WireError::Shutdown, "export is being closed"),
        ErrorKind::NotFast => Refusal::new(WireError::NotSupported, "range cannot be zeroed fast"),
        ErrorKind::NoMemory => Refusal::new(WireError::NoMemory, "server's memory bound reached"),
        ErrorKind::NotFound => Refusal::new(WireError::Io, "part of the image not found"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_error() {
        let expected = |kind| match kind {
            ErrorKind::OutOfRange | ErrorKind::Unsupported | ErrorKind::Invalid => 22,
            ErrorKind::ReadOnly | ErrorKind::InUse => 1,
            ErrorKind::NoSpace => 28,
            ErrorKind::Io | ErrorKind::Corrupt | ErrorKind::Poisoned | ErrorKind::NotFound => 5,
            ErrorKind::Closed => 108,
            ErrorKind::NotFast => 95,
            ErrorKind::NoMemory => 12,
        };
        for kind in ErrorKind::ALL {
            let refusal = Refusal::from(&DiskError::new(kind, Operation::Read));
            assert_eq!(refusal.error as u32, expected(kind), "{kind:?}");
            assert!(!refusal.text.is_empty());
        }
    }

    #[test]
    fn writes_beyond_the_end_are_out_of_space() {
        for operation in [Operation::Write, Operation::WriteZeroes] {
            assert_eq!(refuse(ErrorKind::OutOfRange, operation).error, WireError::NoSpace);
        }
        for operation in [Operation::Discard, Operation::Map, Operation::Read] {
            assert_eq!(refuse(ErrorKind::OutOfRange, operation).error, WireError::Invalid);
        }
    }

    #[test]
    fn not_supported_is_for_fast_zeroing_alone() {
        for kind in ErrorKind::ALL {
            let is = refuse(kind, Operation::WriteZeroes).error == WireError::NotSupported;
            assert_eq!(is, kind == ErrorKind::NotFast, "{kind:?}");
        }
    }
}
