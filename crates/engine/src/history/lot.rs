//! The parking lot of a disk: a file in memory (tmpfs), which outlives this process and not the machine.

use disk::ByteRange;
use rustix::fs::{
    CWD, FallocateFlags, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, fallocate, fstat, fstatfs, futimens, openat,
    unlink,
};
use rustix::io::{pread, pwrite, pwritev};
use rustix::time::{ClockId, clock_gettime};
use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};
use tracking::ParkingLot;

/// Where memory is, as a rule.
const DIRECTORIES: [&str; 2] = ["/dev/shm", "/run"];
/// What `statfs` calls it.
const TMPFS: i64 = 0x0102_1994;
/// Writes that may be parked.
const SLOTS: usize = 256;
/// Bytes of the longest one. Longer ones are worth a wait.
const SLOT_BYTES: usize = 64 << 10;
/// Of a longer one the memory is given back at once: most disks park short ones alone, and keep theirs.
const KEPT_BYTES: usize = 12 << 10;
/// Nanoseconds between the last parking or sign and the end of the writes that go with it, and more.
const LATER: i128 = 3_000_000_000;
/// Between two signs that the disk is written to.
const SIGNS: Duration = Duration::from_millis(500);
/// Bytes of a slot's head: magic, checksum, offset, length.
const HEAD: usize = 32;
const MAGIC: u32 = 0x4b50_5748; // "HWPK"
const STRIDE: u64 = (SLOT_BYTES + 4096) as u64;
/// Bytes before the first slot: magic, and the birth of the image.
const FRONT: u64 = 4096;
const FRONT_MAGIC: [u8; 8] = *b"HWPARK64";

const fn place(slot: usize) -> u64 {
    FRONT + slot as u64 * STRIDE
}

fn name(device: u64, inode: u64) -> String {
    format!("highwater-{device:x}-{inode:x}.parked")
}

/// A file in memory with a slot for each parked write.
pub(super) struct TmpfsLot {
    file: OwnedFd,
    path: PathBuf,
    /// When the file's age was last made to say that the disk is written to.
    signed: Cell<Option<Duration>>,
    /// The slots that hold long writes.
    long: RefCell<[bool; SLOTS]>,
}

/// A write that an earlier process had parked.
pub(super) type ParkedWrite = (u64, Vec<u8>);

impl TmpfsLot {
    /// Opens the lot of an image, or makes it; and what an earlier process has left there.
    ///
    /// An inode's number is given again when its file is gone, so the image's birth is compared as well.
    ///
    /// # Errors
    /// When there is no memory that outlives the process, the file there is not ours, or the file system does not tell
    /// when the image was made.
    pub(super) fn open(image: &fs::Metadata) -> io::Result<(Self, Vec<ParkedWrite>)> {
        let birth = image.created()?.duration_since(UNIX_EPOCH).map_err(io::Error::other)?.as_nanos();
        Self::of(image.dev(), image.ino(), birth)
    }

    /// Whether an earlier process may have left something; nothing is made, and nothing opened.
    pub(super) fn may_hold(image: &fs::Metadata) -> bool {
        DIRECTORIES.iter().any(|directory| {
            let path = Path::new(directory).join(name(image.dev(), image.ino()));
            fs::symlink_metadata(path).is_ok_and(|lot| lot.len() > FRONT)
        })
    }

    fn of(device: u64, inode: u64, birth: u128) -> io::Result<(Self, Vec<ParkedWrite>)> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "no file system in memory");
        for directory in DIRECTORIES {
            match Self::open_in(Path::new(directory), device, inode, birth) {
                Ok(found) => return Ok(found),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn open_in(directory: &Path, device: u64, inode: u64, birth: u128) -> io::Result<(Self, Vec<ParkedWrite>)> {
        let path = directory.join(name(device, inode));
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(CWD, &path, flags, Mode::RUSR | Mode::WUSR)?;
        let refused =
            |why: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{}: {why}", path.display())));
        if fstatfs(&file)?.f_type != TMPFS {
            return refused("is not in memory");
        }
        // The directory may be open to all: what somebody else has put there must not reach the disk.
        let facts = fstat(&file)?;
        if facts.st_uid != rustix::process::geteuid().as_raw() || facts.st_mode & 0o7777 != 0o600 || facts.st_nlink != 1
        {
            return refused("belongs to somebody else");
        }
        let lot = Self { file, path, signed: Cell::default(), long: RefCell::new([false; SLOTS]) };
        let mut front = FRONT_MAGIC.to_vec();
        front.extend(birth.to_le_bytes());
        let mut found = vec![0; front.len()];
        let known = pread(&lot.file, &mut found, 0)? == front.len() && found == front;
        if !known {
            // Another image's, or a new one.
            lot.empty()?;
            if pwrite(&lot.file, &front, 0)? != front.len() {
                return Err(io::Error::from(io::ErrorKind::WriteZero));
            }
            return Ok((lot, Vec::new()));
        }
        let slots = usize::try_from(facts.st_size as u64 / STRIDE).unwrap_or(0).saturating_add(1).min(SLOTS);
        let left = (0..slots).filter_map(|slot| lot.read(slot)).collect();
        Ok((lot, left))
    }

    /// Whether a file was modified when nobody can have parked here any more.
    pub(super) fn is_older_than(&self, image: &fs::Metadata) -> io::Result<bool> {
        let facts = fstat(&self.file)?;
        let ours = i128::from(facts.st_mtime) * 1_000_000_000 + i128::from(facts.st_mtime_nsec);
        let theirs = i128::from(image.mtime()) * 1_000_000_000 + i128::from(image.mtime_nsec());
        Ok(theirs > ours + LATER)
    }

    /// Forgets all writes.
    pub(super) fn empty(&self) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(&self.file, FRONT)?)
    }

    /// Takes the file away, if nothing is parked.
    pub(super) fn remove_if_empty(&self) {
        if (0..SLOTS).all(|slot| self.read(slot).is_none()) {
            let _gone = unlink(&self.path);
        }
    }

    fn read(&self, slot: usize) -> Option<ParkedWrite> {
        let at = place(slot);
        let mut head = [0; HEAD];
        if pread(&self.file, &mut head, at).ok()? < HEAD {
            return None;
        }
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let len = word(16) as usize;
        if word(0) != MAGIC || len > SLOT_BYTES {
            return None;
        }
        let offset = u64::from(word(8)) | u64::from(word(12)) << 32;
        let mut bytes = vec![0; len];
        if pread(&self.file, &mut bytes, at + HEAD as u64).ok()? < len {
            return None;
        }
        // A kill amid the writing of a record leaves one that is not whole, and was not answered.
        let sum = crc32c::crc32c_append(crc32c::crc32c(&head[8..20]), &bytes);
        (sum == word(4) && ByteRange::checked(offset, len as u64).is_some()).then_some((offset, bytes))
    }
}

impl ParkingLot for TmpfsLot {
    fn slots(&self) -> usize {
        SLOTS
    }

    fn slot_bytes(&self) -> usize {
        SLOT_BYTES
    }

    fn put(&self, slot: usize, offset: u64, bytes: &[u8]) -> bool {
        let mut head = [0; HEAD];
        head[..4].copy_from_slice(&MAGIC.to_le_bytes());
        head[8..16].copy_from_slice(&offset.to_le_bytes());
        head[16..20].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
        let sum = crc32c::crc32c_append(crc32c::crc32c(&head[8..20]), bytes);
        head[4..8].copy_from_slice(&sum.to_le_bytes());
        let record = [IoSlice::new(&head), IoSlice::new(bytes)];
        self.long.borrow_mut()[slot] = bytes.len() > KEPT_BYTES;
        pwritev(&self.file, &record, place(slot)).is_ok_and(|written| written == HEAD + bytes.len())
    }

    fn get(&self, slot: usize) -> Option<Vec<u8>> {
        self.read(slot).map(|(_, bytes)| bytes)
    }

    fn clear(&self, slot: usize) -> bool {
        if !pwrite(&self.file, &[0; 4], place(slot)).is_ok_and(|written| written == 4) {
            return false;
        }
        if std::mem::take(&mut self.long.borrow_mut()[slot]) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _kept = fallocate(&self.file, flags, place(slot) + 4096, STRIDE - 4096);
        }
        true
    }

    fn sign(&self) {
        // Asked for twice with each write, and some milliseconds more or less are all the same.
        let now = clock_gettime(ClockId::MonotonicCoarse);
        let now = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32);
        if self.signed.get().is_some_and(|last| now.saturating_sub(last) < SIGNS) {
            return;
        }
        self.signed.set(Some(now));
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        // Too old a lot is given up, which is told.
        let _signed = futimens(&self.file, &Timestamps { last_access: now, last_modification: now });
    }
}

impl Drop for TmpfsLot {
    fn drop(&mut self) {
        self.remove_if_empty();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(inode: u64) -> (TmpfsLot, Vec<ParkedWrite>) {
        TmpfsLot::of(u64::from(std::process::id()), inode, 77).expect("tests need /dev/shm or /run in memory")
    }

    #[test]
    fn records_outlive_their_writer() {
        let (lot, left) = open(1);
        assert_eq!(left, []);
        assert!(lot.put(3, 1 << 40, &[7; 4096]) && lot.put(200, 5, b"x") && lot.put(0, 0, &[1; SLOT_BYTES]));
        assert_eq!(lot.get(200).as_deref(), Some(&b"x"[..]));
        assert!(lot.clear(0));
        // As a kill does: no destructor runs.
        std::mem::forget(lot);
        let (lot, left) = open(1);
        assert_eq!(left, [(1 << 40, vec![7; 4096]), (5, b"x".to_vec())]);
        assert!(lot.clear(3) && lot.clear(200));
        let path = lot.path.clone();
        drop(lot);
        assert!(!path.exists());
    }

    #[test]
    fn torn_records_and_strangers_are_not_believed() {
        let (lot, _) = open(2);
        assert!(lot.put(0, 8192, &[9; 4096]));
        pwrite(&lot.file, &[1], FRONT + HEAD as u64 + 100).unwrap();
        assert_eq!(lot.get(0), None);
        let path = lot.path.clone();
        rustix::fs::fchmod(&lot.file, Mode::from_raw_mode(0o644)).unwrap();
        std::mem::forget(lot);
        assert!(TmpfsLot::open_in(path.parent().unwrap(), u64::from(std::process::id()), 2, 77).is_err());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_sign_says_that_the_disk_is_written_to() {
        let (lot, _) = open(4);
        let long_ago = Timespec { tv_sec: 1_000_000, tv_nsec: 0 };
        futimens(&lot.file, &Timestamps { last_access: long_ago, last_modification: long_ago }).unwrap();
        let image = fs::metadata(&lot.path).unwrap();
        let written_to = std::env::temp_dir().join(format!("highwater-lot-{}", std::process::id()));
        fs::write(&written_to, "x").unwrap();
        let now = fs::metadata(&written_to).unwrap();
        fs::remove_file(written_to).unwrap();
        assert!(lot.is_older_than(&now).unwrap() && !lot.is_older_than(&image).unwrap());
        lot.sign();
        assert!(!lot.is_older_than(&now).unwrap());
    }

    #[test]
    fn what_an_image_may_have_left_is_seen_without_opening_it() {
        let image = std::env::temp_dir().join(format!("highwater-left-{}", std::process::id()));
        fs::write(&image, "x").unwrap();
        let facts = fs::metadata(&image).unwrap();
        fs::remove_file(image).unwrap();
        assert!(!TmpfsLot::may_hold(&facts));
        let (lot, _) = TmpfsLot::open(&facts).unwrap();
        assert!(!TmpfsLot::may_hold(&facts) && lot.put(0, 0, b"y") && TmpfsLot::may_hold(&facts));
        lot.empty().unwrap();
        assert!(!TmpfsLot::may_hold(&facts));
    }

    #[test]
    fn another_image_of_the_same_number_is_another_one() {
        let (lot, _) = open(3);
        assert!(lot.put(0, 8192, &[9; 4096]));
        std::mem::forget(lot);
        let (later, left) = TmpfsLot::of(u64::from(std::process::id()), 3, 78).unwrap();
        assert_eq!(left, []);
        assert!(later.put(5, 1, b"y"));
        std::mem::forget(later);
        let (_, left) = TmpfsLot::of(u64::from(std::process::id()), 3, 78).unwrap();
        assert_eq!(left, [(1, b"y".to_vec())]);
        let (lot, left) = open(3);
        assert_eq!(left, []);
        drop(lot);
    }
}
