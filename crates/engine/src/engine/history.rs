//! Histories of the engine's disks: marks, changes, and views.

use super::{Engine, Phase};
use crate::exports::OpenExport;
use crate::history::marking::{self, Member};
use crate::history::report::{ChangesReport, HistoryReport, MarkReport};
use crate::history::views::{self, OpenView};
use crate::history::{MarkSpec, ViewReport};
use crate::home::{DiskId, Home};
use crate::{EngineError, Event, ExportSpec, chain_text};
use std::collections::BTreeMap;
use std::sync::MutexGuard;

impl Engine {
    /// Takes a mark of disks, or of all disks of virtual machines, at one instant.
    ///
    /// # Errors
    /// When one of them has no history, the name is taken, or the guest could not be frozen and thawed: then there is no
    /// mark on any of them.
    pub async fn mark(&self, spec: MarkSpec) -> Result<Vec<MarkReport>, EngineError> {
        spec.validate()?;
        let names = self.disks_named(&spec.disks)?;
        let members = names
            .into_iter()
            .map(|name| {
                let view = spec.view.as_ref().map(|_| self.new_id());
                Ok(Member { home: self.home(&name)?.0, name, view })
            })
            .collect::<Result<Vec<Member>, EngineError>>()?;
        let opening: Vec<OpenView> = members
            .iter()
            .filter_map(|member| {
                let home = Home { thread: member.home.thread.clone(), id: member.view? };
                let (disk, mark) = (member.name.clone(), spec.name.clone());
                Some(OpenView { disk, mark, home, exports: Vec::new() })
            })
            .collect();
        let ids: Vec<DiskId> = members.iter().map(|member| member.home.id).collect();
        let marks = marking::mark(members, spec.name, spec.view, spec.freeze).await?;
        for (view, disk) in opening.into_iter().zip(ids) {
            self.export_view(view, disk).await;
        }
        for mark in &marks {
            self.look_at_history(&mark.disk).await;
            self.tell(Event::MarkAdded { disk: mark.disk.clone(), mark: mark.name.clone() });
        }
        Ok(marks)
    }

    /// Takes the history's present facts into the disk's status.
    pub(super) async fn look_at_history(&self, name: &str) {
        let Ok((home, _)) = self.home(name) else { return };
        let Ok(now) = home.with(|stack| async move { Ok(stack.history_report()) }).await else { return };
        if let Some(entry) = self.disks().get_mut(name)
            && matches!(&entry.phase, Phase::Open { home: open, .. } if open.id == home.id)
        {
            entry.history = Some(now);
        }
    }

    /// Takes the present facts of all histories into the disks' status, which otherwise has them as they were when the disk
    /// was opened or its marks changed.
    pub async fn look_at_histories(&self) {
        let names: Vec<String> = self.disks().keys().cloned().collect();
        futures_util::future::join_all(names.iter().map(|name| self.look_at_history(name))).await;
    }

    /// Opens the exports of a view: those of its disk, with the mark's name behind theirs.
    async fn export_view(&self, mut view: OpenView, disk: DiskId) {
        let specs = self.disks().get(&view.disk).map(|entry| entry.spec.exports.clone()).unwrap_or_default();
        let specs = if specs.is_empty() { vec![ExportSpec::default()] } else { specs };
        for spec in specs {
            let name = format!("{}@{}", spec.name_for(&view.disk), view.mark);
            let spec = ExportSpec { name: Some(name), read_only: true, ..spec };
            let served = views::served(&view.home, disk, &view.mark);
            match self.servers.open(&self.threads, &view.disk, &spec, &served).await {
                Ok(export) => view.exports.push(export),
                Err(e) => {
                    tracing::warn!(
                        view = view.name(),
                        error = chain_text(&e),
                        "an export of a view could not be opened"
                    );
                    view.exports.push(OpenExport::failed(&view.disk, &spec, chain_text(&e)));
                }
            }
        }
        self.views().insert(view.name(), view);
    }

    pub(super) fn views(&self) -> MutexGuard<'_, BTreeMap<String, OpenView>> {
        self.views.lock().expect("no panic while the list is locked")
    }

    /// All views.
    pub async fn views_status(&self) -> Vec<ViewReport> {
        let known: Vec<(String, String, String, Home, Vec<String>)> = self
            .views()
            .values()
            .map(|view| (view.name(), view.disk.clone(), view.mark.clone(), view.home.clone(), view.uris()))
            .collect();
        let mut reports = Vec::new();
        for (name, disk, mark, home, uris) in known {
            let id = home.id;
            let found = home.thread.spawn(move || async move { views::look(id) }).await.ok().flatten();
            let (stored, limit, ended) = found.unwrap_or((0, 0, Some("it was closed".to_owned())));
            reports.push(ViewReport { name, disk, mark, uris, stored, limit, ended });
        }
        reports
    }

    /// Closes a view and forgets what it has saved; the mark stays.
    ///
    /// # Errors
    /// [`EngineError::NoSuchView`].
    pub async fn close_view(&self, name: &str) -> Result<(), EngineError> {
        let view = self.views().remove(name).ok_or_else(|| EngineError::NoSuchView(name.to_owned()))?;
        self.servers.close_all(view.exports).await;
        let id = view.home.id;
        let forgotten = view.home.thread.spawn(move || async move { views::forget(id) }).await;
        forgotten.map_err(|_| EngineError::ThreadGone)?;
        self.tell(Event::ViewClosed { view: name.to_owned() });
        Ok(())
    }

    pub(super) async fn close_views_of(&self, disk: Option<&str>) {
        let names: Vec<String> = {
            let views = self.views();
            views.values().filter(|view| disk.is_none_or(|disk| view.disk == disk)).map(OpenView::name).collect()
        };
        for name in names {
            if let Err(e) = self.close_view(&name).await {
                tracing::warn!(view = name, error = chain_text(&e), "closing a view");
            }
        }
    }

    /// A disk's history as it is now.
    ///
    /// # Errors
    /// [`EngineError::NoSuchDisk`].
    pub async fn history(&self, name: &str) -> Result<HistoryReport, EngineError> {
        let (home, _) = self.home(name)?;
        home.with(|stack| async move { Ok(stack.history_report()) }).await
    }

    /// A disk's marks, oldest first.
    ///
    /// # Errors
    /// [`EngineError::NoSuchDisk`], [`EngineError::NoHistory`].
    pub async fn marks(&self, name: &str) -> Result<Vec<MarkReport>, EngineError> {
        let (home, _) = self.home(name)?;
        let disk = name.to_owned();
        home.with(move |stack| async move { stack.marks(&disk) }).await
    }

    /// One mark of a disk.
    ///
    /// # Errors
    /// [`EngineError::NoSuchDisk`], [`EngineError::NoHistory`], or when there is no such mark.
    pub async fn mark_named(&self, name: &str, mark: &str) -> Result<MarkReport, EngineError> {
        let (home, _) = self.home(name)?;
        let (disk, mark) = (name.to_owned(), mark.to_owned());
        home.with(move |stack| async move { stack.mark_named(&disk, &mark) }).await
    }

    /// Forgets a mark.
    ///
    /// # Errors
    /// When there is none of that name, or the history cannot be written.
    pub async fn delete_mark(&self, name: &str, mark: &str) -> Result<(), EngineError> {
        let (home, _) = self.home(name)?;
        let named = mark.to_owned();
        home.with(move |stack| async move { stack.delete_mark(&named).await }).await?;
        self.look_at_history(name).await;
        self.tell(Event::MarkRemoved { disk: name.to_owned(), mark: mark.to_owned() });
        Ok(())
    }

    /// Trusts all marks of a disk again, on the user's word that nobody has changed the image unseen.
    ///
    /// # Errors
    /// When there is no history, or it cannot be written.
    pub async fn trust_history(&self, name: &str) -> Result<Vec<MarkReport>, EngineError> {
        let (home, _) = self.home(name)?;
        let disk = name.to_owned();
        let trusted = home.with(move |stack| async move {
            stack.trust_history().await?;
            stack.marks(&disk)
        });
        let marks = trusted.await?;
        self.look_at_history(name).await;
        Ok(marks)
    }

    /// What changed on a disk, from byte `from` on, up to about `most` ranges; and where to ask on.
    ///
    /// # Errors
    /// When a mark is missing or refused, or the history cannot be read.
    pub async fn changes(
        &self,
        name: &str,
        since: String,
        until: Option<String>,
        from: u64,
        most: usize,
    ) -> Result<ChangesReport, EngineError> {
        let (home, _) = self.home(name)?;
        let disk = name.to_owned();
        home.with(move |stack| async move { stack.changes(&disk, &since, until.as_deref(), from, most).await }).await
    }
}
