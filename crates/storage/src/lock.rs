//! QEMU's image locks: byte-range locks of the open file description (OFD) far from any data's meaning.
//!
//! Each user of an image holds a shared lock at byte 100 + *p* for every permission *p* that it uses, and at
//! 200 + *p* for every one that others must not use. A demand is refused when somebody holds the opposite
//! byte. Nobody ever holds an exclusive lock; one is only tested for. (QEMU, `block/file-posix.c`.)
#![allow(unsafe_code)] // fcntl with a struct flock; argued at its block.

use crate::{LockMode, OpenOptions};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// First byte of the permissions in use (`RAW_LOCK_PERM_BASE`).
const USED: i64 = 100;
/// First byte of the permissions that others must not use (`RAW_LOCK_SHARED_BASE`).
const REFUSED: i64 = 200;

/// QEMU's permissions on an image (`BLK_PERM_*`), as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Permissions(u8);

impl Permissions {
    const NONE: Self = Self(0);
    const CONSISTENT_READ: Self = Self(1);
    const WRITE: Self = Self(1 << 1);
    // Bit 2 is "write unchanged": copying on read, rebasing. Nobody here does or refuses it.
    const RESIZE: Self = Self(1 << 3);

    const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn each(self) -> impl Iterator<Item = i64> {
        (0..8).filter(move |bit| self.0 & (1 << bit) != 0)
    }
}

/// The name of a permission in messages.
fn permission_name(bit: i64) -> &'static str {
    match bit {
        0 => "consistent read",
        1 => "write",
        2 => "write unchanged",
        3 => "resize",
        _ => "unknown",
    }
}

/// What a user of an image does, and what it does not bear beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    uses: Permissions,
    refuses: Permissions,
}

impl Demand {
    /// Nothing.
    pub const NOTHING: Self = Self { uses: Permissions::NONE, refuses: Permissions::NONE };
    /// As a writable qcow2 image of a QEMU guest.
    pub const WRITER: Self = Self {
        uses: Permissions::CONSISTENT_READ.and(Permissions::WRITE).and(Permissions::RESIZE),
        refuses: Permissions::WRITE.and(Permissions::RESIZE),
    };
    /// As a read-only image or a backing file of a QEMU guest: other readers are welcome, a writer is not.
    pub const READER: Self =
        Self { uses: Permissions::CONSISTENT_READ, refuses: Permissions::WRITE.and(Permissions::RESIZE) };
    /// As `qemu-img -U`: reads, beside whoever is there.
    pub const FORCED_READER: Self = Self { uses: Permissions::CONSISTENT_READ, refuses: Permissions::NONE };

    pub(crate) fn of(options: &OpenOptions) -> Self {
        match options.lock {
            LockMode::Off => Self::NOTHING,
            LockMode::ForceShare if options.read_only => Self::FORCED_READER,
            LockMode::Qemu if options.read_only => Self::READER,
            LockMode::Qemu | LockMode::ForceShare => Self::WRITER,
        }
    }
}

/// Why a lock was not got.
#[derive(Debug)]
pub enum LockError {
    /// Somebody holds the opposite.
    Held(Held),
    /// The system failed.
    Io(io::Error),
}

/// A conflict with another user of the image.
#[derive(Debug)]
pub struct Held {
    /// The permission in question.
    permission: &'static str,
    /// Whether the other one uses it (true), or does not let us use it.
    used: bool,
    /// Processes that hold locks on the file, with their names.
    holders: Vec<(u32, String)>,
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.holders.as_slice() {
            [] => write!(f, "in use by another process")?,
            holders => {
                write!(f, "in use by ")?;
                for (n, (pid, name)) in holders.iter().enumerate() {
                    let comma = if n > 0 { ", " } else { "" };
                    if *pid == std::process::id() {
                        write!(f, "{comma}this process ({pid})")?;
                    } else {
                        write!(f, "{comma}process {pid} ({name})")?;
                    }
                }
            }
        }
        let permission = self.permission;
        if self.used {
            write!(f, ", which holds its \"{permission}\" lock; end that use first")
        } else {
            write!(f, ", which does not share the \"{permission}\" lock; end that use first, or open read-only")
        }
    }
}

fn ofd(file: &File, command: libc::c_int, kind: libc::c_int, byte: i64) -> io::Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the commands used take a `struct flock`, which lives across the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(lock),
    }
}

/// Takes the locks on the file's description: they last until its last descriptor is closed. Locks that
/// were taken before a refusal stay until then, so a refused file has to be closed.
///
/// # Errors
/// When somebody holds the opposite. A file system without such locks is left unlocked, with a warning, as
/// QEMU does.
pub fn acquire(file: &File, demand: Demand) -> Result<(), LockError> {
    let wanted = demand.uses.each().map(|bit| USED + bit).chain(demand.refuses.each().map(|bit| REFUSED + bit));
    for byte in wanted {
        if let Err(error) = ofd(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte) {
            return match error.raw_os_error() {
                // Exclusive, so not QEMU's way, but somebody's.
                Some(libc::EAGAIN | libc::EACCES) => Err(LockError::Held(held(file, byte % 100, byte < REFUSED))),
                Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP) => {
                    tracing::warn!(%error, "the file system has no OFD locks: the image is not protected");
                    Ok(())
                }
                _ => Err(LockError::Io(error)),
            };
        }
    }
    // Only now, so that of two who come at the same time at least one sees the other.
    let opposite = demand
        .uses
        .each()
        .map(|bit| (REFUSED + bit, bit, false))
        .chain(demand.refuses.each().map(|bit| (USED + bit, bit, true)));
    for (byte, bit, used) in opposite {
        let found = ofd(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte).map_err(LockError::Io)?;
        if libc::c_int::from(found.l_type) != libc::F_UNLCK {
            return Err(LockError::Held(held(file, bit, used)));
        }
    }
    Ok(())
}

/// Gives up what is held beyond `demand`, and takes what is missing of it.
///
/// What both have in common is held all the time.
///
/// # Errors
/// As [`acquire`]; the file then has the locks that it could get.
pub fn change(file: &File, demand: Demand) -> Result<(), LockError> {
    for bit in 0..8 {
        let permission = Permissions(1 << bit);
        for (base, kept) in [(USED, demand.uses), (REFUSED, demand.refuses)] {
            if kept.0 & permission.0 == 0 {
                match ofd(file, libc::F_OFD_SETLK, libc::F_UNLCK, base + bit) {
                    Err(error)
                        if !matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP)) =>
                    {
                        return Err(LockError::Io(error));
                    }
                    _ => {}
                }
            }
        }
    }
    acquire(file, demand)
}

fn held(file: &File, bit: i64, used: bool) -> Held {
    Held { permission: permission_name(bit), used, holders: holders(file) }
}

/// Who holds OFD locks on the file, as far as this process may look. The locks themselves carry no process.
fn holders(file: &File) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    let Ok(ours) = file.metadata() else { return found };
    let own = (std::process::id(), file.as_raw_fd());
    let Ok(processes) = std::fs::read_dir("/proc") else { return found };
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(fds) = std::fs::read_dir(process.path().join("fd")) else { continue };
        for fd in fds.flatten() {
            let Some(number) = fd.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            if (pid, number) == own {
                continue;
            }
            let same = std::fs::metadata(fd.path()).is_ok_and(|m| (m.dev(), m.ino()) == (ours.dev(), ours.ino()));
            let info = process.path().join("fdinfo").join(fd.file_name());
            let locked = || std::fs::read_to_string(info).is_ok_and(|info| info.contains("OFDLCK"));
            if same && locked() {
                let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                found.push((pid, name.trim_end().to_owned()));
                break;
            }
        }
    }
    found
}
