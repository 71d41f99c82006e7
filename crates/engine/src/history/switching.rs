//! What the history needs when another image takes the place of a disk's top image, and shows the same.
//!
//! ```text
//! guest writes   prepare_switch     the new image gets a mark of this history
//! held           Tracked::hold_still, Still::wait_for_parked: nothing is parked any more
//!                (the old top is flushed and closed)
//!                before_switch      the sidecar names the new image
//!                (rename or catalogue, and the directory's sync; the chain is switched)
//!                after_switch, or without_switch
//! guest writes
//! ```
//!
//! Crash: `heir.rs` in `tracking`. Kill: writes are parked under the file of the top image. At the switch none is parked,
//! and the next one is parked under the new image.
//!
//! The sidecar stays where it is. Whoever gives the disk another path names the sidecar ([`Kept::file`]) in the disk's
//! [`HistorySpec`](super::HistorySpec), in the same step.
//!
//! The old image keeps its mark. It names a moment that is none of the history's after the switch, so the image is
//! refused where a copy of the sidecar lies beside it, and a sidecar of its own begins a lineage of its own.

use super::host::{look, look_at_others};
use super::parked::Lot;
use super::sidecar::Kept;
use crate::EngineError;
use disk::{DiskError, HistoryMark, LayerHandle, Operation};
use std::os::unix::fs::MetadataExt;
use storage::FileStorage;
use tracking::ImageMark;

/// An image that is about to become the top one, as [`Kept::prepare_switch`] has prepared it.
#[must_use]
pub(crate) struct PreparedTop {
    mark: Option<ImageMark>,
}

impl Kept {
    /// Marks the image that is about to become the top one. The guest may write meanwhile, and the present top is not
    /// closed yet.
    ///
    /// From here to the switch nothing is written to the new image by any other way, and `new_top` is the handle that
    /// the chain gets: one that is opened again would lose the mark with its first write.
    ///
    /// # Errors
    /// When an image cannot be marked: the switch must not be made.
    pub(crate) async fn prepare_switch(&self, new_top: &LayerHandle) -> Result<PreparedTop, EngineError> {
        prepare(self.history().mark_for_heir().await?, new_top).await
    }

    /// The same for the present top's own file, which was opened again and gets other parents: it goes on with its mark.
    ///
    /// # Errors
    /// As [`Kept::prepare_switch`].
    pub(crate) async fn prepare_same_file(&self, new_top: &LayerHandle) -> Result<PreparedTop, EngineError> {
        prepare(self.history().mark_for_same_file().await?, new_top).await
    }

    /// What is due right before the switch, while the disk stands still ([`tracking::Tracked::hold_still`],
    /// [`tracking::Still::wait_for_parked`]) and after the old top was closed. `new_files` are the files of the disk after
    /// the switch, in the order in which they would be opened: the new top, its data file, its parent, and so on.
    ///
    /// # Errors
    /// When the files cannot be looked at, or the sidecar can neither be written nor given up: the switch must not be
    /// made, and the disk goes on with the old top. [`Kept::without_switch`] is not due then.
    pub(crate) async fn before_switch(
        &self,
        new_top: PreparedTop,
        new_files: &[FileStorage],
    ) -> Result<(), EngineError> {
        self.disk.leave_lot()?;
        let named = self.name_new_top(new_top, new_files.to_vec()).await;
        if named.is_err() {
            self.without_switch().await?;
        }
        named
    }

    async fn name_new_top(&self, new_top: PreparedTop, new_files: Vec<FileStorage>) -> Result<(), EngineError> {
        let old_files = self.host.files();
        let facts = dataplane::offload(move || {
            sync_times(&old_files, &new_files)?;
            look(&new_files)
        })
        .await?;
        Ok(self.history().name_heir(facts, new_top.mark).await?)
    }

    /// The switch was made, durably, and the chain has the new top. The guest may go on as soon as this has been polled.
    ///
    /// # Errors
    /// When the sidecar can neither be written nor given up: the guest must not write.
    pub(crate) async fn after_switch(&self, new_files: Vec<FileStorage>) -> Result<(), EngineError> {
        self.host.set_files(new_files.clone());
        self.history().heir_takes_place().await?;
        Lot::move_to(&self.disk, &new_files).await;
        Ok(())
    }

    /// The switch was not made, after all.
    ///
    /// # Errors
    /// When the sidecar can neither be written nor given up: the guest must not write.
    pub(crate) async fn without_switch(&self) -> Result<(), EngineError> {
        self.history().forget_heir().await?;
        Lot::move_to(&self.disk, &self.host.files()).await;
        Ok(())
    }
}

impl Kept {
    /// The disk is made of other files from now on, as it looks to the history.
    pub(crate) fn set_files(&self, files: Vec<FileStorage>) {
        self.host.set_files(files);
    }

    /// The top is about to be written to by ourselves, in ways that the guest does not see: from here on, and until the
    /// close, how it looks does not count as a sign that somebody else was there. Durable on return.
    ///
    /// # Errors
    /// As [`tracking::History::image_changes`]: it must not be written to.
    pub(crate) async fn top_changes(&self) -> Result<(), EngineError> {
        Ok(self.history().image_changes().await?)
    }

    /// Images below the top are about to be changed by ourselves, in ways that the guest does not see: from here on, and
    /// until [`Kept::lower_images_rest`], they do not count as a sign that somebody else was there. Durable on return.
    ///
    /// # Errors
    /// As [`tracking::History::others_change`]: they must not be changed.
    pub(crate) async fn lower_images_change(&self) -> Result<(), EngineError> {
        Ok(self.history().others_change().await?)
    }

    /// They stay as they are from now on. The guest may write to the top meanwhile.
    ///
    /// # Errors
    /// When they cannot be looked at, or the sidecar can neither be written nor given up.
    pub(crate) async fn lower_images_rest(&self) -> Result<(), EngineError> {
        let files = self.host.files();
        let others = dataplane::offload(move || look_at_others(files.get(1..).unwrap_or_default())).await?;
        Ok(self.history().others_rest(others).await?)
    }
}

async fn prepare(mark: Option<ImageMark>, new_top: &LayerHandle) -> Result<PreparedTop, EngineError> {
    let Some(mark) = mark else { return Ok(PreparedTop { mark: None }) };
    let borne = HistoryMark { lineage: mark.lineage.0, moment: mark.moment.0 };
    let marked = new_top.set_history_mark(Some(borne)).await?;
    Ok(PreparedTop { mark: marked.then_some(mark) })
}

/// Makes the times of the new top durable, and those of the old one if it stays among the files: the facts speak of them,
/// and a sync of data alone leaves them to be lost with the machine's power.
fn sync_times(old: &[FileStorage], new: &[FileStorage]) -> disk::Result<()> {
    let id = |file: &FileStorage| file.file().metadata().map(|facts| (facts.dev(), facts.ino()));
    let failed = |file: &FileStorage, error| {
        DiskError::from_io(error, Operation::Flush).on(disk::Storage::name(file).to_owned())
    };
    // Where it stays, it stays as another open file, which does not know of that.
    if let Some(old_top) = old.first() {
        old_top.restore_ragged_size()?;
    }
    let old_top = old.first().and_then(|file| id(file).ok());
    for (n, file) in new.iter().enumerate() {
        if n == 0 || id(file).ok().is_some_and(|id| Some(id) == old_top) {
            file.restore_ragged_size()?;
            file.file().sync_all().map_err(|error| failed(file, error))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::history::{HistoryMode, HistorySpec, sidecar_of};
    use crate::images::create;
    use crate::images::request::{BackingSpec, CreateSpec};
    use crate::images::stack::{HistoryUse, OpenRequest, Stack};
    use crate::{CacheMode, Format, ImageSpec};
    use dataplane::{Backend, block_on};
    use disk::Buf;
    use std::fs;
    use std::path::{Path, PathBuf};

    const MIB: u64 = 1 << 20;

    /// How far a switch comes before the process is killed.
    #[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
    enum Until {
        Prepared,
        Named,
        Renamed,
        Taken,
        /// It is called off.
        Without,
    }

    struct Place {
        _directory: tempfile::TempDir,
        disk: PathBuf,
        parent: PathBuf,
        overlay: PathBuf,
    }

    fn place() -> Place {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let (disk, parent, overlay) = (at("disk.qcow2"), at("disk@s1.qcow2"), at("disk.qcow2.new"));
        Place { _directory: directory, disk, parent, overlay }
    }

    async fn make(file: &Path, backing: Option<&str>, version: &str) {
        let backing = backing.map(|file| BackingSpec { file: file.to_owned(), format: Format::Qcow2 });
        let spec = CreateSpec {
            file: file.to_owned(),
            format: Format::Qcow2,
            size: Some(8 * MIB),
            options: [("compat".to_owned(), version.to_owned())].into(),
            unsafe_backing: backing.is_some(),
            backing,
        };
        create::create(&spec).await.unwrap();
    }

    async fn open(file: &Path, history: HistoryUse, force_share: bool) -> Stack {
        let request = OpenRequest {
            image: ImageSpec::of(file, Some(Format::Qcow2)),
            format: Format::Qcow2,
            writable: true,
            force_share,
            cache: CacheMode::Writeback,
            history,
            linkage: crate::linkage::LinkageUse::Ignored,
        };
        Stack::open(&request).await.unwrap()
    }

    async fn kept(file: &Path) -> Stack {
        open(file, HistoryUse::Kept(HistorySpec { mode: HistoryMode::On, ..HistorySpec::default() }), false).await
    }

    async fn write(stack: &Stack, at: u64) {
        write_bytes(stack, at, 4096).await;
    }

    async fn write_bytes(stack: &Stack, at: u64, len: usize) {
        stack.disk().write(at, Buf::copy_of(&vec![7; len]), disk::WriteFlags::default()).await.unwrap();
    }

    async fn changed(stack: &Stack) -> Vec<u64> {
        let (ranges, _) = stack.changes_between("p", 0, 8 * MIB, 100).await.unwrap();
        ranges.iter().map(|range| range.start).collect()
    }

    /// One session up to that step of a switch; then a kill.
    async fn session(place: &Place, until: Until, overlay_version: &str) {
        let stack = kept(&place.disk).await;
        write(&stack, 0).await;
        stack.hold("p").await.unwrap();
        stack.cut(tracking::NewPoint { name: "p".to_owned(), set: tracking::Id::NONE }, None);
        stack.commit("disk", tracking::Consistency::Crash).await.unwrap();
        write(&stack, 2 * MIB).await;
        let keeper = stack.kept().unwrap();
        assert!(keeper.disk.is_parking());
        fs::hard_link(&place.disk, &place.parent).unwrap();
        make(&place.overlay, Some("disk@s1.qcow2"), overlay_version).await;
        let over = open(&place.overlay, HistoryUse::None, true).await;
        let prepared = keeper.prepare_switch(&over.chain().top()).await.unwrap();
        if until == Until::Prepared {
            return;
        }
        let still = keeper.disk.hold_still().await;
        still.wait_for_parked().await.unwrap();
        stack.chain().top().flush().await.unwrap();
        stack.chain().top().close().await.unwrap();
        keeper.before_switch(prepared, &over.files()).await.unwrap();
        assert!(!keeper.disk.is_parking());
        match until {
            Until::Named => return,
            Until::Without => {
                keeper.without_switch().await.unwrap();
                assert!(keeper.disk.is_parking());
                drop(still);
                return write(&stack, 6 * MIB).await;
            }
            _ => fs::rename(&place.overlay, &place.disk).unwrap(),
        }
        if until == Until::Taken {
            keeper.after_switch(over.files()).await.unwrap();
            assert!(keeper.disk.is_parking());
        }
    }

    #[test]
    fn a_kill_at_any_step_leaves_a_trusted_history() {
        for until in [Until::Prepared, Until::Named, Until::Renamed, Until::Taken, Until::Without] {
            // Version 2 bears no mark.
            for overlay_version in ["1.1", "0.10"] {
                let place = place();
                let what = format!("{until:?} {overlay_version}");
                block_on(Backend::Auto, make(&place.disk, None, "1.1")).unwrap();
                block_on(Backend::Auto, session(&place, until, overlay_version)).unwrap();
                let mut expected = vec![2 * MIB];
                if until == Until::Without {
                    expected.push(6 * MIB);
                }
                block_on(Backend::Auto, async {
                    let stack = kept(&place.disk).await;
                    let renamed = until == Until::Renamed || until == Until::Taken;
                    assert_eq!(stack.chain().layers().len(), if renamed { 2 } else { 1 }, "{what}");
                    assert_eq!(stack.kept().unwrap().distrust, None, "{what}");
                    assert_eq!(changed(&stack).await, expected, "{what}");
                    write(&stack, 4 * MIB).await;
                    stack.close().await.unwrap();
                })
                .unwrap();
                expected.insert(1, 4 * MIB);
                block_on(Backend::Auto, async {
                    let stack = kept(&place.disk).await;
                    assert_eq!(stack.kept().unwrap().distrust, None, "{what}");
                    assert_eq!(changed(&stack).await, expected, "{what}");
                    stack.close().await.unwrap();
                })
                .unwrap();
            }
        }
    }

    /// A direct write completes the last block of a file whose size is ragged; the frozen layer gets its size back before the
    /// history takes down how it looks, not when the last who wrote to it lets go of it.
    #[test]
    fn a_frozen_image_of_ragged_size_is_still_trusted_after_a_kill() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.raw");
        let size = 8 * MIB + 512;
        fs::File::create(&image).unwrap().set_len(size).unwrap();
        block_on(Backend::Auto, async {
            let spec = HistorySpec { mode: HistoryMode::On, ..HistorySpec::default() };
            let request = OpenRequest {
                image: ImageSpec::of(&image, Some(Format::Raw)),
                format: Format::Raw,
                writable: true,
                force_share: false,
                cache: CacheMode::None,
                history: HistoryUse::Kept(spec),
                linkage: crate::linkage::LinkageUse::Ignored,
            };
            let stack = Stack::open(&request).await.unwrap();
            stack.hold("p").await.unwrap();
            stack.cut(tracking::NewPoint { name: "p".to_owned(), set: tracking::Id::NONE }, None);
            stack.commit("disk", tracking::Consistency::Crash).await.unwrap();
            write_bytes(&stack, size - 512, 512).await;
            let set = crate::history::host::random_id();
            stack.prepare_snapshot(set, "s").await.unwrap();
            stack.hold_for_snapshot().await.unwrap();
            stack.switch_to_overlay().await.unwrap();
            let consistency = crate::linkage::SnapshotConsistency::Crash;
            let facts = crate::snapshots::take::Instantaneous { time: 0, consistency };
            stack.settle_snapshot("disk", &facts).await.unwrap();
            let frozen = &stack.chain().layers()[1].path;
            assert_eq!(fs::metadata(frozen).unwrap().len(), size);
            write_bytes(&stack, 2 * MIB, 4096).await;
            stack.image()
        })
        .map(|image| {
            block_on(Backend::Auto, async move {
                // As after a kill: it was not closed.
                let history = HistorySpec {
                    mode: HistoryMode::On,
                    file: Some(sidecar_of(&directory.path().join("disk.raw"))),
                    ..HistorySpec::default()
                };
                let stack = open(&image, HistoryUse::Kept(history), false).await;
                assert_eq!(stack.kept().unwrap().distrust, None);
                assert_eq!(changed(&stack).await, [2 * MIB]);
                stack.close().await.unwrap();
            })
            .unwrap();
        })
        .unwrap();
    }

    #[test]
    fn the_old_image_does_not_pass_for_the_disk() {
        let place = place();
        block_on(Backend::Auto, make(&place.disk, None, "1.1")).unwrap();
        block_on(Backend::Auto, session(&place, Until::Taken, "1.1")).unwrap();
        // With the disk's history, as when the snapshot is copied over the disk by hand.
        fs::copy(sidecar_of(&place.disk), sidecar_of(&place.parent)).unwrap();
        block_on(Backend::Auto, async {
            let stack = kept(&place.parent).await;
            let distrust = stack.kept().unwrap().distrust.clone().unwrap();
            assert!(distrust.contains("another moment"), "{distrust}");
            stack.close().await.unwrap();
        })
        .unwrap();
        // And with one of its own.
        fs::remove_file(sidecar_of(&place.parent)).unwrap();
        block_on(Backend::Auto, async {
            let stack = kept(&place.parent).await;
            assert_eq!(stack.kept().unwrap().distrust, None);
            assert!(stack.marks("parent").unwrap().is_empty());
            stack.close().await.unwrap();
        })
        .unwrap();
    }
}
