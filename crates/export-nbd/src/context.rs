//! Metadata contexts: what `NBD_CMD_BLOCK_STATUS` can tell about an export's ranges.

use crate::wire::allocation;
use disk::{ByteRange, DiskExtent, DiskHandle, LocalFuture, Result};
use std::sync::Arc;

/// A run of bytes with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    /// Bytes from the question's offset; at least 1, at most the question's length.
    pub len: u64,
    /// The context's flags or value.
    pub status: u32,
}

/// One metadata context of an export (proto.md, "Metadata querying").
///
/// Lives as long as a connection that selected it. Called on the disk's home thread alone; it is
/// `Send + Sync` because negotiation runs on any thread.
pub trait MetaContext: Send + Sync + 'static {
    /// The full name, `namespace:leaf`, at most 4096 bytes.
    fn name(&self) -> &str;

    /// The first run of `range` (not empty, inside the disk).
    fn status<'a>(&'a self, disk: &'a DiskHandle, range: ByteRange) -> LocalFuture<'a, Result<StatusRun>>;
}

/// `base:allocation`: holes and zeroes.
pub(crate) struct Allocation;

impl MetaContext for Allocation {
    fn name(&self) -> &str {
        "base:allocation"
    }

    fn status<'a>(&'a self, disk: &'a DiskHandle, range: ByteRange) -> LocalFuture<'a, Result<StatusRun>> {
        Box::pin(async move {
            let extent = disk.map(range).await?;
            Ok(StatusRun { len: extent.range.len(), status: allocation_status(&extent) })
        })
    }
}

fn allocation_status(extent: &DiskExtent) -> u32 {
    let hole = if extent.allocated { 0 } else { allocation::HOLE };
    let zero = if extent.zero { allocation::ZERO } else { 0 };
    hole | zero
}

/// `qemu:allocation-depth`: 0 where no layer holds the bytes, 1 for the top layer, 2 for its parent, …
pub(crate) struct AllocationDepth;

impl MetaContext for AllocationDepth {
    fn name(&self) -> &str {
        "qemu:allocation-depth"
    }

    fn status<'a>(&'a self, disk: &'a DiskHandle, range: ByteRange) -> LocalFuture<'a, Result<StatusRun>> {
        Box::pin(async move {
            let extent = disk.map(range).await?;
            let status = extent.depth.map_or(0, |depth| depth.saturating_add(1));
            Ok(StatusRun { len: extent.range.len(), status })
        })
    }
}

/// The contexts that every export has.
pub(crate) fn standard() -> Vec<Arc<dyn MetaContext>> {
    vec![Arc::new(Allocation), Arc::new(AllocationDepth)]
}

/// Whether a query of `NBD_OPT_LIST_META_CONTEXT` asks for the context: by its name, or by a prefix of
/// it that ends in a colon (`base:`, `qemu:`, `qemu:dirty-bitmap:`).
pub(crate) fn listed_by(name: &str, query: &str) -> bool {
    name == query || (query.ends_with(':') && name.starts_with(query))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_end_in_a_colon() {
        assert!(listed_by("base:allocation", "base:"));
        assert!(listed_by("base:allocation", "base:allocation"));
        assert!(listed_by("qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:"));
        assert!(!listed_by("base:allocation", "base:alloc"));
        assert!(!listed_by("base:allocation", "base"));
        assert!(!listed_by("base:allocation", ""));
        assert!(!listed_by("base:allocation", "qemu:"));
    }

    #[test]
    fn status_bits() {
        let extent = |allocated, zero| DiskExtent {
            range: ByteRange::new(0, 1),
            allocated,
            zero,
            compressed: false,
            depth: None,
            source: None,
        };
        assert_eq!(allocation_status(&extent(true, false)), 0);
        assert_eq!(allocation_status(&extent(false, true)), 3);
        assert_eq!(allocation_status(&extent(true, true)), 2);
        assert_eq!(allocation_status(&extent(false, false)), 1);
    }
}
