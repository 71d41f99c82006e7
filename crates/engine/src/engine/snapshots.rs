//! Snapshots of the engine's disks, and which image is a disk's top one.

use super::{Engine, Phase, busy};
use crate::history::HistorySource;
use crate::images::Progress;
use crate::images::report::ImageInfo;
use crate::images::request::require_absolute;
use crate::linkage;
use crate::snapshots::instant::{self, NewTop};
use crate::snapshots::rearranging::Rearranging;
use crate::snapshots::{self, CloneSpec, SnapshotReport, SnapshotSpec};
use crate::{DiskStatus, EngineError, Event, ImageSpec};

impl Engine {
    /// Takes a snapshot of disks, or of all disks of virtual machines, at one instant, while their guests run.
    ///
    /// # Errors
    /// When one of them cannot have one of that name, or the guest could not be frozen and thawed: then there is none on any
    /// of them.
    pub async fn snapshot(&self, spec: SnapshotSpec) -> Result<Vec<SnapshotReport>, EngineError> {
        spec.validate()?;
        let members = self
            .disks_named(&spec.disks)?
            .into_iter()
            .map(|name| Ok(instant::Member { home: self.home(&name)?.0, name }))
            .collect::<Result<Vec<_>, EngineError>>()?;
        let snapshots = instant::take(&members, &spec.name, spec.freeze, |tops| self.enter_tops(tops)).await?;
        for snapshot in &snapshots {
            self.look_at_history(&snapshot.disk).await;
            self.tell(Event::SnapshotAdded { disk: snapshot.disk.clone(), snapshot: snapshot.name.clone() });
        }
        Ok(snapshots)
    }

    /// The snapshots of a disk, oldest first.
    ///
    /// # Errors
    /// [`EngineError::NoSuchDisk`], or when the layers' facts cannot be read.
    pub async fn snapshots(&self, name: &str) -> Result<Vec<SnapshotReport>, EngineError> {
        let (home, _) = self.home(name)?;
        let disk = name.to_owned();
        home.with(move |stack| async move { stack.snapshots(&disk).await }).await
    }

    /// Has a disk that nobody is connected to go back to a snapshot. What it holds now, and no snapshot holds, is lost.
    ///
    /// # Errors
    /// When somebody is connected, the disk's layers are at work, or there is no such snapshot: the disk is as it was then.
    pub async fn revert(&self, name: &str, snapshot: &str) -> Result<DiskStatus, EngineError> {
        let known = snapshots::named(self.snapshots(name).await?, name, snapshot)?;
        linkage::refuse_half_merged(&known.file).await?;
        if let Ok((home, _)) = self.home(name) {
            // Their work would be lost.
            let jobs = &[Rearranging::Promotion, Rearranging::Consolidation];
            home.with(move |stack| async move { stack.refuse_while(jobs) }).await?;
        }
        let (spec, home, exports) = {
            let mut disks = self.disks();
            let entry = disks.get_mut(name).ok_or_else(|| EngineError::NoSuchDisk(name.to_owned()))?;
            if let Some(busy) = busy(name, &entry.phase) {
                return Err(busy);
            }
            if entry.exports.iter().any(|export| export.stats.connections() > 0) {
                return Err(EngineError::Connected(name.to_owned()));
            }
            let spec = entry.spec.clone();
            let home = match std::mem::replace(&mut entry.phase, Phase::Closing) {
                Phase::Open { home, .. } => Some(home),
                _ => None,
            };
            (spec, home, std::mem::take(&mut entry.exports))
        };
        self.close_views_of(Some(name)).await;
        self.servers.close_all(exports).await;
        let closed = match home {
            Some(home) => home.close().await,
            None => Ok(()),
        };
        let reverted = match closed {
            Ok(()) => {
                let ImageSpec { file, format, .. } = spec.image.clone();
                let source = HistorySource { file, format, history: spec.history.clone() };
                self.workshop().revert(source, snapshot.to_owned()).await
            }
            Err(error) => Err(error),
        };
        self.reopen(&spec).await;
        reverted?;
        self.tell(Event::SnapshotReverted { disk: name.to_owned(), snapshot: snapshot.to_owned() });
        self.disk(name)
    }

    /// Makes a new image that begins as a snapshot of a disk.
    ///
    /// # Errors
    /// When there is no such snapshot, or something stands where the clone is to be.
    pub async fn clone_snapshot(&self, name: &str, snapshot: &str, spec: CloneSpec) -> Result<ImageInfo, EngineError> {
        require_absolute(&spec.target)?;
        let snapshot = snapshots::named(self.snapshots(name).await?, name, snapshot)?;
        linkage::refuse_half_merged(&snapshot.file).await?;
        let plan = dataplane::offload(move || snapshots::plan_of_clone(&snapshot, &spec.target)).await?;
        self.workshop().create(plan, Progress::new()).await
    }

    /// These images are the disks' top ones from now on.
    ///
    /// Crash: the catalogue names the old files or the new ones, which hold the same.
    pub(super) fn enter_tops(&self, tops: &[NewTop]) -> Result<(), EngineError> {
        let mut before = Vec::new();
        for NewTop { disk, image, format, history } in tops {
            let mut disks = self.disks();
            let Some(entry) = disks.get_mut(disk) else { continue };
            let same_file = entry.spec.image.file.canonicalize().is_ok_and(|file| file == *image);
            if same_file && entry.spec.image.format == Some(*format) {
                continue; // It keeps its name.
            }
            before.push((disk, entry.spec.clone()));
            entry.spec.image = ImageSpec::of(image, Some(*format));
            if entry.spec.history.file.is_none() {
                entry.spec.history.file.clone_from(history);
            }
            entry.set_format(*format);
        }
        let saved = if before.is_empty() { Ok(()) } else { self.save() };
        if saved.is_err() {
            for (disk, spec) in before {
                if let Some(entry) = self.disks().get_mut(disk) {
                    // The rest may have been changed by others meanwhile.
                    spec.image.format.into_iter().for_each(|format| entry.set_format(format));
                    (entry.spec.image, entry.spec.history.file) = (spec.image, spec.history.file);
                }
            }
        }
        saved
    }
}
