//! The same for images that nobody serves.

use super::host::random_id;
use super::marking::FreezeSpec;
use super::report::{ChangesReport, HistoryReport, MarkReport};
use super::{HistorySpec, sidecar_of};
use crate::images::request::SourceSpec;
use crate::images::stack::{HistoryUse, OpenRequest, Stack};
use crate::images::{Workshop, closing, offload_format};
use crate::linkage::LinkageUse;
use crate::{EngineError, Format};
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::rc::Rc;
use tracking::{Consistency, NewPoint};

/// An image with its history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistorySource {
    /// The image.
    pub file: PathBuf,
    /// Its format; by its extension when absent.
    pub format: Option<Format>,
    /// Its history.
    pub history: HistorySpec,
}

pub(crate) async fn open(source: &HistorySource, writable: bool) -> Result<Rc<Stack>, EngineError> {
    let format = offload_format(source.file.clone(), source.format).await?;
    let request = OpenRequest {
        writable,
        history: HistoryUse::Kept(source.history.clone()),
        // What is asked for is in the history, which judges by itself whether the chain is the one that it speaks of.
        linkage: if writable { LinkageUse::Enforced } else { LinkageUse::Told },
        ..OpenRequest::reading(source.file.clone(), format)
    };
    Ok(Rc::new(Stack::open(&request).await?))
}

/// Opens it, but makes no history where none is.
pub(super) async fn open_with_history(source: &HistorySource, writable: bool) -> Result<Rc<Stack>, EngineError> {
    let (image, file) = (source.file.clone(), source.history.file.clone());
    let missing = dataplane::offload(move || {
        let device = || fs::metadata(&image).is_ok_and(|facts| facts.file_type().is_block_device());
        // A block device has no place for one, which opening it says.
        let sidecar = file.or_else(|| (!device()).then(|| sidecar_of(&image)))?;
        (image.exists() && !sidecar.exists()).then_some(sidecar)
    });
    if let Some(sidecar) = missing.await {
        return Err(EngineError::NoHistory {
            image: source.file.clone(),
            reason: format!("there is no {}; `highwater mark` makes one", sidecar.display()),
        });
    }
    open(source, writable).await
}

pub(super) fn name_of(source: &HistorySource) -> String {
    source.file.display().to_string()
}

impl Workshop {
    /// Takes a mark of all these images, at one instant.
    ///
    /// # Errors
    /// When an image cannot be opened for writing, or has no history.
    pub async fn mark(&self, sources: Vec<HistorySource>, name: String) -> Result<Vec<MarkReport>, EngineError> {
        self.run(move || async move {
            let named: Vec<_> = sources.iter().map(|source| (name_of(source), source)).collect();
            with_all(&named, async |stacks| mark_all(stacks, &name).await).await
        })
        .await
    }

    /// All marks of an image, and its history's facts.
    ///
    /// # Errors
    /// When the image cannot be opened, or has no history.
    pub async fn marks(&self, source: HistorySource) -> Result<(HistoryReport, Vec<MarkReport>), EngineError> {
        self.run(move || async move {
            let stack = open_with_history(&source, false).await?;
            let marks = stack.marks(&name_of(&source)).map(|marks| (stack.history_report(), marks));
            closing(&stack, marks).await
        })
        .await
    }

    /// One mark of an image.
    ///
    /// # Errors
    /// When the image cannot be opened, has no history, or no such mark.
    pub async fn mark_named(&self, source: HistorySource, name: String) -> Result<MarkReport, EngineError> {
        self.run(move || async move {
            let stack = open_with_history(&source, false).await?;
            let mark = stack.mark_named(&name_of(&source), &name);
            closing(&stack, mark).await
        })
        .await
    }

    /// The facts of an image's history, `None` when it has none. A history that cannot be read is told of, and is no failure.
    ///
    /// A shared image (`force_share`) is not opened, and neither is its history: others may be writing to both.
    ///
    /// # Errors
    /// When the thread has ended.
    pub async fn history_of(
        &self,
        source: SourceSpec,
        file: Option<PathBuf>,
    ) -> Result<Option<HistoryReport>, EngineError> {
        self.run(move || async move {
            let sidecar = file.unwrap_or_else(|| sidecar_of(&source.file));
            let there = sidecar.clone();
            if !dataplane::offload(move || there.exists()).await {
                return Ok(None);
            }
            let unread = |reason: String| {
                Some(HistoryReport { file: Some(sidecar.display().to_string()), ..HistoryReport::none(reason) })
            };
            if source.force_share || source.snapshot.is_some() {
                return Ok(unread("it was not read, as somebody else may be writing to it".to_owned()));
            }
            let history = HistorySpec { file: Some(sidecar.clone()), ..HistorySpec::default() };
            let source = HistorySource { file: source.file, format: source.format, history };
            let read = match open(&source, false).await {
                Ok(stack) => closing(&stack, Ok(stack.history_report())).await,
                Err(error) => Err(error),
            };
            Ok(match read {
                Ok(report) if report.file.is_some() => Some(report),
                Ok(report) => unread(report.reason.unwrap_or_default()),
                Err(error) => unread(crate::chain_text(&error)),
            })
        })
        .await
    }

    /// Forgets a mark.
    ///
    /// # Errors
    /// When there is none of that name, or the history cannot be written.
    pub async fn delete_mark(&self, source: HistorySource, name: String) -> Result<(), EngineError> {
        self.run(move || async move {
            let stack = open_with_history(&source, true).await?;
            let deleted = stack.delete_mark(&name).await;
            closing(&stack, deleted).await
        })
        .await
    }

    /// Trusts all marks again, on the user's word.
    ///
    /// # Errors
    /// When there is no history, or it cannot be written.
    pub async fn trust_history(&self, source: HistorySource) -> Result<Vec<MarkReport>, EngineError> {
        self.run(move || async move {
            let stack = open_with_history(&source, true).await?;
            let trusted = match stack.trust_history().await {
                Ok(()) => stack.marks(&name_of(&source)),
                Err(error) => Err(error),
            };
            closing(&stack, trusted).await
        })
        .await
    }

    /// What changed on an image.
    ///
    /// # Errors
    /// When a mark is missing or refused, or the history cannot be read.
    pub async fn changes(
        &self,
        source: HistorySource,
        since: String,
        until: Option<String>,
    ) -> Result<ChangesReport, EngineError> {
        self.run(move || async move {
            let stack = open_with_history(&source, false).await?;
            let changes = stack.changes(&name_of(&source), &since, until.as_deref(), 0, usize::MAX).await;
            closing(&stack, changes).await
        })
        .await
    }
}

/// Opens all these images for writing, works on them, and closes them.
pub(crate) async fn with_all<T>(
    named: &[(String, &HistorySource)],
    work: impl AsyncFnOnce(&[(String, Rc<Stack>)]) -> Result<T, EngineError>,
) -> Result<T, EngineError> {
    let mut stacks = Vec::new();
    let mut opened = Ok(());
    for (name, source) in named {
        match open(source, true).await {
            Ok(stack) => stacks.push((name.clone(), stack)),
            Err(error) => {
                opened = Err(error);
                break;
            }
        }
    }
    let done = match opened {
        Ok(()) => work(&stacks).await,
        Err(error) => Err(error),
    };
    let mut closed = Ok(());
    for (_, stack) in &stacks {
        closed = closed.and(stack.close().await);
    }
    let done = done?;
    closed?;
    Ok(done)
}

pub(crate) async fn mark_all(stacks: &[(String, Rc<Stack>)], name: &str) -> Result<Vec<MarkReport>, EngineError> {
    for (_, stack) in stacks {
        if let Err(error) = stack.hold(name).await {
            stacks.iter().for_each(|(_, stack)| stack.release());
            return Err(error);
        }
    }
    let set = random_id();
    for (_, stack) in stacks {
        stack.cut(NewPoint { name: name.to_owned(), set }, None);
    }
    let mut marks = Vec::new();
    for (disk, stack) in stacks {
        match stack.commit(disk, Consistency::Crash).await {
            Ok(mark) => marks.push(mark),
            Err(error) => {
                for ((_, stack), _) in stacks.iter().zip(&marks) {
                    stack.delete_mark(name).await?;
                }
                return Err(error);
            }
        }
    }
    Ok(marks)
}

/// Nobody is there to be frozen when an image is not in use.
///
/// # Errors
/// When somebody wanted that.
pub fn refuse_freeze(freeze: Option<&FreezeSpec>) -> Result<(), EngineError> {
    match freeze {
        None => Ok(()),
        Some(_) => Err(EngineError::Invalid(
            "--freeze is for disks that a guest uses through the daemon; an image that nobody serves is at rest"
                .to_owned(),
        )),
    }
}
