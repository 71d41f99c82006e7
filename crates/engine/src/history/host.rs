//! A history's surroundings on this host.

use chain::Chain;
use disk::{DiskError, HistoryMark, LocalFuture, Operation, Result};
use std::cell::RefCell;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use storage::FileStorage;
use tracking::{Boot, Host, Id, ImageFacts, ImageMark};

/// Times of files have steps; a write this long after another bears another time.
const STEP: Duration = Duration::from_millis(20);

/// Clock, randomness, and the files of one disk.
pub(super) struct FileHost {
    chain: Rc<Chain>,
    /// The top image first.
    files: RefCell<Vec<FileStorage>>,
    sidecar: PathBuf,
    boot: Boot,
}

impl FileHost {
    /// Of a disk whose files are these, the top image first.
    pub(super) fn new(chain: Rc<Chain>, files: Vec<FileStorage>, sidecar: PathBuf) -> Self {
        Self { chain, files: RefCell::new(files), sidecar, boot: this_boot() }
    }

    /// The disk's files, the top image first.
    pub(super) fn files(&self) -> Vec<FileStorage> {
        self.files.borrow().clone()
    }

    /// Other files are the disk's now.
    pub(super) fn set_files(&self, files: Vec<FileStorage>) {
        *self.files.borrow_mut() = files;
    }
}

fn this_boot() -> Boot {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let id = Id::parse(&id.trim().replace('-', "")).unwrap_or(Id::NONE);
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let began = stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<u64>().ok());
    Boot { id, began: began.unwrap_or(0).saturating_mul(1000) }
}

fn nanoseconds(facts: &fs::Metadata) -> i64 {
    facts.mtime().saturating_mul(1_000_000_000).saturating_add(facts.mtime_nsec())
}

/// Sectors written to a block device, as the kernel counts them since the machine was started.
fn sectors_written(facts: &fs::Metadata) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(facts.rdev()), rustix::fs::minor(facts.rdev()));
    let stat = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    stat.split_whitespace().nth(6)?.parse().ok()
}

fn stat(file: &FileStorage) -> Result<fs::Metadata> {
    file.file().metadata().map_err(|e| DiskError::from_io(e, Operation::Open))
}

/// How a disk of these files looks, the top image first; no request is under way. Blocks.
pub(super) fn look(files: &[FileStorage]) -> Result<ImageFacts> {
    let [top, others @ ..] = files else {
        return Err(DiskError::from_io(io::Error::other("a disk without a file"), Operation::Open));
    };
    top.restore_ragged_size()?;
    let facts = stat(top)?;
    let block_device = facts.file_type().is_block_device();
    Ok(ImageFacts {
        device: if block_device { facts.rdev() } else { facts.dev() },
        inode: if block_device { 0 } else { facts.ino() },
        size: top.refresh()?,
        modified: if block_device { 0 } else { nanoseconds(&facts) },
        block_device,
        sectors_written: if block_device { sectors_written(&facts) } else { None },
        others: look_at_others(others)?,
    })
}

/// How the files below the top image look; no request is under way to them. Blocks.
pub(super) fn look_at_others(others: &[FileStorage]) -> Result<u64> {
    let mut sums = [0, !0];
    for other in others {
        other.restore_ragged_size()?;
        let facts = stat(other)?;
        for number in [facts.len(), nanoseconds(&facts) as u64] {
            sums = sums.map(|sum| crc32c::crc32c_append(sum, &number.to_le_bytes()));
        }
    }
    Ok(if others.is_empty() { 0 } else { u64::from(sums[0]) << 32 | u64::from(sums[1]) | 1 })
}

/// A random name.
pub(crate) fn random_id() -> Id {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    }
    Id(bytes)
}

impl Host for FileHost {
    fn now(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn boot(&self) -> Boot {
        self.boot
    }

    fn random_id(&self) -> Id {
        random_id()
    }

    fn facts(&self) -> LocalFuture<'_, Result<ImageFacts>> {
        let files = self.files();
        Box::pin(dataplane::offload(move || look(&files)))
    }

    fn mark(&self) -> Option<ImageMark> {
        let HistoryMark { lineage, moment } = self.chain.top().history_mark()?;
        Some(ImageMark { lineage: Id(lineage), moment: Id(moment) })
    }

    fn set_mark(&self, mark: ImageMark) -> LocalFuture<'_, Result<bool>> {
        let mark = HistoryMark { lineage: mark.lineage.0, moment: mark.moment.0 };
        Box::pin(async move { self.chain.top().set_history_mark(Some(mark)).await })
    }

    fn let_time_pass(&self) -> LocalFuture<'_, ()> {
        Box::pin(dataplane::sleep(STEP))
    }

    fn remove_sidecar(&self) -> LocalFuture<'_, Result<()>> {
        let path = self.sidecar.clone();
        Box::pin(dataplane::offload(move || {
            fs::remove_file(&path)
                .and_then(|()| crate::durable_file::sync_directory_of(&path))
                .map_err(|e| DiskError::from_io(e, Operation::Write).on(path.display().to_string()))
        }))
    }
}
