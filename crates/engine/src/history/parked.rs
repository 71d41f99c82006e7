//! What becomes of writes that a killed process had answered and not done.

use super::lot::{ParkedWrite, TmpfsLot};
use crate::EngineError;
use chain::Chain;
use disk::{Buf, ByteRange, Disk, DiskError, Operation, WriteFlags};
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use storage::FileStorage;
use tracking::{HistoryError, Tracked};

/// How long a parked write waits for others that share its sync. A sync takes about a tenth of that, and as much of the
/// processor as ten parked writes.
const COMPANY: Duration = Duration::from_millis(40);

/// A disk's lot, and what was found in it.
pub(super) struct Lot {
    lot: TmpfsLot,
    left: Vec<ParkedWrite>,
}

impl Lot {
    /// Opens the lot of a disk that is about to be written to. `None` where writes are not parked: there is no memory for
    /// them, or the image is a block device, of which nothing tells whether somebody else wrote to it after a kill.
    pub(super) async fn open(files: &[FileStorage]) -> Option<Self> {
        let image = files.first().filter(|image| !image.is_block_device())?.clone();
        let opened = dataplane::offload(move || {
            let facts = image.file().metadata()?;
            let (lot, left) = TmpfsLot::open(&facts)?;
            let stale = !left.is_empty() && lot.is_older_than(&facts)?;
            if stale {
                lot.empty()?;
            }
            Ok::<_, std::io::Error>((lot, left, stale))
        })
        .await;
        match opened {
            Ok((lot, left, false)) => Some(Self { lot, left }),
            Ok((lot, left, true)) => {
                tell_given_up(&left);
                Some(Self { lot, left: Vec::new() })
            }
            Err(error) => {
                tracing::info!(%error, "first writes after a mark wait for a sync: there is no memory to park them in");
                None
            }
        }
    }

    /// Gives up what was left: the image is not the one that it was meant for.
    pub(super) fn give_up(&mut self) -> Result<(), EngineError> {
        let left = std::mem::take(&mut self.left);
        if left.is_empty() {
            return Ok(());
        }
        tell_given_up(&left);
        self.lot.empty().map_err(|e| EngineError::file("parking lot", "empty", e))
    }

    /// Writes what was left, and parks the disk's first writes from now on.
    pub(super) async fn use_for(mut self, disk: &Rc<Tracked<Chain>>, image: &Path) -> Result<(), HistoryError> {
        let left = std::mem::take(&mut self.left);
        if !left.is_empty() {
            tell_put_back(image, &left);
            disk.put_back(left).await?;
            // Durable now; found once more after the next kill, it would undo what is written from here on.
            self.lot.empty().map_err(|e| DiskError::from_io(e, Operation::Write).on("parking lot"))?;
        }
        self.park(disk);
        Ok(())
    }

    /// Parks the disk's first writes from now on. Nothing was left.
    fn park(self, disk: &Rc<Tracked<Chain>>) {
        disk.park_in(
            Rc::new(self.lot),
            Rc::new(|task| {
                dataplane::start_local(task);
            }),
            Rc::new(|| Box::pin(dataplane::sleep(COMPANY))),
        );
    }

    /// Parks the first writes of a disk whose top image has these files now. The disk's own lot has been left, so what
    /// may be in this one belongs to another content.
    pub(super) async fn move_to(disk: &Rc<Tracked<Chain>>, files: &[FileStorage]) {
        if disk.is_parking() {
            return; // It is in use: what is there now is to be kept.
        }
        let Some(mut lot) = Self::open(files).await else { return };
        match lot.give_up() {
            Ok(()) => lot.park(disk),
            Err(error) => {
                tracing::warn!(error = crate::chain_text(&error), "first writes after a mark wait for a sync");
            }
        }
    }

    /// Writes what was left into a disk whose history is not kept.
    pub(super) async fn put_back(mut self, chain: &Chain, image: &Path) -> Result<(), EngineError> {
        let left = std::mem::take(&mut self.left);
        if left.is_empty() {
            return Ok(());
        }
        tell_put_back(image, &left);
        let size = chain.geometry().size;
        for (offset, bytes) in left {
            if !bytes.is_empty() && ByteRange::checked(offset, bytes.len() as u64).is_some_and(|r| r.end() <= size) {
                chain.write(offset, Buf::copy_of(&bytes), WriteFlags::default()).await?;
            }
        }
        chain.flush().await?;
        self.lot.empty().map_err(|e| EngineError::file("parking lot", "empty", e))
    }
}

/// Whether a killed process may have left writes of that image.
pub(crate) async fn may_be_parked(image: PathBuf) -> bool {
    dataplane::offload(move || fs::metadata(image).is_ok_and(|facts| TmpfsLot::may_hold(&facts))).await
}

/// Says that a reader does not see what a killed process has left; the reader has the image's lock, so nobody serves it.
pub(crate) async fn tell_of_parked(image: PathBuf) {
    if may_be_parked(image.clone()).await {
        tracing::warn!(
            image = %image.display(),
            "a killed process may have answered writes that are not in the image yet, and this reader does not see them; \
             to have them put back, serve the disk for writing once"
        );
    }
}

/// Forgets what a killed process has left of an image that has been replaced; who replaced it has its lock.
pub(crate) async fn forget_parked(image: PathBuf) {
    let forgotten = dataplane::offload(move || match fs::metadata(image) {
        Ok(facts) if TmpfsLot::may_hold(&facts) => TmpfsLot::open(&facts).and_then(|(lot, _)| lot.empty()),
        _ => Ok(()),
    });
    if let Err(error) = forgotten.await {
        tracing::warn!(%error, "parked writes of the replaced image are left");
    }
}

fn tell_put_back(image: &Path, left: &[ParkedWrite]) {
    let writes = left.len();
    tracing::warn!(image = %image.display(), writes, "putting back writes that a killed process had answered");
}

fn tell_given_up(left: &[ParkedWrite]) {
    let bytes: usize = left.iter().map(|(_, bytes)| bytes.len()).sum();
    tracing::error!(
        writes = left.len(),
        bytes,
        "writes that a killed process had answered and not done are given up: another program changed the image"
    );
}
