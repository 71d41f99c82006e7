//! Backups of disks in use: read through views, while their guests write on.

use super::Engine;
use crate::backup::run::{Ready, Running};
use crate::backup::session::Session;
use crate::backup::{BackedUpDisk, BackupReport, BackupSpec};
use crate::history::report::{MarkConsistency, MarkReport};
use crate::history::views;
use crate::history::{MarkSpec, ViewSpec};
use crate::home::{DiskId, Home};
use crate::images::Progress;
use crate::{EngineError, JobHandle, chain_text};
use repository::Consistency;
use serde_json::Value;
use std::sync::Arc;

/// A disk, its thread, and the number of its view there.
#[derive(Clone)]
struct Viewed {
    name: String,
    home: Home,
    view: DiskId,
    size: u64,
}

impl Engine {
    /// Backs up disks, or all disks of virtual machines, at one instant.
    pub(super) async fn backup(self: Arc<Self>, spec: BackupSpec, job: JobHandle) -> Result<Value, EngineError> {
        let names = self.disks_named(&spec.disks)?;
        let machine = match spec.how.machine.clone() {
            Some(machine) => machine,
            None => self.machine_of(&spec.disks, &names[0])?,
        };
        let mut running = Running::open(spec.repository, spec.how, machine).await?;
        let mark = MarkSpec {
            disks: names,
            name: running.mark().to_owned(),
            view: Some(ViewSpec::default()),
            freeze: spec.freeze,
        };
        let marks = self.mark(mark).await?;
        running.set_time(marks.first().map_or(0, |mark| mark.time));
        let running = Arc::new(running);
        let done = self.back_up_marked(&running, &marks, job.progress()).await;
        for mark in &marks {
            if let Err(error) = self.close_view(&format!("{}@{}", mark.disk, mark.name)).await {
                tracing::debug!(error = chain_text(&error), "the view of a backup has gone already");
            }
            let (running, made) = (Arc::clone(&running), done.is_ok());
            if let Ok((home, _)) = self.home(&mark.disk) {
                let tidied = home.with(move |stack| async move {
                    running.tidy(&stack, made).await;
                    Ok(())
                });
                if let Err(error) = tidied.await {
                    tracing::warn!(disk = mark.disk, error = chain_text(&error), "marks of old backups are left");
                }
            }
            self.look_at_history(&mark.disk).await;
        }
        serde_json::to_value(done?).map_err(|e| EngineError::Invalid(e.to_string()))
    }

    /// The name under which disks are kept: the virtual machine's, or the first disk's.
    fn machine_of(&self, asked: &[String], first: &str) -> Result<String, EngineError> {
        if let [one] = asked
            && one != first
        {
            return Ok(one.clone());
        }
        Ok(self.disk(first)?.spec.vm.unwrap_or_else(|| first.to_owned()))
    }

    async fn back_up_marked(
        &self,
        running: &Arc<Running>,
        marks: &[MarkReport],
        progress: &Progress,
    ) -> Result<BackupReport, EngineError> {
        let mut disks = Vec::new();
        for mark in marks {
            let view = {
                let views = self.views();
                views.get(&format!("{}@{}", mark.disk, mark.name)).map(|view| view.home.id)
            };
            let view = view.ok_or_else(|| EngineError::NoSuchView(format!("{}@{}", mark.disk, mark.name)))?;
            disks.push(Viewed { name: mark.disk.clone(), home: self.home(&mark.disk)?.0, view, size: mark.size });
        }
        let mut ready = Vec::new();
        for Viewed { name, home, size, .. } in disks.clone() {
            let running = Arc::clone(running);
            ready.push(home.with(move |stack| async move { Ok(running.ready(&name, size, &stack, true)) }).await?);
        }
        let session = running.begin(&ready).await?;
        let read = read_all(running, &disks, &ready, &session, progress).await;
        let consistency = match marks.iter().all(|mark| mark.consistency == MarkConsistency::Application) {
            true => Consistency::FileSystem,
            false => Consistency::Crash,
        };
        running.end(&session, consistency, read).await
    }
}

async fn read_all(
    running: &Arc<Running>,
    disks: &[Viewed],
    ready: &[Ready],
    session: &Session,
    progress: &Progress,
) -> Result<Vec<BackedUpDisk>, EngineError> {
    let mut done = Vec::new();
    for (n, (Viewed { name, home, view, .. }, ready)) in disks.iter().zip(ready).enumerate() {
        let (running, ready, session, progress) =
            (Arc::clone(running), ready.clone(), session.clone(), progress.clone());
        let (name, view) = (name.clone(), *view);
        let read = home.with(move |stack| async move {
            let disk = views::disk(view).ok_or(EngineError::NoSuchView(name))?;
            running.read(n, &ready, &stack, disk, &session, &progress).await
        });
        done.push(read.await?);
    }
    Ok(done)
}
