//! What a repository needs of the place in which its objects are.

use std::fmt;
use std::ops::Range;

/// A place for objects: named, whole, immutable but for a few. Calls block.
///
/// For authors: made so that a directory and S3 both fit. No rename, no append, no partial write. What is relied upon:
///
/// - `read`, `read_all` and `look` see every `put` that has returned (S3 promises it).
/// - `list` may be late: an object put or deleted in the last moments may be missing, or still be there; one that is replaced stays listed. The bound on how late is the
///   grace of `prune` (a day unless chosen).
/// - A put that returned is durable. One that failed may have happened, or may still.
/// - `put_new` succeeds for one caller of several with the same name.
///
/// Names are made of lower-case letters, digits, `-`, `.` and `/`, at most 100 bytes, no part of them empty or beginning with `.`
/// ([`check_name`]).
pub trait Store: Send + Sync {
    /// The bytes of `range`, or fewer where the object ends before.
    fn read(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, StoreError>;
    /// The whole object, refused with `TooLarge` above `limit` bytes.
    fn read_all(&self, name: &str, limit: u64) -> Result<Vec<u8>, StoreError>;
    /// Length and time of an object.
    fn look(&self, name: &str) -> Result<Object, StoreError>;
    /// Makes an object that must not exist (on S3: `If-None-Match: *`); `Exists` if it does.
    fn put_new(&self, name: &str, content: &[u8]) -> Result<(), StoreError>;
    /// Makes an object, or replaces it whole.
    fn put(&self, name: &str, content: &[u8]) -> Result<(), StoreError>;
    /// Calls `each` with every object whose name begins with `prefix` (which is empty or ends with `/`), in any order.
    fn list(&self, prefix: &str, each: &mut dyn FnMut(Object)) -> Result<(), StoreError>;
    /// Removes an object; one that is not there is removed already.
    fn delete(&self, name: &str) -> Result<(), StoreError>;
    /// Forbids everybody to remove the object before `until_ms` (since 1970); `Unsupported` where the store has no such thing.
    fn retain(&self, name: &str, until_ms: u64) -> Result<(), StoreError>;
}

/// What a store tells about an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Its whole name.
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
    /// When it was put, by the store's clock, in milliseconds since 1970. Used for heuristics and display alone.
    pub put_ms: u64,
}

/// What kind of failure, for control flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// No such object.
    Missing,
    /// `put_new` of an object that is there.
    Exists,
    /// Larger than the caller allows.
    TooLarge,
    /// The store has no such operation.
    Unsupported,
    /// Anything else.
    Other,
}

/// A call that failed.
#[derive(Debug, Clone)]
pub struct StoreError {
    /// For control flow.
    pub kind: StoreErrorKind,
    /// For people: what was found.
    pub message: String,
}

impl StoreError {
    /// An error of this kind, with what is told to people.
    pub fn new(kind: StoreErrorKind, message: impl Into<String>) -> StoreError {
        StoreError { kind, message: message.into() }
    }
}

impl std::error::Error for StoreError {}

impl fmt::Display for StoreError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.message)
    }
}

/// Whether a name is one that every store can keep, and that leads nowhere else.
#[must_use]
pub fn check_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 100
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'/'))
        && name.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_lead_nowhere_else() {
        for good in ["config", "packs/ab/abcd", "points/0-1"] {
            assert!(super::check_name(good), "{good}");
        }
        for bad in ["", "/etc", "a//b", "a/../b", ".", "a/.b", "a/", "A", "a\0", "a\\b"] {
            assert!(!super::check_name(bad), "{bad}");
        }
    }
}
