//! Snapshots of several disks at one instant: on all of them, or on none.

use super::SnapshotReport;
use super::take::Instantaneous;
use crate::history::host::random_id;
use crate::history::{FreezeSpec, HistorySource};
use crate::home::Home;
use crate::images::Workshop;
use crate::images::stack::Stack;
use crate::linkage::{SnapshotConsistency, now};
use crate::promotion::take_history_along;
use crate::{EngineError, Format};
use futures_util::future::join_all;
use std::path::PathBuf;
use tracking::Id;

/// A disk of the daemon.
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) home: Home,
}

/// A disk's top image after the switch.
pub(crate) struct NewTop {
    pub(crate) disk: String,
    pub(crate) image: PathBuf,
    pub(crate) format: Format,
    /// The history's file, if one is kept.
    pub(crate) history: Option<PathBuf>,
}

/// Takes a snapshot of all these disks at one instant. `entered` is told of each disk and its top image when all are
/// switched and none has been written to since; what it refuses is undone.
///
/// First all overlays are made; then the guest is frozen, all disks are held, and the guest is thawed, whose writes wait
/// now; then all are switched, and go on.
pub(crate) async fn take(
    members: &[Member],
    name: &str,
    freeze: Option<FreezeSpec>,
    entered: impl FnOnce(&[NewTop]) -> Result<(), EngineError>,
) -> Result<Vec<SnapshotReport>, EngineError> {
    let set = random_id();
    let taken = switch_all(members, set, name, freeze).await;
    let taken = match taken {
        Ok((facts, tops)) => entered(&tops).map(|()| facts),
        Err(error) => Err(error),
    };
    let facts = match taken {
        Ok(facts) => facts,
        Err(error) => {
            undo(members, set).await;
            return Err(error);
        }
    };
    // Not one after the other: settling waits for files.
    join_all(members.iter().map(|member| {
        member.home.with(|stack| async move {
            stack.go_on();
            Ok(())
        })
    }))
    .await;
    let settled = join_all(members.iter().map(|member| {
        let (disk, facts) = (member.name.clone(), facts.clone());
        member.home.with(move |stack| async move { stack.settle_snapshot(&disk, &facts).await })
    }));
    settled.await.into_iter().collect()
}

async fn switch_all(
    members: &[Member],
    set: Id,
    name: &str,
    freeze: Option<FreezeSpec>,
) -> Result<(Instantaneous, Vec<NewTop>), EngineError> {
    // No guest is frozen for what cannot be done.
    let prepared = join_all(members.iter().map(|member| {
        let name = name.to_owned();
        member.home.with(move |stack| async move { stack.prepare_snapshot(set, &name).await })
    }));
    prepared.await.into_iter().collect::<Result<Vec<()>, _>>()?;
    let frozen = match freeze {
        None => None,
        Some(freeze) => Some(freeze.freeze().await?),
    };
    let held =
        join_all(members.iter().map(|member| member.home.with(|stack| async move { stack.hold_for_snapshot().await })))
            .await;
    let time = now();
    let consistency = match frozen {
        None => Ok(SnapshotConsistency::Crash),
        // The guest's writes wait until the disks are switched.
        Some(frozen) => frozen.thaw().await.map(|_| SnapshotConsistency::Frozen),
    };
    held.into_iter().collect::<Result<Vec<()>, _>>()?;
    let facts = Instantaneous { time, consistency: consistency? };
    let switched = join_all(members.iter().map(|member| {
        member.home.with(|stack| async move {
            stack.switch_to_overlay().await?;
            Ok((stack.image(), stack.kept().ok().map(|kept| kept.file.clone())))
        })
    }));
    let tops = switched.await.into_iter().collect::<Result<Vec<_>, _>>()?;
    let tops = members.iter().zip(tops).map(|(member, (image, history))| {
        let disk = member.name.clone();
        NewTop { disk, image, format: Format::Qcow2, history }
    });
    Ok((facts, tops.collect()))
}

async fn undo(members: &[Member], set: Id) {
    let undone = join_all(
        members.iter().map(|member| member.home.with(move |stack| async move { stack.undo_snapshot(set).await })),
    );
    for (result, member) in undone.await.into_iter().zip(members) {
        if let Err(error) = result {
            tracing::error!(
                disk = member.name,
                error = crate::chain_text(&error),
                "a snapshot is left that its fellows lack"
            );
        }
    }
}

impl Workshop {
    /// Takes a snapshot of all these images, which nobody uses.
    ///
    /// # Errors
    /// When one cannot be opened for writing, or cannot have a snapshot of that name: then there is none on any of them.
    pub async fn snapshot(
        &self,
        sources: Vec<HistorySource>,
        name: String,
    ) -> Result<Vec<SnapshotReport>, EngineError> {
        crate::validate_name(&name)?;
        self.run(move || async move {
            let mut stacks = Vec::new();
            let mut switched = Ok(());
            for source in &sources {
                match Stack::open_at_rest(source).await {
                    Ok(stack) => stacks.push((source.file.display().to_string(), stack)),
                    Err(error) => {
                        switched = Err(error);
                        break;
                    }
                }
            }
            let set = random_id();
            for (_, stack) in &stacks {
                if switched.is_ok() {
                    switched = switch(stack, set, &name).await;
                }
            }
            let facts = Instantaneous { time: now(), consistency: SnapshotConsistency::Offline };
            let mut reports = Vec::new();
            for (disk, stack) in &stacks {
                match &switched {
                    Ok(()) => reports.push(stack.settle_snapshot(disk, &facts).await),
                    Err(_) => stack.undo_snapshot(set).await?,
                }
            }
            let mut closed = Ok(());
            for (_, stack) in &stacks {
                closed = closed.and(stack.close().await);
            }
            switched?;
            for ((_, stack), source) in stacks.iter().zip(&sources) {
                // Closed, so nobody writes to it.
                if source.history.file.is_none() {
                    take_history_along(source.file.clone(), stack.image()).await;
                }
            }
            let reports = reports.into_iter().collect::<Result<Vec<_>, _>>()?;
            closed?;
            Ok(reports)
        })
        .await
    }
}

async fn switch(stack: &Stack, set: Id, name: &str) -> Result<(), EngineError> {
    stack.prepare_snapshot(set, name).await?;
    stack.hold_for_snapshot().await?;
    stack.switch_to_overlay().await
}
