//! What can go wrong in the control path.

use crate::linkage::LinkFault;
use disk::DiskError;
use repository::RepositoryError;
use std::fmt;
use std::fs::FileType;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use tracking::HistoryError;

/// A failed operation of the engine. Texts name the object, what was expected, what was found and the next
/// step; the cause is in `source`.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No disk of that name.
    #[error("there is no disk {0:?}; `highwater disk list` shows all")]
    NoSuchDisk(String),
    /// The name is taken.
    #[error("there is a disk {0:?} already; choose another name or remove it first")]
    DiskExists(String),
    /// The name has characters that names do not have.
    #[error("{0:?} is not a disk name: expected 1 to 64 of a-z A-Z 0-9 . _ -")]
    BadName(String),
    /// The disk is on its way in or out.
    #[error("disk {name:?} is {state}; try again when that is done")]
    Busy {
        /// The disk.
        name: String,
        /// What it is doing.
        state: &'static str,
    },
    /// The disk is known but could not be opened.
    #[error("disk {name:?} is not open ({error}); when that is mended, open it with `highwater disk open {name}`")]
    NotOpen {
        /// The disk.
        name: String,
        /// Why.
        error: String,
    },
    /// The disk is what `highwater serve` was started for.
    #[error("disk {0:?} is what this `highwater serve` serves; end that process instead")]
    Pinned(String),
    /// A file that work is to be done on is the image of a disk.
    #[error(
        "{} is the image of disk {disk:?}, which is open; name the disk instead of the file, or remove it first",
        file.display()
    )]
    HeldByDisk {
        /// The file.
        file: PathBuf,
        /// The disk.
        disk: String,
    },
    /// No export of that name.
    #[error("disk {disk:?} has no export {export:?}")]
    NoSuchExport {
        /// The disk.
        disk: String,
        /// The export asked for.
        export: String,
    },
    /// Neither one export nor all were named.
    #[error("which export of disk {0:?} is to be closed is not said: give its name, or say that all are meant")]
    WhichExport(String),
    /// Nothing is served there.
    #[error("nothing is served at this path with this method; see /openapi.json")]
    NoSuchPath,
    /// No job of that number.
    #[error("there is no job {0}; it may have ended long ago")]
    NoSuchJob(u64),
    /// The job has ended.
    #[error("job {0} has ended already; forget it with `highwater jobs forget {0}`")]
    JobEnded(u64),
    /// The job is at work.
    #[error("job {0} is running; stop it with `highwater jobs cancel {0}` first")]
    JobRunning(u64),
    /// The job was interrupted and is of a kind that cannot go on.
    #[error(
        "job {id} ({kind}) was interrupted by the end of the daemon and cannot go on from there; start it anew and forget \
         this one with `highwater jobs forget {id}`"
    )]
    JobNotResumable {
        /// The job.
        id: u64,
        /// What it is.
        kind: &'static str,
    },
    /// Too many jobs.
    #[error("{0} jobs are running, which is the most; try again when one has ended")]
    TooManyJobs(usize),
    /// No repository is there.
    #[error("{}: no repository is there; make one with `highwater repo init`", .directory.display())]
    NoRepository {
        /// Where.
        directory: PathBuf,
    },
    /// A repository failed.
    #[error("repository {}", .directory.display())]
    Repository {
        /// Which.
        directory: PathBuf,
        /// Why.
        source: Box<RepositoryError>,
    },
    /// Nothing is begun any more.
    #[error("the daemon ends; try again when it has started anew")]
    DaemonEnds,
    /// The export's name is taken on that address.
    #[error("there is an export {export:?} on {endpoint} already; give another name or address")]
    ExportExists {
        /// The export.
        export: String,
        /// Where.
        endpoint: String,
    },
    /// An address cannot be listened on, or not with these settings.
    #[error("cannot listen on {endpoint}")]
    Listen {
        /// The address.
        endpoint: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The same address was asked for with different TLS settings.
    #[error("{endpoint} is open already with other TLS settings; give the same ones or another address")]
    TlsDiffers {
        /// The address.
        endpoint: String,
    },
    /// The same socket was asked for with another mode or group.
    #[error("{endpoint} is open already with another mode or group; give the same ones or another socket")]
    SocketDiffers {
        /// The socket.
        endpoint: String,
    },
    /// Certificates cannot be used.
    #[error("TLS directory {}: {reason}", dir.display())]
    Tls {
        /// The directory.
        dir: PathBuf,
        /// Why.
        reason: String,
    },
    /// The format was not given and the file's name does not tell it.
    #[error("{}: the name does not tell the format; give -f raw or -f qcow2", file.display())]
    FormatUnknown {
        /// The file.
        file: PathBuf,
    },
    /// The name says raw, the content looks like something else.
    #[error(
        "{}: the name says raw but the file begins like a qcow2 image; give -f qcow2 or -f raw",
        file.display()
    )]
    FormatDoubtful {
        /// The file.
        file: PathBuf,
    },
    /// The format is said to be qcow2, and the content is not.
    #[error("{}: is not a qcow2 image: it does not begin like one; give -f raw if it is a raw image", file.display())]
    NotQcow2 {
        /// The file.
        file: PathBuf,
    },
    /// A directory, pipe, socket or the like.
    #[error("{}: is {found}; an image is a regular file or a block device", file.display())]
    NotAnImageFile {
        /// What was named.
        file: PathBuf,
        /// What it is.
        found: FileKind,
    },
    /// A file stands where one is to be made.
    #[error("{}: {what}", file.display())]
    Taken {
        /// The file.
        file: PathBuf,
        /// What it is for, and the next step.
        what: &'static str,
    },
    /// The layer of a snapshot whose deletion was cut off.
    #[error(
        "{}: does not hold snapshot {snapshot:?} any more, as its deletion was begun; end that with `highwater snapshot delete`",
        image.display()
    )]
    HalfMerged {
        /// The layer.
        image: PathBuf,
        /// The snapshot.
        snapshot: String,
    },
    /// Other work on a disk's layers is under way.
    #[error("{}: {word}; wait for the end of that job, or cancel it (`highwater jobs list`)", image.display())]
    Rearranging {
        /// The image.
        image: PathBuf,
        /// What is done to it.
        word: &'static str,
    },
    /// Somebody uses the disk.
    #[error("somebody is connected to disk {0:?}, whose content must not change under him; shut the guest down first")]
    Connected(String),
    /// No snapshot of that name.
    #[error("{disk} has no snapshot {snapshot:?}; `highwater snapshot list` shows all")]
    NoSuchSnapshot {
        /// The disk.
        disk: String,
        /// The snapshot asked for.
        snapshot: String,
    },
    /// A request that contradicts itself or the rules.
    #[error("{0}")]
    Invalid(String),
    /// Something this build or format does not do.
    #[error("{0}")]
    Unsupported(String),
    /// An image's data path failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A file that an image needs, its parent for example.
    #[error("{}: a file that it needs cannot be used", image.display())]
    Needed {
        /// The image.
        image: PathBuf,
        /// Why, and which file.
        #[source]
        source: DiskError,
    },
    /// A file of the operating system.
    #[error("{}: {doing}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The catalogue cannot be used.
    #[error("catalogue {}: {reason}", file.display())]
    Catalogue {
        /// The file.
        file: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Somebody asked for the work to stop.
    #[error("cancelled")]
    Cancelled,
    /// A copy that did not come to its end.
    #[error("{}: {}", target.display(), if *removed {
        "the copy did not come to its end, and the file was removed again"
    } else {
        "the copy is incomplete; do not use it, convert again"
    })]
    Unfinished {
        /// Where the copy was to be.
        target: PathBuf,
        /// Whether the target is gone; one that was there before the copy is left as far as it got.
        removed: bool,
        /// What ended it.
        #[source]
        source: Box<EngineError>,
    },
    /// A guest's agent did not do what it was told, or could not be reached.
    #[error("guest agent {}: {reason}", socket.display())]
    GuestAgent {
        /// The agent's socket.
        socket: PathBuf,
        /// What failed and what to do.
        reason: String,
    },
    /// A guest was not frozen as long as it should have been.
    #[error(
        "guest agent {}: the guest was not frozen all the time: {reason}; what was made meanwhile is as after a power \
         cut, not consistent for applications",
        socket.display()
    )]
    NotFrozenThroughout {
        /// The agent's socket.
        socket: PathBuf,
        /// Why.
        reason: String,
    },
    /// A disk has no history.
    #[error("{}: no history is kept: {reason}", image.display())]
    NoHistory {
        /// The image.
        image: PathBuf,
        /// Why.
        reason: String,
    },
    /// No view of that name.
    #[error("there is no view {0:?}; `highwater views list` shows all")]
    NoSuchView(String),
    /// A history cannot do what it was asked for.
    #[error("history {}: {source}", file.display())]
    History {
        /// The sidecar.
        file: PathBuf,
        /// Why.
        source: tracking::HistoryError,
    },
    /// A parent is not what its child was bound to.
    #[error("{0}")]
    Linkage(Box<LinkFault>),
    /// Nothing proves that a faulty link is sound.
    #[error("{fault}; {}", if *differs {
        "the hash of its content is not the recorded one, so it holds something else"
    } else {
        "no hash was recorded of what the child was bound to, so nothing can prove that it is the same"
    })]
    Unproven {
        /// The link.
        fault: Box<LinkFault>,
        /// Whether a hash was recorded, and it is another.
        differs: bool,
    },
    /// An image that is to be written to is the parent of others.
    #[error("{}: is the parent of {}{}, which would show something else if it were written to", image.display(),
        child.display(), match others { 0 => String::new(), n => format!(" and {n} more") })]
    HasChildren {
        /// The image.
        image: PathBuf,
        /// A child.
        child: PathBuf,
        /// How many more there are.
        others: usize,
    },
    /// An I/O thread ended.
    #[error("an i/o thread has ended; restart the daemon")]
    ThreadGone,
    /// The disk's I/O threads could not be started.
    #[error("cannot start the i/o threads")]
    Threads(#[source] io::Error),
}

/// What a path leads to when it is no image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileKind(&'static str);

impl From<FileType> for FileKind {
    fn from(kind: FileType) -> Self {
        Self(if kind.is_dir() {
            "a directory"
        } else if kind.is_fifo() {
            "a pipe"
        } else if kind.is_socket() {
            "a socket"
        } else if kind.is_char_device() {
            "a character device"
        } else {
            "something else"
        })
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// A class of errors, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// The named thing does not exist.
    NotFound,
    /// It exists already, or is in a state that forbids this.
    Conflict,
    /// The request makes no sense.
    Invalid,
    /// Another process holds it.
    InUse,
    /// Not something that Highwater does.
    Unsupported,
    /// An image contradicts its format.
    Corrupt,
    /// Space, memory or a bound is exhausted.
    NoSpace,
    /// Stopped on request.
    Cancelled,
    /// The rest: the operating system or the device failed.
    Failed,
}

impl ErrorClass {
    /// The word in an API error's `kind`.
    pub const fn word(self) -> &'static str {
        match self {
            Self::NotFound => "not-found",
            Self::Conflict => "conflict",
            Self::Invalid => "invalid",
            Self::InUse => "in-use",
            Self::Unsupported => "unsupported",
            Self::Corrupt => "corrupt",
            Self::NoSpace => "no-space",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

impl EngineError {
    /// For an operating-system failure on a file.
    pub fn file(file: impl Into<PathBuf>, doing: &'static str, source: io::Error) -> Self {
        Self::File { file: file.into(), doing, source }
    }

    /// Which class it belongs to.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::NoSuchDisk(_)
            | Self::NoSuchView(_)
            | Self::NoSuchExport { .. }
            | Self::NoSuchJob(_)
            | Self::NoSuchSnapshot { .. }
            | Self::NoRepository { .. }
            | Self::NoSuchPath => ErrorClass::NotFound,
            Self::DiskExists(_)
            | Self::Busy { .. }
            | Self::NotOpen { .. }
            | Self::Pinned(_)
            | Self::JobEnded(_)
            | Self::JobRunning(_)
            | Self::JobNotResumable { .. }
            | Self::TooManyJobs(_)
            | Self::DaemonEnds
            | Self::ExportExists { .. }
            | Self::SocketDiffers { .. }
            | Self::Taken { .. }
            | Self::Rearranging { .. }
            | Self::HalfMerged { .. }
            | Self::TlsDiffers { .. }
            | Self::Linkage(_)
            | Self::Unproven { .. }
            | Self::HasChildren { .. } => ErrorClass::Conflict,
            Self::HeldByDisk { .. } | Self::Connected(_) => ErrorClass::InUse,
            Self::BadName(_)
            | Self::WhichExport(_)
            | Self::NotQcow2 { .. }
            | Self::NotAnImageFile { .. }
            | Self::FormatUnknown { .. }
            | Self::FormatDoubtful { .. }
            | Self::Invalid(_)
            | Self::Tls { .. } => ErrorClass::Invalid,
            Self::Unsupported(_) => ErrorClass::Unsupported,
            Self::Cancelled => ErrorClass::Cancelled,
            Self::Unfinished { source, .. } => source.class(),
            Self::NoHistory { .. } => ErrorClass::Unsupported,
            Self::History { source, .. } => match source {
                HistoryError::NoSuchPoint { .. } => ErrorClass::NotFound,
                HistoryError::PointExists { .. } | HistoryError::Refused { .. } | HistoryError::Stopped { .. } => {
                    ErrorClass::Conflict
                }
                HistoryError::BadName { .. } | HistoryError::Order { .. } => ErrorClass::Invalid,
                HistoryError::TooManyPoints => ErrorClass::NoSpace,
                HistoryError::Damaged(_) => ErrorClass::Corrupt,
                HistoryError::Disk(_) => ErrorClass::Failed,
            },
            Self::Disk(error) | Self::Needed { source: error, .. } => match error.kind() {
                disk::ErrorKind::NotFound => ErrorClass::NotFound,
                disk::ErrorKind::InUse => ErrorClass::InUse,
                disk::ErrorKind::Unsupported => ErrorClass::Unsupported,
                disk::ErrorKind::Corrupt => ErrorClass::Corrupt,
                disk::ErrorKind::NoSpace | disk::ErrorKind::NoMemory => ErrorClass::NoSpace,
                disk::ErrorKind::Invalid | disk::ErrorKind::OutOfRange => ErrorClass::Invalid,
                disk::ErrorKind::ReadOnly | disk::ErrorKind::Closed => ErrorClass::Conflict,
                disk::ErrorKind::Io | disk::ErrorKind::Poisoned | disk::ErrorKind::NotFast => ErrorClass::Failed,
            },
            Self::File { source, .. } | Self::Listen { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => ErrorClass::NotFound,
                io::ErrorKind::AddrInUse => ErrorClass::InUse,
                io::ErrorKind::StorageFull => ErrorClass::NoSpace,
                _ => ErrorClass::Failed,
            },
            Self::Repository { source, .. } => match &**source {
                RepositoryError::NoRepository { .. } | RepositoryError::NoPoint { .. } => ErrorClass::NotFound,
                RepositoryError::Exists { .. }
                | RepositoryError::Busy { .. }
                | RepositoryError::LeaseLost { .. }
                | RepositoryError::Poisoned => ErrorClass::Conflict,
                RepositoryError::WrongKey { .. } | RepositoryError::Invalid(_) => ErrorClass::Invalid,
                RepositoryError::Damaged(_) => ErrorClass::Corrupt,
                _ => ErrorClass::Failed,
            },
            Self::Catalogue { .. }
            | Self::GuestAgent { .. }
            | Self::NotFrozenThroughout { .. }
            | Self::ThreadGone
            | Self::Threads(_) => ErrorClass::Failed,
        }
    }
}

impl EngineError {
    /// What to do next, where that is known and not part of the text.
    pub fn next_step(&self) -> Option<String> {
        match self {
            Self::Linkage(fault) => return Some(fault.next_step()),
            Self::Unproven { fault, .. } => {
                let child = fault.child.display();
                return Some(format!(
                    "put the right parent back, or bind the child to the parent as it is with `highwater chain accept {child}`"
                ));
            }
            Self::HasChildren { image, child, .. } => {
                let (image, child) = (image.display(), child.display());
                return Some(format!(
                    "write to a new image over it instead; or give the child another parent (`highwater chain rebase {child}`), \
                     remove it, or forget it (`highwater chain forget {image} {child}`)"
                ));
            }
            // It names the next step itself, and no image is to be checked.
            Self::Repository { .. } => return None,
            _ => {}
        }
        if let Self::History { source, .. } = self {
            let step = match source {
                HistoryError::Refused { .. } => {
                    "copy the whole disk and take a new mark, or accept the image as it is with `highwater marks trust`"
                }
                HistoryError::NoSuchPoint { .. } => "`highwater marks list` shows all",
                _ => return None,
            };
            return Some(step.to_owned());
        }
        match self.class() {
            ErrorClass::Corrupt => {
                let file = match self {
                    Self::Disk(error) | Self::Needed { source: error, .. } => error.object().unwrap_or("FILE"),
                    _ => "FILE",
                };
                Some(format!("run `highwater check {file}` while nobody uses it"))
            }
            ErrorClass::NoSpace => Some("make room and try again".to_owned()),
            _ => None,
        }
    }
}

/// The whole chain of causes in one line.
pub fn chain_text(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    text
}
