//! Metadata contexts: what `NBD_CMD_BLOCK_STATUS` can tell about an export's ranges.

use crate::wire::{MAX_STRING, allocation};
use disk::{ByteRange, DiskExtent, DiskHandle, LocalFuture, Result};
use std::collections::HashSet;
use std::sync::Arc;

/// Most contexts of one export, the standard ones included. The list of all is one reply.
const MAX_CONTEXTS: usize = 4096;
/// Most bytes of their names together: with [`MAX_CONTEXTS`], what the reply to a list of all may take.
const MAX_NAME_BYTES: usize = 2 << 20;
/// Most contexts that one connection selects. Each may keep what it has worked out, and answers every
/// `NBD_CMD_BLOCK_STATUS` without a choice of its own.
pub(crate) const MAX_SELECTED: usize = 64;

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
/// Lives as long as a connection that selected it, and belongs to it alone when a [`ContextSource`] made it: what
/// it works out when first asked may be kept for the connection's later questions. [`MetaContext::status`] is called
/// on the disk's home thread alone; it is `Send + Sync` because negotiation runs on any thread.
pub trait MetaContext: Send + Sync + 'static {
    /// The full name, `namespace:leaf`, at most 4096 bytes, no NUL.
    fn name(&self) -> &str;

    /// The first run of `range` (not empty, inside the disk).
    fn status<'a>(&'a self, disk: &'a DiskHandle, range: ByteRange) -> LocalFuture<'a, Result<StatusRun>>;
}

/// The contexts that an export has now, beyond `base:allocation` and `qemu:allocation-depth`.
///
/// Called on the disk's home thread whenever a client lists or selects contexts, so that what comes and goes while
/// the export is open is found by the next client. Each call returns new instances if a context keeps something for
/// its connection; those that are not selected are dropped at once, so making one must be cheap.
///
/// Of several with one name the first counts. At most 4,094 are shown, with 2 MiB of names together; a name that is
/// longer than 4096 bytes, or contains NUL, is left out.
pub type ContextSource = Arc<dyn Fn() -> Vec<Arc<dyn MetaContext>> + Send + Sync>;

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

/// The contexts of an export at one moment.
#[derive(Clone)]
pub(crate) struct Collected {
    /// Their names differ; at most [`MAX_CONTEXTS`].
    pub(crate) contexts: Vec<Arc<dyn MetaContext>>,
    /// How many the source named besides, beyond the bounds or with names that cannot be sent.
    pub(crate) left_out: usize,
}

/// The standard contexts, and those that `source` names.
pub(crate) fn collect(source: &ContextSource) -> Collected {
    let mut contexts = standard();
    let mut left_out = 0;
    let further = source();
    let mut known: HashSet<&str> = contexts.iter().map(|context| context.name()).collect();
    let mut bytes: usize = known.iter().map(|name| name.len()).sum();
    let mut chosen = vec![false; further.len()];
    for (context, chosen) in further.iter().zip(&mut chosen) {
        let name = context.name();
        if known.contains(name) {
            continue;
        }
        let sendable = name.len() <= MAX_STRING && !name.contains('\0');
        if !sendable || known.len() >= MAX_CONTEXTS || bytes + name.len() > MAX_NAME_BYTES {
            left_out += 1;
            continue;
        }
        bytes += name.len();
        known.insert(name);
        *chosen = true;
    }
    drop(known);
    contexts.extend(further.into_iter().zip(chosen).filter_map(|(context, chosen)| chosen.then_some(context)));
    Collected { contexts, left_out }
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

    struct Named(String);

    impl MetaContext for Named {
        fn name(&self) -> &str {
            &self.0
        }

        fn status<'a>(&'a self, _: &'a DiskHandle, range: ByteRange) -> LocalFuture<'a, Result<StatusRun>> {
            Box::pin(async move { Ok(StatusRun { len: range.len(), status: 0 }) })
        }
    }

    fn collected(names: Vec<String>) -> Collected {
        let source: ContextSource =
            Arc::new(move || names.iter().map(|name| Arc::new(Named(name.clone())) as Arc<dyn MetaContext>).collect());
        collect(&source)
    }

    #[test]
    fn names_differ_and_can_be_sent() {
        let names = ["x:a", "base:allocation", "x:a", "x:\0", "x:b", &"y".repeat(4097)].map(str::to_owned);
        let Collected { contexts, left_out } = collected(names.to_vec());
        let names: Vec<&str> = contexts.iter().map(|context| context.name()).collect();
        assert_eq!(names, ["base:allocation", "qemu:allocation-depth", "x:a", "x:b"]);
        assert_eq!(left_out, 2);
    }

    #[test]
    fn contexts_are_bounded() {
        let many = collected((0..5000).map(|n| format!("x:{n}")).collect());
        assert_eq!((many.contexts.len(), many.left_out), (4096, 906));
        let long = collected((0..600).map(|n| format!("x:{n:04090}")).collect());
        let bytes: usize = long.contexts.iter().map(|context| context.name().len()).sum();
        assert!(bytes <= 2 << 20 && bytes > (2 << 20) - 4096, "{bytes}");
        assert_eq!(long.contexts.len() - 2 + long.left_out, 600);
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
