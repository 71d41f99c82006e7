//! The file beside an image that says what its header cannot: which images were made over it, and what it is.
//!
//! `IMAGE.identity` is beside the image itself: links that lead to the image are followed. It is JSON, replaced as a whole (`durable_file`): after a crash it is the old or the new one. Who changes it
//! holds a lock on its directory meanwhile, so that of two changes none is lost. It says what is known and decides
//! nothing alone: a child that it names counts only if that file still names the image as its parent. A damaged one is
//! told of and is no reason not to read the image.

use super::children::real;
use super::fingerprint::now;
use super::merging::{Absorbing, SameAs};
use crate::{EngineError, durable_file};
use disk::{ContentId, ParentLink};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use utoipa::ToSchema;

/// Largest file that is read.
const LARGEST: u64 = 1 << 20;
/// Children that are remembered.
const MOST_CHILDREN: usize = 4096;
/// How long another change of a file in the same directory is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(5);
/// The version of the file that is written here.
const VERSION: u32 = 1;

/// How good a snapshot is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotConsistency {
    /// As after a power cut.
    #[default]
    Crash,
    /// The guest's file systems were frozen.
    Frozen,
    /// The disk was not in use.
    Offline,
}

/// What is known of an image that is a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotFacts {
    /// Its name.
    pub name: String,
    /// The instant, in milliseconds since 1970.
    pub time: u64,
    /// How good it is.
    #[serde(default)]
    pub consistency: SnapshotConsistency,
    /// What the snapshots of several disks at one instant have in common.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
}

/// An image that was made over this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ChildEntry {
    /// Its file: relative to this image's directory if it is there or below, else from the root.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// When that was noted, in milliseconds since 1970.
    pub since: u64,
}

/// The hash of what an image shows, and of which state it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ContentHash {
    /// BLAKE3 over the hashes of the pieces, in hexadecimal digits (`docs/linkage.md`).
    pub blake3: String,
    /// Bytes of the disk that the image shows.
    pub disk_size: u64,
    /// The content's id then, if the image bore one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Bytes of the image's file then.
    pub size: u64,
    /// When the file was modified last, in nanoseconds since 1970.
    pub modified: i64,
    /// When the hash was taken, in milliseconds since 1970.
    pub taken: u64,
}

impl ContentHash {
    /// Whether it is of the content to which a child was bound.
    pub(crate) fn is_of(&self, link: &ParentLink) -> bool {
        let content = self.content.as_deref().and_then(ContentId::parse);
        content == link.parent && self.size == link.size && self.modified == link.modified
    }
}

/// The content of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct IdentityFile {
    version: u32,
    /// The images that were made over this one, as far as known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<ChildEntry>,
    /// What is known of it if it is a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotFacts>,
    /// The hash of its content, if one was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_hash: Option<ContentHash>,
    /// Where the disk is now, if it was moved away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved_to: Option<PathBuf>,
    /// The child whose bytes it is taking up, while that goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub absorbing: Option<Absorbing>,
    /// Images in whose place it stands.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub same_as: Vec<SameAs>,
    /// What another version put there.
    #[serde(flatten)]
    other: Map<String, Value>,
}

impl IdentityFile {
    fn is_empty(&self) -> bool {
        Self { version: 0, ..self.clone() } == Self::default()
    }
}

/// What was found beside an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityRead {
    /// No file, which says nothing.
    Missing,
    /// This.
    There(Box<IdentityFile>),
    /// A file that cannot be used, and why.
    Damaged(String),
}

impl IdentityRead {
    /// What the file says; nothing when there is none, or it is damaged.
    pub fn or_nothing(self) -> IdentityFile {
        match self {
            Self::There(file) => *file,
            Self::Missing | Self::Damaged(_) => IdentityFile::default(),
        }
    }
}

/// Where what is known of an image is kept.
pub fn identity_file_of(image: &Path) -> PathBuf {
    let mut name = image.file_name().unwrap_or_default().to_owned();
    name.push(".identity");
    image.with_file_name(name)
}

/// What is known of the image. Blocks, but not for what is no regular file.
///
/// # Errors
/// When the file is there and cannot be opened or read.
pub(crate) fn read_blocking(image: &Path) -> Result<IdentityRead, EngineError> {
    let file = identity_file_of(&real(image));
    let failed = |e| EngineError::file(&file, "read what is known of the image", e);
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let opened = match open(&file, flags, Mode::empty()) {
        Ok(opened) => File::from(opened),
        Err(rustix::io::Errno::NOENT) => return Ok(IdentityRead::Missing),
        Err(e) => return Err(failed(e.into())),
    };
    if !opened.metadata().map_err(failed)?.is_file() {
        return Ok(IdentityRead::Damaged("it is no regular file".to_owned()));
    }
    let mut text = Vec::new();
    opened.take(LARGEST + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > LARGEST {
        return Ok(IdentityRead::Damaged(format!("it has more than {LARGEST} bytes")));
    }
    Ok(match serde_json::from_slice::<IdentityFile>(&text) {
        Err(error) => IdentityRead::Damaged(error.to_string()),
        Ok(found) if found.version != VERSION => {
            IdentityRead::Damaged(format!("its version is {}, expected {VERSION}", found.version))
        }
        Ok(found) if found.children.len() > MOST_CHILDREN => {
            IdentityRead::Damaged(format!("it names more than {MOST_CHILDREN} children"))
        }
        Ok(found) => IdentityRead::There(Box::new(found)),
    })
}

/// What is known of the image.
///
/// # Errors
/// When the file is there and cannot be opened or read.
pub async fn read(image: &Path) -> Result<IdentityRead, EngineError> {
    let image = image.to_owned();
    dataplane::offload(move || read_blocking(&image)).await
}

/// Locks an image's directory until the file is dropped.
fn lock_directory_of(image: &Path) -> io::Result<File> {
    let directory = image.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = File::from(open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?);
    let began = Instant::now();
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(directory),
            Err(rustix::io::Errno::WOULDBLOCK) if began.elapsed() < PATIENCE => std::thread::sleep(PAUSE),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Changes what is known of the image; a file that says nothing any more is removed. A damaged one is put aside first, as
/// it may say something to somebody. Blocks.
pub(crate) fn change_blocking(image: &Path, change: impl FnOnce(&mut IdentityFile)) -> Result<(), EngineError> {
    let image = real(image);
    let file = identity_file_of(&image);
    let failed = |e| EngineError::file(&file, "write what is known of the image", e);
    let _lock = lock_directory_of(&image).map_err(failed)?;
    let old = match read_blocking(&image)? {
        IdentityRead::Missing => IdentityFile::default(),
        IdentityRead::There(old) => *old,
        IdentityRead::Damaged(reason) => {
            let mut aside = file.file_name().unwrap_or_default().to_owned();
            aside.push(format!(".damaged-{}", now() / 1000));
            let aside = file.with_file_name(aside);
            fs::rename(&file, &aside).map_err(failed)?;
            tracing::warn!(file = %file.display(), aside = %aside.display(), reason, "what was known of the image is damaged and put aside");
            IdentityFile::default()
        }
    };
    let mut new = old.clone();
    change(&mut new);
    new.version = VERSION;
    if new.is_empty() {
        return match fs::remove_file(&file) {
            Ok(()) => durable_file::sync_directory_of(&file).map_err(failed),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(failed(e)),
        };
    }
    if new == old {
        return Ok(());
    }
    let mut text = serde_json::to_vec_pretty(&new).map_err(|e| EngineError::Invalid(e.to_string()))?;
    text.push(b'\n');
    if text.len() as u64 > LARGEST {
        return Err(EngineError::Invalid(format!("{}: would have more than {LARGEST} bytes", file.display())));
    }
    durable_file::replace(&file, &text).map_err(failed)
}

/// Changes what is known of the image.
pub(crate) async fn change(
    image: &Path,
    change: impl FnOnce(&mut IdentityFile) + Send + 'static,
) -> Result<(), EngineError> {
    let image = image.to_owned();
    dataplane::offload(move || change_blocking(&image, change)).await
}

/// Says where the disk is now that was here.
///
/// # Errors
/// When the file cannot be written.
pub async fn set_moved_to(image: &Path, place: Option<PathBuf>) -> Result<(), EngineError> {
    change(image, |known| known.moved_to = place).await
}

/// Removes what is known of an image that is no more, as another one took its place.
pub(crate) async fn remove_of_replaced(image: PathBuf) {
    let removed = dataplane::offload(move || {
        let image = real(&image);
        let file = identity_file_of(&image);
        // Of two changes at a time none writes an old file back.
        let removed = lock_directory_of(&image).and_then(|_lock| match read_blocking(&image) {
            Ok(IdentityRead::There(_)) => fs::remove_file(&file),
            _ => Ok(()), // None, or nothing of ours.
        });
        removed.map_err(|e| (file, e))
    });
    if let Err((file, error)) = removed.await {
        tracing::warn!(file = %file.display(), %error, "what was known of the replaced image is left");
    }
}

/// Enters a child, and forgets those that are gone. `file`: as it is kept.
pub(crate) fn enter_child(known: &mut IdentityFile, directory: &Path, file: PathBuf) {
    if known.children.iter().any(|child| child.file == file) {
        return;
    }
    let gone = |child: &ChildEntry| matches!(directory.join(&child.file).symlink_metadata(), Err(e) if e.kind() == io::ErrorKind::NotFound);
    known.children.retain(|child| !gone(child));
    if known.children.len() == MOST_CHILDREN {
        let dropped = known.children.remove(0);
        tracing::warn!(child = %dropped.file.display(), "an image has more children than are remembered");
    }
    known.children.push(ChildEntry { file, since: now() });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_is_kept_and_an_empty_file_goes() {
        let place = tempfile::tempdir().expect("a directory");
        let image = place.path().join("base.qcow2");
        assert_eq!(read_blocking(&image).expect("read"), IdentityRead::Missing);
        change_blocking(&image, |_| {}).expect("nothing to write");
        assert!(!identity_file_of(&image).exists());
        let facts = SnapshotFacts { name: "s1".into(), time: 5, consistency: SnapshotConsistency::Frozen, set: None };
        let wanted = facts.clone();
        change_blocking(&image, |known| known.snapshot = Some(wanted)).expect("write");
        fs::write(place.path().join("child.qcow2"), b"").expect("file");
        for _ in 0..2 {
            change_blocking(&image, |known| enter_child(known, place.path(), "child.qcow2".into())).expect("write");
        }
        let IdentityRead::There(known) = read_blocking(&image).expect("read") else { panic!("it is there") };
        assert_eq!((known.snapshot.as_ref(), known.children.len()), (Some(&facts), 1));
        change_blocking(&image, |known| *known = IdentityFile::default()).expect("write");
        assert!(!identity_file_of(&image).exists());
    }

    #[test]
    fn a_damaged_file_is_told_of_and_put_aside() {
        let place = tempfile::tempdir().expect("a directory");
        let image = place.path().join("base.qcow2");
        for bad in [&b""[..], b"{", b"{}", b"[]", br#"{"version":2}"#, &vec![b' '; LARGEST as usize + 2], b"\xff"] {
            fs::write(identity_file_of(&image), bad).expect("file");
            let found = read_blocking(&image).expect("readable");
            assert!(matches!(found, IdentityRead::Damaged(_)), "{found:?}");
            assert_eq!(found.or_nothing(), IdentityFile::default());
        }
        change_blocking(&image, |known| known.moved_to = Some("/x".into())).expect("write");
        let names: Vec<_> = fs::read_dir(place.path()).expect("list").map(|e| e.expect("entry").file_name()).collect();
        assert!(names.iter().any(|name| name.to_string_lossy().contains(".identity.damaged-")), "{names:?}");
        assert!(matches!(read_blocking(&image).expect("read"), IdentityRead::There(_)));
    }

    #[test]
    fn a_pipe_is_not_waited_for() {
        let place = tempfile::tempdir().expect("a directory");
        let image = place.path().join("base.qcow2");
        let made = std::process::Command::new("mkfifo").arg(identity_file_of(&image)).status();
        assert!(made.expect("mkfifo").success());
        assert!(matches!(read_blocking(&image).expect("told of"), IdentityRead::Damaged(_)));
    }

    #[test]
    fn links_lead_to_what_is_known_of_the_image_itself() {
        let place = tempfile::tempdir().expect("a directory");
        let (image, link) = (place.path().join("images/base.qcow2"), place.path().join("link.qcow2"));
        fs::create_dir(place.path().join("images")).expect("a directory");
        fs::write(&image, b"").expect("file");
        std::os::unix::fs::symlink("images/base.qcow2", &link).expect("link");
        change_blocking(&link, |known| known.moved_to = Some("/x".into())).expect("write");
        assert_eq!(read_blocking(&link).expect("read"), read_blocking(&image).expect("read"));
        assert!(identity_file_of(&image).exists() && !identity_file_of(&link).exists());
    }

    #[test]
    fn what_another_version_put_there_stays() {
        let place = tempfile::tempdir().expect("a directory");
        let image = place.path().join("base.qcow2");
        fs::write(identity_file_of(&image), br#"{"version":1,"owner":{"host":"a"}}"#).expect("file");
        change_blocking(&image, |known| known.moved_to = Some("/x".into())).expect("write");
        let text = fs::read_to_string(identity_file_of(&image)).expect("text");
        assert!(text.contains("\"owner\"") && text.contains("\"moved-to\""), "{text}");
    }

    #[test]
    fn of_changes_at_the_same_time_none_is_lost() {
        let place = tempfile::tempdir().expect("a directory");
        let image = place.path().join("base.qcow2");
        let names: Vec<String> = (0..24).map(|n| format!("child{n}.qcow2")).collect();
        for name in &names {
            fs::write(place.path().join(name), b"").expect("file");
        }
        std::thread::scope(|scope| {
            for name in &names {
                let (image, directory) = (&image, place.path());
                scope.spawn(move || {
                    change_blocking(image, |known| enter_child(known, directory, name.into())).expect("write");
                });
            }
        });
        assert_eq!(read_blocking(&image).expect("read").or_nothing().children.len(), names.len());
        fs::remove_file(place.path().join(&names[0])).expect("remove");
        change_blocking(&image, |known| enter_child(known, place.path(), "base.qcow2.identity".into())).expect("write");
        let children = read_blocking(&image).expect("read").or_nothing().children;
        assert!(children.len() == names.len() && !children.iter().any(|c| c.file == Path::new(&names[0])), "gone");
    }
}
