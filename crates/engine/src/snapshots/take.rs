//! Taking a snapshot of an open disk.
//!
//! 1. Prepare: the overlay is made beside the disk, durable, and opened; the snapshot's name is noted. The guest notices nothing.
//! 2. Hold: new writes wait, those under way end. This is the instant.
//! 3. Switch: the top layer is flushed and closed cleanly, the overlay takes its file's name (`place.rs`), and the chain is
//!    overlay, frozen layer, and what was below.
//! 4. Go on: writes reach the overlay.
//! 5. Settle: the frozen layer's lock becomes a reader's, so that clones can be made of it.
//!
//! Several disks have one instant when all are held before the first is switched. Until the guest goes on, each switch can be
//! undone.
//!
//! Crash: see [`Place::enter`]. Before it, the disk is whole in its old file; the overlay holds nothing at that moment. After
//! it the frozen layer has its name as a snapshot, with the time of step 1 until step 5.

use super::SnapshotReport;
use super::exchange::{Exchange, Exchanged};
use super::hold::Hold;
use super::overlay::{self, NewOverlay};
use super::place::Place;
use super::rearranging::Rearranging;
use crate::history::PreparedTop;
use crate::images::stack::Stack;
use crate::linkage::{self, SnapshotConsistency, SnapshotFacts};
use crate::promotion::microseconds;
use crate::{EngineError, Format};
use chain::LayerInfo;
use disk::{LayerHandle, Preallocation, Storage, StorageId};
use std::fs;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};
use storage::FileStorage;
use storage::lock::Demand;
use tracking::Id;

/// A snapshot that is being taken.
pub(crate) struct Taking {
    /// Of the snapshots that are taken together.
    set: Id,
    name: String,
    place: Place,
    overlay: LayerHandle,
    file: FileStorage,
    /// With the mark of the disk's history, if one is kept.
    marked: Option<PreparedTop>,
    /// While the guest waits, and since when.
    hold: Option<(Hold, Instant)>,
    pause: Duration,
    /// The layers and files before the switch.
    before: Option<Before>,
}

struct Before {
    layers: Rc<[LayerInfo]>,
    files: Vec<FileStorage>,
    format: Format,
    image: PathBuf,
}

/// What a new snapshot is known by.
#[derive(Clone, Debug)]
pub(crate) struct Instantaneous {
    pub(crate) time: u64,
    pub(crate) consistency: SnapshotConsistency,
}

impl Stack {
    /// Makes the overlay, and whatever else can be done while the guest writes.
    ///
    /// # Errors
    /// When a snapshot of that name cannot be taken of this disk.
    pub(crate) async fn prepare_snapshot(&self, set: Id, name: &str) -> Result<(), EngineError> {
        if self.snapshot.borrow().is_some() {
            return Err(EngineError::Invalid(format!(
                "{}: another snapshot is being taken; try again when that is done",
                self.image().display()
            )));
        }
        self.refuse_while(&[Rearranging::Consolidation])?;
        self.refuse_snapshots()?;
        let below = self.chain().layers().get(1).map(|layer| layer.path.clone());
        if let Some(below) = below {
            // What is noted there names the disk's file, which is about to have another name.
            linkage::refuse_half_merged(&below).await?;
        }
        let image = self.image();
        let resolved = image.clone();
        let image = dataplane::offload(move || resolved.canonicalize())
            .await
            .map_err(|e| EngineError::file(&image, "find", e))?;
        let place = Place::of(&image, self.format(), name);
        let looked_at = place.clone();
        dataplane::offload(move || looked_at.refuse_if_taken()).await?;
        let made = async {
            let made = self.make_overlay(&place).await?;
            let snapshot = SnapshotFacts {
                name: name.to_owned(),
                time: linkage::now(),
                consistency: SnapshotConsistency::Crash,
                set: Some(set.to_string()),
            };
            linkage::change(&place.frozen, move |known| known.snapshot = Some(snapshot)).await?;
            Ok(made)
        };
        let (overlay, file, marked) = match made.await {
            Ok(made) => made,
            Err(error) => {
                overlay::remove(place.fresh.clone()).await;
                return Err(error);
            }
        };
        *self.snapshot.borrow_mut() = Some(Taking {
            set,
            name: name.to_owned(),
            place,
            overlay,
            file,
            marked,
            hold: None,
            pause: Duration::ZERO,
            before: None,
        });
        // What is durable now need not be made so while the guest waits.
        self.disk().flush().await?;
        Ok(())
    }

    /// Says why no snapshot can be taken of this disk, if so.
    fn refuse_snapshots(&self) -> Result<(), EngineError> {
        let refused = |why: &str| Err(EngineError::Unsupported(format!("{}: {why}", self.image().display())));
        if self.disk().geometry().read_only {
            return refused("a disk that is read-only does not change, and needs no snapshot");
        }
        if !self.is_plain() {
            return refused(
                "the disk was opened over a parent, data file or internal snapshot that the image does not name itself; \
                 an overlay could not name them either",
            );
        }
        if self.files().first().is_some_and(FileStorage::is_block_device) {
            return refused(
                "a block device has no place beside it for an overlay; make one with `highwater create -b` and serve that",
            );
        }
        let written = self.files().iter().filter(|file| !file.limits().read_only).count();
        if written > 1 {
            return refused(
                "the image keeps its data in another file; only images that hold their data themselves can be frozen",
            );
        }
        Ok(())
    }

    async fn make_overlay(
        &self,
        place: &Place,
    ) -> Result<(LayerHandle, FileStorage, Option<PreparedTop>), EngineError> {
        let image = self.chain().top();
        let new = NewOverlay {
            fresh: place.fresh.clone(),
            name: place.top.display().to_string(),
            parent: place.frozen_file_name()?,
            parent_format: self.format(),
            size: self.disk().geometry().size,
            direct: image.storage(StorageId::IMAGE).limits().alignment > 1,
        };
        let file = new.make().await?;
        let overlay = overlay::open_qcow2(file.clone(), false).await?;
        let marked = self.mark_new_top(&overlay).await?;
        Ok((overlay, file, marked))
    }

    /// Has the guest's writes wait, and waits for those under way.
    ///
    /// # Errors
    /// When they do not end.
    pub(crate) async fn hold_for_snapshot(&self) -> Result<(), EngineError> {
        let since = Instant::now();
        let held = self.hold_changes("no snapshot was taken").await?;
        if let Some(taking) = &mut *self.snapshot.borrow_mut() {
            taking.hold = Some((held, since));
        }
        Ok(())
    }

    /// Puts the overlay on top. The guest's writes wait.
    ///
    /// # Errors
    /// When it cannot be done: the disk is as it was.
    pub(crate) async fn switch_to_overlay(&self) -> Result<(), EngineError> {
        let Some(mut taking) = self.snapshot.borrow_mut().take() else {
            return Err(EngineError::Invalid("this snapshot was given up meanwhile".to_owned()));
        };
        let done = self.switch(&mut taking).await;
        *self.snapshot.borrow_mut() = Some(taking);
        done
    }

    async fn switch(&self, taking: &mut Taking) -> Result<(), EngineError> {
        let place = taking.place.clone();
        let before =
            Before { layers: self.chain().layers(), files: self.files(), format: self.format(), image: self.image() };
        let marked = taking.marked.take();
        self.exchange(Exchanged::Layers, async |layers| {
            // Everything is in the file, and its header says so: whoever opens it by its new name finds it whole.
            layers[0].handle.close().await?;
            let (frozen, frozen_file) = freeze(&place, before.format, &before.files[0]).await?;
            let size = layers[0].handle.geometry().size;
            if taking.overlay.geometry().size != size {
                // The disk was resized since the overlay was made.
                taking.overlay.resize(size, Preallocation::Off).await?;
                taking.overlay.flush().await?;
            }
            let overlay =
                LayerInfo { path: place.top.clone(), format: formats::Format::Qcow2, handle: taking.overlay.clone() };
            let mut now = vec![overlay, frozen];
            now.extend(layers[1..].iter().cloned());
            let mut files = vec![taking.file.clone(), frozen_file];
            files.extend(before.files[1..].iter().cloned());
            let entered = place.clone();
            let last = Box::pin(dataplane::offload(move || entered.enter()));
            Ok(Exchange { layers: now, files, marked, last })
        })
        .await?;
        taking.before = Some(before);
        self.set_top(place.top, Format::Qcow2);
        Ok(())
    }

    /// Gives up a snapshot of that set that is not settled: the disk is as it was before, and the guest goes on.
    ///
    /// # Errors
    /// When the old file does not come back into its place.
    pub(crate) async fn undo_snapshot(&self, set: Id) -> Result<(), EngineError> {
        let Some(taking) = self.snapshot.borrow_mut().take_if(|taking| taking.set == set) else { return Ok(()) };
        let Taking { place, before, hold, .. } = &taking;
        let Some(before) = before else {
            overlay::remove(place.fresh.clone()).await;
            return forget(set, place).await;
        };
        if hold.is_none() {
            // The guest has written to the overlay: it is the disk.
            return Err(EngineError::Invalid(format!("{}: the guest goes on already", place.top.display())));
        }
        let left = place.clone();
        let marked = self.mark_new_top(&before.layers[0].handle).await?;
        self.exchange(Exchanged::Layers, async |_| {
            let file = left.disk.clone();
            let last = move || left.leave().map_err(|error| EngineError::file(&file, "put it back", error));
            let last = Box::pin(dataplane::offload(last));
            Ok(Exchange { layers: before.layers.to_vec(), files: before.files.clone(), marked, last })
        })
        .await?;
        self.set_top(before.image.clone(), before.format);
        forget(set, place).await
    }

    /// Lets the guest go on.
    pub(crate) fn go_on(&self) {
        if let Some(taking) = &mut *self.snapshot.borrow_mut()
            && let Some((held, since)) = taking.hold.take()
        {
            drop(held);
            taking.pause = since.elapsed();
        }
    }

    /// What remains to be done while the guest writes on; and what the snapshot is.
    ///
    /// # Errors
    /// When there is none, or its facts cannot be recorded.
    pub(crate) async fn settle_snapshot(
        &self,
        disk: &str,
        facts: &Instantaneous,
    ) -> Result<SnapshotReport, EngineError> {
        self.go_on();
        let Some(Taking { set, name, place, pause, .. }) = self.snapshot.borrow_mut().take() else {
            return Err(EngineError::Invalid(format!("{disk}: its snapshot was given up meanwhile")));
        };
        // Nobody writes to it any more, whatever becomes of this.
        if let Some(frozen) = self.files().get(1)
            && let Err(error) = frozen.relock(Demand::READER)
        {
            tracing::warn!(%error, "the frozen layer stays locked as if it were written to; clones have to wait");
        }
        let snapshot = SnapshotFacts {
            name: name.clone(),
            time: facts.time,
            consistency: facts.consistency,
            set: Some(set.to_string()),
        };
        linkage::change(&place.frozen, move |known| {
            known.snapshot = Some(snapshot);
            // Of another image that once had this name.
            known.absorbing = None;
            known.same_as.clear();
        })
        .await?;
        linkage::register_child(&place.frozen, &place.top).await?;
        let layers = self.chain().layers();
        if let [top, frozen, ..] = &layers[..]
            && top.handle.parent_link().is_none()
            && let Some(file) = self.files().get(1)
        {
            let link = linkage::link_to_layer(frozen, file).await?;
            top.handle.set_parent_link(Some(link)).await?;
        }
        if let Some(below) = layers.get(2) {
            // What was the disk is the frozen layer now.
            linkage::register_child(&below.path, &place.frozen).await?;
            linkage::forget_child(&below.path, &place.top).await?;
        }
        let frozen = place.frozen.clone();
        let stored = dataplane::offload(move || fs::metadata(frozen).map_or(0, |facts| allocated(&facts))).await;
        Ok(SnapshotReport {
            disk: disk.to_owned(),
            name,
            format: if place.keeps_name() { Format::Qcow2 } else { Format::Raw },
            file: place.frozen,
            time: Some(facts.time),
            consistency: Some(facts.consistency),
            set: Some(set.to_string()),
            size: self.disk().geometry().size,
            stored,
            current: true,
            pause_us: Some(microseconds(pause)),
        })
    }
}

/// There is no such snapshot after all.
async fn forget(set: Id, place: &Place) -> Result<(), EngineError> {
    let set = set.to_string();
    linkage::change(&place.frozen, move |known| {
        known.snapshot.take_if(|snapshot| snapshot.set.as_ref() == Some(&set));
    })
    .await
}

/// The frozen layer: the same open file under its new name.
async fn freeze(place: &Place, format: Format, file: &FileStorage) -> Result<(LayerInfo, FileStorage), EngineError> {
    let file = file.renamed_for_reading(&place.frozen.display().to_string())?;
    let handle = overlay::open_layer(file.clone(), format, true).await?;
    Ok((LayerInfo { path: place.frozen.clone(), format: format.into(), handle }, file))
}

/// Bytes that a file takes.
pub(crate) fn allocated(facts: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(facts).saturating_mul(512)
}
