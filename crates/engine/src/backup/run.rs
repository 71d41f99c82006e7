//! A backup of disks: one instant, one session, one restore point.
//!
//! 1. The repository is opened, and the machine's last point found.
//! 2. All disks get a mark at one instant; disks in use get a view, which is read.
//! 3. For each disk it is decided how its changes are known ([`Base::decide`]), and what is to be looked at goes into the session.
//! 4. The point is made. From here on the old marks of this consumer are not needed, and go.
//!
//! Crash before step 4 ends: there is no point; the mark is left, and goes with the next backup's step 4. What was stored is found by the next
//! session. After it: the point is there, and the marks of both points, of which the newer one counts.

use super::pass::{self, Source};
use super::plan::{Base, Decision};
use super::session::Session;
use super::{BackedUpDisk, BackupHow, BackupReport, RepositorySpec};
use crate::history::HistorySource;
use crate::history::offline::{mark_all, with_all};
use crate::images::stack::Stack;
use crate::images::{Progress, Workshop};
use crate::promotion::JobControl;
use crate::{EngineError, chain_text, linkage, name_of_file};
use disk::DiskHandle;
use repository::{BackupOptions, Consistency, DiskPlan, PointFacts, RepositoryError};
use std::fs;
use std::path::Path;
use std::rc::Rc;

/// The most bytes of a file that is kept beside the disks.
const LARGEST_ATTACHMENT: u64 = 16 << 20;

/// A disk that is ready to be read.
#[derive(Clone, Debug)]
pub(crate) struct Ready {
    pub(super) decision: Decision,
    pub(super) plan: DiskPlan,
}

/// What a backup of several disks knows until its point is made.
pub(crate) struct Running {
    spec: RepositorySpec,
    how: BackupHow,
    machine: String,
    base: Base,
    time: u64,
    attachments: Vec<(String, Vec<u8>)>,
}

impl Running {
    /// Opens the repository, and reads what is to be kept beside the disks.
    pub(crate) async fn open(spec: RepositorySpec, how: BackupHow, machine: String) -> Result<Self, EngineError> {
        dataplane::offload_remote(move || {
            let attachments = how.attach.iter().map(|file| attachment(file)).collect::<Result<_, _>>()?;
            let base = Base::open(&spec, &machine)?;
            Ok(Self { spec, how, machine, base, time: linkage::now(), attachments })
        })
        .await
    }

    /// The name of the mark that is to be taken of all disks.
    pub(crate) fn mark(&self) -> &str {
        &self.base.mark
    }

    /// The instant, in milliseconds since 1970.
    pub(crate) fn set_time(&mut self, time: u64) {
        self.time = time;
    }

    /// Decides how a disk is to be read, on its thread; `marked` says whether the mark was taken.
    pub(crate) fn ready(&self, name: &str, size: u64, stack: &Stack, marked: bool) -> Ready {
        let mut decision = self.base.decide(name, stack, &self.how);
        if !marked {
            decision = decision.without_mark();
        }
        let plan = self.base.plan(name, size, &decision, stack, marked);
        Ready { decision, plan }
    }

    /// Begins the session.
    pub(crate) async fn begin(&self, disks: &[Ready]) -> Result<Session, EngineError> {
        let all_known = disks.iter().all(|disk| disk.decision.between("").is_some());
        let mut options = BackupOptions {
            predecessor: self.base.predecessor().filter(|_| !self.how.full),
            // What is stored anew on purpose is not to be found.
            search: !all_known && !self.how.full,
            cache: Some(self.base.cache()),
            ..BackupOptions::default()
        };
        let plans: Vec<DiskPlan> = disks.iter().map(|disk| disk.plan.clone()).collect();
        let begun = Session::begin(&self.spec, self.base.repository.clone(), options.clone(), plans.clone()).await;
        match begun {
            Err(EngineError::Repository { source, .. }) if matches!(*source, RepositoryError::Cache { .. }) => {
                tracing::warn!(error = %source, "without an index fewer leaves are found again");
                options.cache = None;
                Session::begin(&self.spec, self.base.repository.clone(), options, plans).await
            }
            begun => begun,
        }
    }

    /// Reads the `n`-th disk into the session, on its thread.
    pub(crate) async fn read(
        &self,
        n: usize,
        ready: &Ready,
        stack: &Stack,
        disk: DiskHandle,
        session: &Session,
        progress: &Progress,
    ) -> Result<BackedUpDisk, EngineError> {
        let changed = ready.decision.between(&self.base.mark);
        let source = Source { disk, stack, size: ready.plan.size, changed };
        let control = JobControl::new(progress.clone(), Rc::clone(stack.chain()));
        let read = pass::run(&source, session, n, &control, progress).await?;
        Ok(BackedUpDisk {
            name: ready.plan.name.clone(),
            size: ready.plan.size,
            kind: ready.decision.kind,
            reason: ready.decision.reason.clone(),
            read,
        })
    }

    /// Makes the point, if all disks were read.
    pub(crate) async fn end(
        &self,
        session: &Session,
        consistency: Consistency,
        read: Result<Vec<BackedUpDisk>, EngineError>,
    ) -> Result<BackupReport, EngineError> {
        let disks = match read {
            Ok(disks) => disks,
            Err(error) => {
                session.abandon().await;
                return Err(error);
            }
        };
        let facts = PointFacts {
            machine: self.machine.clone(),
            created_ms: self.time,
            consistency,
            attachments: self.attachments.clone(),
            note: self.how.note.clone(),
        };
        let (point, counts) = session.finish(facts).await?;
        Ok(BackupReport {
            point: point.id.to_string(),
            machine: self.machine.clone(),
            time: self.time,
            disks,
            leaves: counts.leaves,
            new_leaves: counts.stored,
            stored: counts.pack_bytes,
        })
    }

    /// Forgets the marks that are not needed: all but this backup's when its point was made, and this one when it was not.
    pub(crate) async fn tidy(&self, stack: &Stack, made: bool) {
        if made {
            return self.base.forget_marks(stack, Some(&self.base.mark)).await;
        }
        if stack.mark_named("", &self.base.mark).is_ok()
            && let Err(error) = stack.delete_mark(&self.base.mark).await
        {
            tracing::warn!(mark = self.base.mark, error = chain_text(&error), "the mark of a failed backup is left");
        }
    }
}

fn attachment(file: &Path) -> Result<(String, Vec<u8>), EngineError> {
    let failed = |e| EngineError::file(file, "read what is to be kept beside the disks", e);
    let facts = fs::metadata(file).map_err(failed)?;
    if !facts.is_file() || facts.len() > LARGEST_ATTACHMENT {
        return Err(EngineError::Invalid(format!(
            "{}: what is kept beside the disks is a file of at most 16 MiB",
            file.display()
        )));
    }
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok((name, fs::read(file).map_err(failed)?))
}

impl Workshop {
    /// Backs up images that nobody serves, at one instant.
    ///
    /// # Errors
    /// When an image is in use, or the repository fails: there is no new point then.
    pub async fn backup(
        &self,
        sources: Vec<HistorySource>,
        repository: RepositorySpec,
        how: BackupHow,
        progress: Progress,
    ) -> Result<BackupReport, EngineError> {
        self.run(move || async move {
            let names = names_of(&sources)?;
            let machine = how.machine.clone().unwrap_or_else(|| names[0].clone());
            let named: Vec<_> = names.into_iter().zip(&sources).collect();
            with_all(&named, async |stacks| of_stacks(stacks, repository, how, machine, &progress).await).await
        })
        .await
    }
}

/// The disks' names in the repository.
fn names_of(sources: &[HistorySource]) -> Result<Vec<String>, EngineError> {
    let names: Vec<String> = sources.iter().map(|source| name_of_file(&source.file)).collect();
    for (n, name) in names.iter().enumerate() {
        if names[..n].contains(name) {
            return Err(EngineError::Invalid(format!(
                "two images are called {name} in a restore point, by their files' names; back them up one by one, each with a --vm of its own"
            )));
        }
    }
    match names.is_empty() {
        true => Err(EngineError::Invalid("no disk is named".to_owned())),
        false => Ok(names),
    }
}

async fn of_stacks(
    stacks: &[(String, Rc<Stack>)],
    repository: RepositorySpec,
    how: BackupHow,
    machine: String,
    progress: &Progress,
) -> Result<BackupReport, EngineError> {
    let by_name = how.machine.is_none();
    let mut running = Running::open(repository, how, machine).await?;
    if by_name {
        let files = stacks.iter().map(|(name, stack)| (name.as_str(), stack.image()));
        running.base.refuse_others(&running.machine, files)?;
    }
    // Without a history the image is read and compared; at rest it is the same all the while.
    let marked = stacks.iter().all(|(_, stack)| stack.kept().is_ok());
    if marked {
        let marks = mark_all(stacks, running.mark()).await?;
        running.set_time(marks.first().map_or(running.time, |mark| mark.time));
    }
    let done = async {
        let ready: Vec<Ready> = stacks
            .iter()
            .map(|(name, stack)| running.ready(name, stack.disk().geometry().size, stack, marked))
            .collect();
        let session = running.begin(&ready).await?;
        let read = async {
            let mut disks = Vec::new();
            for (n, ((_, stack), ready)) in stacks.iter().zip(&ready).enumerate() {
                disks.push(running.read(n, ready, stack, stack.disk().clone(), &session, progress).await?);
            }
            Ok(disks)
        };
        let read = read.await;
        running.end(&session, Consistency::Off, read).await
    };
    let done = done.await;
    for (_, stack) in stacks {
        running.tidy(stack, done.is_ok()).await;
    }
    done
}
