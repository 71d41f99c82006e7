//! Changes as NBD metadata contexts: `qemu:dirty-bitmap:MARK`, which clients of QEMU's know, and
//! `highwater:changes:MARK`, which tells of which kind a change is (docs/nbd-contexts.md).

use crate::home::{DiskId, stack_here};
use disk::{ByteRange, DiskError, DiskHandle, ErrorKind, LocalFuture, Operation, Result};
use export_nbd::{ContextSource, MetaContext, StatusRun};
use std::sync::Arc;
use tracking::{ChangeKind, Id};

/// Bit 0: the range has changed.
const CHANGED: u32 = 1;
/// Bit 1: all of it reads as zero.
const ZERO: u32 = 1 << 1;
/// Bit 2: the guest has given it back.
const DISCARDED: u32 = 1 << 2;

/// Which words a context speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Words {
    /// QEMU's: dirty or not.
    Dirty,
    /// Ours: kinds.
    Typed,
}

/// What changed since a mark.
struct Changes {
    name: String,
    mark: String,
    /// Another mark of the same name is another one.
    id: Id,
    /// Up to this mark instead of now.
    until: Option<String>,
    words: Words,
    disk: DiskId,
}

impl Changes {
    async fn run(&self, range: ByteRange) -> std::result::Result<StatusRun, String> {
        let stack = stack_here(self.disk).ok_or("the disk is closed")?;
        let kept = stack.kept().map_err(|e| e.to_string())?;
        let history = kept.history();
        let query = history.changes(&self.mark, self.until.as_deref()).map_err(|e| e.to_string())?;
        if query.since.id != self.id {
            return Err(format!("mark {:?} is another one than when the client connected; connect again", self.mark));
        }
        let query = query.up_to(range.end());
        let span = history.next_changes(&query, range.offset(), 1).await.map_err(|e| e.to_string())?;
        let looked_at = span.next.unwrap_or(range.end());
        let run = match span.changes.first() {
            None => StatusRun { len: looked_at.min(range.end()) - range.offset(), status: 0 },
            Some(change) if change.range.offset() > range.offset() => {
                StatusRun { len: change.range.offset().min(range.end()) - range.offset(), status: 0 }
            }
            Some(change) => StatusRun {
                len: change.range.end().min(range.end()) - range.offset(),
                status: self.status_of(change.kind),
            },
        };
        Ok(run)
    }

    fn status_of(&self, kind: ChangeKind) -> u32 {
        match (self.words, kind) {
            (Words::Dirty, _) | (Words::Typed, ChangeKind::Data) => CHANGED,
            (Words::Typed, ChangeKind::Zero) => CHANGED | ZERO,
            (Words::Typed, ChangeKind::Discarded) => CHANGED | ZERO | DISCARDED,
        }
    }
}

impl MetaContext for Changes {
    fn name(&self) -> &str {
        &self.name
    }

    fn status<'a>(&'a self, _disk: &'a DiskHandle, range: ByteRange) -> LocalFuture<'a, Result<StatusRun>> {
        Box::pin(async move {
            self.run(range).await.map_err(|reason| {
                DiskError::new(ErrorKind::Io, Operation::Map).on(&*self.name).at(range).because(reason)
            })
        })
    }
}

/// The contexts of all marks of a disk that can be trusted.
pub(crate) fn of_disk(disk: DiskId) -> ContextSource {
    source(disk, None)
}

/// The contexts of a view of a disk: of that mark and all older ones, up to the view's instant.
pub(crate) fn of_view(disk: DiskId, mark: &str) -> ContextSource {
    source(disk, Some(mark.to_owned()))
}

fn source(disk: DiskId, until: Option<String>) -> ContextSource {
    Arc::new(move || {
        let Some(stack) = stack_here(disk) else { return Vec::new() };
        let Ok(kept) = stack.kept() else { return Vec::new() };
        let mut contexts: Vec<Arc<dyn MetaContext>> = Vec::new();
        let points = kept.history().points();
        let last = match &until {
            None => u32::MAX,
            Some(mark) => points.iter().find(|point| point.name == *mark).map_or(0, |point| point.epoch),
        };
        // The latest first, as an export shows so many contexts and no more.
        for point in points.into_iter().rev().filter(|point| point.refused.is_none() && point.epoch <= last) {
            for (prefix, words) in [("qemu:dirty-bitmap:", Words::Dirty), ("highwater:changes:", Words::Typed)] {
                let name = format!("{prefix}{}", point.name);
                let (mark, id, until) = (point.name.clone(), point.id, until.clone());
                contexts.push(Arc::new(Changes { name, mark, id, until, words, disk }));
            }
        }
        contexts
    })
}
