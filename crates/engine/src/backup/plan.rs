//! What a backup is built upon, and how each disk's changes are known.
//!
//! A consumer of a history remembers one mark. Here the repository remembers it: a point's disk names the mark that was taken for it, by
//! name and id, and the history's lineage. If the disk's history still has that very mark, and trusts it, what has changed since is
//! known. In any other case all of the disk is read, and compared with the point's hashes: never is a leaf inherited on faith.

use super::pass::Between;
use super::{BackupHow, BackupKind, RepositorySpec, user_directories};
use crate::EngineError;
use crate::history::host::random_id;
use crate::history::report::MarkReport;
use crate::images::stack::Stack;
use repository::{DiskPlan, Id, Made, Point, PointDisk, Repository};
use std::path::PathBuf;

/// Names of what a point's disk remembers.
const MARK: &str = "mark";
const MARK_ID: &str = "mark-id";
const LINEAGE: &str = "lineage";
const FORMAT: &str = "format";
const FILE: &str = "file";

const ASKED_FOR: &str = "that was asked for";

/// An open repository, and what the machine has in it.
pub(super) struct Base {
    pub(super) repository: Repository,
    /// The machine's newest point that can be read.
    predecessor: Option<Point>,
    /// Marks of this machine's backups to this repository begin like this.
    prefix: String,
    /// Of the mark of this backup.
    pub(super) mark: String,
}

/// How a disk is to be read.
#[derive(Clone, Debug)]
pub(super) struct Decision {
    pub(super) kind: BackupKind,
    /// Why it is not incremental, when there is a disk to build upon.
    pub(super) reason: Option<String>,
    since: Option<String>,
}

impl Decision {
    /// The same where no mark could be taken: what changes while it is read would not be known.
    pub(super) fn without_mark(self) -> Self {
        match self.since {
            None => self,
            Some(_) => Self {
                kind: BackupKind::Compared,
                reason: Some("another disk of the machine has no history, so that no mark was taken".to_owned()),
                since: None,
            },
        }
    }

    /// The marks between which the disk changed.
    pub(super) fn between(&self, until: &str) -> Option<Between> {
        self.since.clone().map(|since| Between { since, until: until.to_owned() })
    }
}

impl Base {
    /// Opens the repository. Blocks.
    pub(super) fn open(spec: &RepositorySpec, machine: &str) -> Result<Self, EngineError> {
        let repository = spec.open()?;
        let mut predecessor = None;
        // One by one, as each may have megabytes beside its disks.
        for id in repository.point_ids().map_err(|e| spec.failed(e))?.into_iter().rev() {
            match repository.point(id) {
                Ok(point) if point.machine == machine => {
                    predecessor = Some(Point { attachments: Vec::new(), ..point });
                    break;
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(point = %id, %error, "a restore point cannot be read"),
            }
        }
        let prefix = format!("backup-{}-{}-", short(repository.id()), &blake3::hash(machine.as_bytes()).to_hex()[..8]);
        let mark = format!("{prefix}{}", &random_id().to_string()[..8]);
        Ok(Self { repository, predecessor, prefix, mark })
    }

    pub(super) fn predecessor(&self) -> Option<Id> {
        self.predecessor.as_ref().map(|point| point.id)
    }

    fn disk(&self, name: &str) -> Option<&PointDisk> {
        self.predecessor.as_ref().and_then(|point| point.disk(name))
    }

    /// Refuses disks that have the names of others: of files, whose names say little.
    pub(super) fn refuse_others<'a>(
        &self,
        machine: &str,
        files: impl Iterator<Item = (&'a str, PathBuf)>,
    ) -> Result<(), EngineError> {
        for (name, file) in files {
            let was = self.disk(name).and_then(|disk| remembered(disk, FILE));
            if let Some(was) = was
                && was != file.display().to_string()
            {
                return Err(EngineError::Invalid(format!(
                    "{}: the repository has a machine {machine} already, whose disk {name} was {was}; if this is it, say so with \
                     --vm {machine}, and if not, give it another name there",
                    file.display()
                )));
            }
        }
        Ok(())
    }

    /// How a disk is to be read. On the disk's thread.
    pub(super) fn decide(&self, name: &str, stack: &Stack, how: &BackupHow) -> Decision {
        let Some(disk) = self.disk(name) else {
            return Decision { kind: BackupKind::Full, reason: None, since: None };
        };
        if how.full {
            return Decision { kind: BackupKind::Full, reason: Some(ASKED_FOR.to_owned()), since: None };
        }
        match since(disk, stack, how) {
            Ok(since) => Decision { kind: BackupKind::Incremental, reason: None, since: Some(since) },
            Err(reason) => Decision { kind: BackupKind::Compared, reason: Some(reason), since: None },
        }
    }

    /// A disk as the repository is told of it; `marked` once the mark of this backup is taken.
    pub(super) fn plan(&self, name: &str, size: u64, decision: &Decision, stack: &Stack, marked: bool) -> DiskPlan {
        let mut identity = vec![
            (FORMAT.to_owned(), stack.format().name().to_owned()),
            (FILE.to_owned(), stack.image().display().to_string()),
        ];
        let history = stack.history_report();
        if marked
            && let Ok(mark) = stack.mark_named(name, &self.mark)
            && let Some(lineage) = history.lineage
        {
            identity.extend([
                (MARK.to_owned(), mark.name),
                (MARK_ID.to_owned(), mark.id),
                (LINEAGE.to_owned(), lineage),
            ]);
        }
        let made = match decision.kind {
            BackupKind::Full => Made::Full,
            BackupKind::Incremental => Made::Incremental,
            BackupKind::Compared => Made::Compared,
        };
        DiskPlan { name: name.to_owned(), size, inherit: decision.kind != BackupKind::Full, made, identity }
    }

    /// Forgets this repository's marks but that one, or all.
    pub(super) async fn forget_marks(&self, stack: &Stack, but: Option<&str>) {
        forget_marks(stack, &self.prefix, but).await;
    }

    /// Where the repository's index is kept.
    pub(super) fn cache(&self) -> PathBuf {
        user_directories::cache().join("index").join(self.repository.id().to_string())
    }
}

/// What a point's disk remembers under that name.
fn remembered<'a>(disk: &'a PointDisk, wanted: &str) -> Option<&'a str> {
    disk.identity.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str())
}

/// Name and id of the mark that was taken for a disk of a point.
pub(super) fn mark_of(disk: &PointDisk) -> Option<(String, String)> {
    remembered(disk, MARK).zip(remembered(disk, MARK_ID)).map(|(name, id)| (name.to_owned(), id.to_owned()))
}

fn short(id: Id) -> String {
    id.to_string()[..8].to_owned()
}

/// The mark since which changes are known, or why there is none.
fn since(disk: &PointDisk, stack: &Stack, how: &BackupHow) -> Result<String, String> {
    if how.compare {
        return Err(ASKED_FOR.to_owned());
    }
    let (Some(name), Some(id), Some(lineage)) =
        (remembered(disk, MARK), remembered(disk, MARK_ID), remembered(disk, LINEAGE))
    else {
        return Err("no mark was taken for the last backup".to_owned());
    };
    let history = stack.history_report();
    if !history.kept {
        return Err(history.reason.unwrap_or_else(|| "no history is kept".to_owned()));
    }
    let mark = stack.mark_named("", name).map_err(|_| "its history does not have the last backup's mark".to_owned())?;
    if let Some(reason) = mark.refused {
        return Err(reason);
    }
    if mark.id != id || history.lineage.as_deref() != Some(lineage) {
        return Err("its history is not the one that the last backup's mark was taken in".to_owned());
    }
    Ok(mark.name)
}

async fn forget_marks(stack: &Stack, prefix: &str, but: Option<&str>) {
    let Ok(marks) = stack.marks("") else { return };
    // A later one belongs to a backup that is still at work.
    let until = marks.iter().find(|mark| Some(mark.name.as_str()) == but).map_or(u64::MAX, |mark| mark.time);
    let old =
        |mark: &MarkReport| mark.name.starts_with(prefix) && Some(mark.name.as_str()) != but && mark.time <= until;
    for mark in marks.into_iter().filter(old) {
        if let Err(error) = stack.delete_mark(&mark.name).await {
            tracing::warn!(mark = mark.name, error = crate::chain_text(&error), "a mark of an old backup is left");
        }
    }
}
