//! Taking marks: several disks at one instant, guests frozen if that is wanted.

use super::host::random_id;
use super::report::MarkReport;
use super::views::{self, ViewSpec};
use crate::EngineError;
use crate::guest_agent::{FreezeLimits, Frozen, GuestAgent};
use crate::home::{DiskId, Home};
use crate::images::stack::Stack;
use disk::StorageHandle;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;
use tracking::{Consistency, NewPoint};
use utoipa::ToSchema;

/// How long a disk's requests under way are waited for; meanwhile its guest waits, too.
const HOLD_LIMIT: Duration = Duration::from_secs(10);

/// Freezing a guest for a mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FreezeSpec {
    /// Absolute path of the guest agent's unix socket.
    #[schema(value_type = String)]
    pub socket: PathBuf,
    /// Longest time that the guest may be frozen, in milliseconds; 10,000 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_ms: Option<u64>,
}

impl FreezeSpec {
    /// Checks what can be checked without looking at a socket.
    ///
    /// # Errors
    /// [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        match self.socket.is_absolute() {
            true => Ok(()),
            false => {
                Err(EngineError::Invalid(format!("the guest agent's path {} is not absolute", self.socket.display())))
            }
        }
    }

    /// Freezes the guest.
    pub(crate) async fn freeze(self) -> Result<Frozen, EngineError> {
        let mut agent = GuestAgent::new(self.socket);
        if let Some(limit) = self.limit_ms {
            agent.limits = FreezeLimits { frozen: Duration::from_millis(limit), ..agent.limits };
        }
        agent.freeze().await
    }
}

/// A mark to be taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MarkSpec {
    /// Disks by their names, or virtual machines, which stand for all of their disks.
    pub disks: Vec<String>,
    /// The mark's name: 1 to 255 bytes without control characters.
    pub name: String,
    /// Whether the disks can be read as they were at the mark, until their views are closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub view: Option<ViewSpec>,
    /// The guest to freeze.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<FreezeSpec>,
}

impl MarkSpec {
    /// Checks what can be checked without looking at a disk.
    ///
    /// # Errors
    /// [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        self.freeze.as_ref().map_or(Ok(()), FreezeSpec::validate)
    }
}

impl Stack {
    /// Whether a mark of that name can be taken.
    pub(crate) fn may_mark(&self, name: &str) -> Result<(), EngineError> {
        if matches!(name, "." | "..") {
            return Err(EngineError::Invalid(format!("a mark cannot be called {name:?}, which no URL can name")));
        }
        let kept = self.kept()?;
        let failed = |source| EngineError::History { file: kept.file.clone(), source };
        kept.history().may_mark(name).map_err(failed)
    }

    /// Holds the guest's changes, for a mark of that name.
    pub(crate) async fn hold(&self, name: &str) -> Result<(), EngineError> {
        self.may_mark(name)?;
        let kept = self.kept()?;
        let failed = |source| EngineError::History { file: kept.file.clone(), source };
        let held = dataplane::timeout(HOLD_LIMIT, kept.disk.hold(name)).await.ok_or_else(|| {
            EngineError::Invalid(format!(
                "{}: requests under way did not end within {} s, so that no mark was taken; its storage may hang",
                self.image().display(),
                HOLD_LIMIT.as_secs()
            ))
        })?;
        *self.holding.borrow_mut() = Some(held.map_err(failed)?);
        Ok(())
    }

    /// Lets the guest go on without a mark.
    pub(crate) fn release(&self) {
        self.holding.borrow_mut().take();
        self.uncommitted.borrow_mut().take();
    }

    /// Ends the epoch, and lets the guest go on.
    pub(crate) fn cut(&self, new: NewPoint, view: Option<(DiskId, StorageHandle, u64)>) {
        let held = self.holding.borrow_mut().take();
        if let (Some(held), Some((id, store, limit))) = (&held, view) {
            views::keep(id, held.view(store, limit));
        }
        *self.uncommitted.borrow_mut() = held.map(|held| held.cut(new));
    }

    /// Makes the mark durable.
    pub(crate) async fn commit(&self, disk: &str, consistency: Consistency) -> Result<MarkReport, EngineError> {
        let kept = self.kept()?;
        let uncommitted = self.uncommitted.borrow_mut().take();
        let Some(uncommitted) = uncommitted else {
            return Err(EngineError::Invalid(format!("{disk}: its mark was given up meanwhile")));
        };
        let point = uncommitted
            .commit(consistency)
            .await
            .map_err(|source| EngineError::History { file: kept.file.clone(), source })?;
        Ok(MarkReport::of(disk, &point, kept.history().info().granule))
    }
}

/// A disk of the daemon.
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) home: Home,
    /// The number of the view that is to be made.
    pub(crate) view: Option<DiskId>,
}

/// Takes a mark of all these disks at one instant.
///
/// First all are held; only then the epochs end, one after the other, while none of them can change.
pub(crate) async fn mark(
    members: Vec<Member>,
    name: String,
    view: Option<ViewSpec>,
    freeze: Option<FreezeSpec>,
) -> Result<Vec<MarkReport>, EngineError> {
    let stores = match &view {
        None => Vec::new(),
        Some(spec) => make_stores(&members, spec).await?,
    };
    let marked = mark_members(&members, name, stores, freeze).await;
    if marked.is_err() {
        forget_views(&members).await;
    }
    marked
}

/// Files for the old bytes, made before anybody is held.
async fn make_stores(members: &[Member], spec: &ViewSpec) -> Result<Vec<Option<(StorageHandle, u64)>>, EngineError> {
    let made = members.iter().map(|member| {
        let spec = spec.clone();
        member.home.with(move |stack| async move {
            views::store(&spec, &stack.image(), stack.disk().geometry().size).await.map(Some)
        })
    });
    join_all(made).await.into_iter().collect()
}

async fn forget_views(members: &[Member]) {
    join_all(members.iter().filter_map(|member| Some((member, member.view?))).map(|(member, id)| {
        member.home.with(move |_| async move {
            views::forget(id);
            Ok(())
        })
    }))
    .await;
}

async fn mark_members(
    members: &[Member],
    name: String,
    stores: Vec<Option<(StorageHandle, u64)>>,
    freeze: Option<FreezeSpec>,
) -> Result<Vec<MarkReport>, EngineError> {
    // No guest is frozen for what cannot be done.
    for member in members {
        let name = name.clone();
        member.home.with(move |stack| async move { stack.may_mark(&name) }).await?;
    }
    let frozen = match freeze {
        None => None,
        Some(freeze) => Some(freeze.freeze().await?),
    };
    let held = join_all(members.iter().map(|member| {
        let name = name.clone();
        member.home.with(move |stack| async move { stack.hold(&name).await })
    }))
    .await;
    let held: Result<Vec<()>, EngineError> = held.into_iter().collect();
    if held.is_ok() {
        let set = random_id();
        let mut stores = stores.into_iter();
        let cuts = join_all(members.iter().map(|member| {
            let new = NewPoint { name: name.clone(), set };
            let store = stores.next().flatten();
            let view = member.view.zip(store).map(|(id, (store, limit))| (id, store, limit));
            member.home.with(move |stack| async move {
                stack.cut(new, view);
                Ok(())
            })
        }))
        .await;
        for cut in cuts {
            cut?;
        }
    }
    let consistency = match frozen {
        None => Ok(Consistency::Crash),
        Some(frozen) => frozen.thaw().await.map(|thawed| Consistency::Application {
            frozen_ms: u32::try_from(thawed.frozen_for.as_millis()).unwrap_or(u32::MAX),
        }),
    };
    let consistency = match held.and(consistency) {
        Ok(consistency) => consistency,
        Err(error) => {
            release(members).await;
            return Err(error);
        }
    };
    let committed = join_all(members.iter().map(|member| {
        let disk = member.name.clone();
        member.home.with(move |stack| async move { stack.commit(&disk, consistency).await })
    }))
    .await;
    let failed = committed.iter().any(Result::is_err);
    let mut reports = Vec::new();
    let mut failure = None;
    for (report, member) in committed.into_iter().zip(members) {
        match report {
            // A part of an instant is no instant.
            Ok(report) if failed => {
                let name = report.name.clone();
                let undone = member.home.with(move |stack| async move { stack.delete_mark(&name).await }).await;
                if let Err(error) = undone {
                    tracing::warn!(
                        disk = member.name,
                        error = crate::chain_text(&error),
                        "a mark is left that its fellows lack"
                    );
                }
            }
            Ok(report) => reports.push(report),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(reports),
    }
}

async fn release(members: &[Member]) {
    join_all(members.iter().map(|member| {
        member.home.with(|stack| async move {
            stack.release();
            Ok(())
        })
    }))
    .await;
}
