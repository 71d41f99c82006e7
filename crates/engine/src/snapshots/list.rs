//! Which snapshots a disk has.

use super::SnapshotReport;
use super::take::allocated;
use crate::images::gate::FileGate;
use crate::images::request::SourceSpec;
use crate::images::stack::Stack;
use crate::images::{Workshop, closing, open_source};
use crate::{EngineError, Format, linkage};
use chain::{Access, OpenGate};
use formats::qcow2::Header;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A frozen layer.
#[derive(Clone, Debug)]
struct Frozen {
    file: PathBuf,
    format: Format,
    /// Bytes of the guest's disk.
    size: u64,
    current: bool,
}

impl Stack {
    /// The snapshots of this disk, oldest first.
    ///
    /// # Errors
    /// When the layers' facts cannot be read.
    pub(crate) async fn snapshots(&self, disk: &str) -> Result<Vec<SnapshotReport>, EngineError> {
        let frozen: Vec<Frozen> = self
            .chain()
            .layers()
            .iter()
            .skip(1)
            .map(|layer| Frozen {
                file: layer.path.clone(),
                format: layer.format.into(),
                size: layer.handle.geometry().size,
                current: true,
            })
            .collect();
        look(disk, frozen).await
    }
}

/// Tells of each layer that is a snapshot, and of those that stand on one and were left by a revert.
async fn look(disk: &str, frozen: Vec<Frozen>) -> Result<Vec<SnapshotReport>, EngineError> {
    let mut seen = BTreeSet::new();
    let mut queue = frozen;
    for layer in &mut queue {
        layer.file = real(&layer.file).await;
        seen.insert(layer.file.clone());
    }
    let mut found = Vec::new();
    while let Some(layer) = queue.pop() {
        for child in linkage::children(&layer.file).await? {
            let child = real(&child).await;
            if !seen.insert(child.clone()) || linkage::read(&child).await?.or_nothing().snapshot.is_none() {
                continue;
            }
            let size = size_of(&child).await.unwrap_or(layer.size);
            queue.push(Frozen { file: child, format: Format::Qcow2, size, current: false });
        }
        let Some(snapshot) = linkage::read(&layer.file).await?.or_nothing().snapshot else { continue };
        let file = layer.file.clone();
        let stored = dataplane::offload(move || fs::metadata(file).map_or(0, |facts| allocated(&facts))).await;
        found.push(SnapshotReport {
            disk: disk.to_owned(),
            name: snapshot.name,
            file: layer.file,
            format: layer.format,
            time: Some(snapshot.time),
            consistency: Some(snapshot.consistency),
            set: snapshot.set,
            size: layer.size,
            stored,
            current: layer.current,
            pause_us: None,
        });
    }
    found.sort_by(|a, b| (a.time, &a.name).cmp(&(b.time, &b.name)));
    Ok(found)
}

async fn real(file: &Path) -> PathBuf {
    let file = file.to_owned();
    dataplane::offload(move || file.canonicalize().unwrap_or(file)).await
}

/// Bytes of the disk that a qcow2 image shows.
async fn size_of(file: &Path) -> Option<u64> {
    let gate = FileGate { force_share: true, ..FileGate::cached() };
    let storage = gate.open_storage(file, Access::ReadOnly).await.ok()?;
    Some(Header::read(&storage).await.ok()?.size)
}

/// The snapshot of that name.
pub(crate) fn named(snapshots: Vec<SnapshotReport>, disk: &str, name: &str) -> Result<SnapshotReport, EngineError> {
    snapshots
        .into_iter()
        .rev()
        .find(|snapshot| snapshot.name == name)
        .ok_or_else(|| EngineError::NoSuchSnapshot { disk: disk.to_owned(), snapshot: name.to_owned() })
}

/// The snapshots of an image that is only read.
pub(super) async fn of_file(file: &Path, format: Option<Format>) -> Result<Vec<SnapshotReport>, EngineError> {
    let stack = open_source(&SourceSpec::of(file.to_owned(), format)).await?;
    let snapshots = stack.snapshots(&file.display().to_string()).await;
    closing(&stack, snapshots).await
}

impl Workshop {
    /// The snapshots of an image, oldest first.
    ///
    /// # Errors
    /// When the image or one below it cannot be read.
    pub async fn snapshots(&self, file: PathBuf, format: Option<Format>) -> Result<Vec<SnapshotReport>, EngineError> {
        self.run(move || async move { of_file(&file, format).await }).await
    }
}
