//! What is served: exports, and how their disks are found.

use crate::context::{self, ContextSource};
use crate::negotiation::ExportFacts;
use crate::stats::ExportStats;
use dataplane::IoThread;
use disk::DiskHandle;
use std::fmt;
use std::sync::Arc;

/// Finds an export's disk. Called on the disk's home thread alone; `None` when the disk is closed.
///
/// A [`DiskHandle`] cannot leave its thread, so that what travels is the way to find it: typically a look-up
/// by name or number in a table that the home thread keeps.
pub type DiskSource = Arc<dyn Fn() -> Option<DiskHandle> + Send + Sync>;

/// A disk under a name.
pub struct Export {
    /// What clients ask for; at most 4096 bytes, no NUL. Clients that ask for the empty name get the only
    /// export if there is just one.
    pub name: String,
    /// For people, in lists; may be empty. Cut after 4096 bytes.
    pub description: String,
    /// Refuse writes even if the disk takes them.
    pub read_only: bool,
    /// The disk's thread. Connections are served there.
    pub home: IoThread,
    /// Finds the disk there.
    pub disk: DiskSource,
    /// Metadata contexts beyond `base:allocation` and `qemu:allocation-depth`.
    pub contexts: ContextSource,
    /// Raised by the connections.
    pub stats: Arc<ExportStats>,
}

impl Export {
    /// A writable export without description and further contexts.
    pub fn new(name: impl Into<String>, home: IoThread, disk: DiskSource) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            read_only: false,
            home,
            disk,
            contexts: Arc::new(Vec::new),
            stats: Arc::default(),
        }
    }

    /// What clients may learn, with the size as it is now, and with the contexts if they are asked for. On the home
    /// thread.
    pub(crate) fn facts(&self, disk: &DiskHandle, with_contexts: bool) -> ExportFacts {
        let geometry = disk.geometry();
        ExportFacts {
            name: self.name.clone(),
            description: self.description.clone(),
            size: geometry.size,
            read_only: self.read_only || geometry.read_only,
            preferred_alignment: geometry.preferred_alignment,
            contexts: with_contexts.then(|| context::collect(&self.contexts)),
        }
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export").field("name", &self.name).field("read_only", &self.read_only).finish_non_exhaustive()
    }
}
