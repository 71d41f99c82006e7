//! Going back to a snapshot: an empty overlay over it takes the disk's place.

use super::overlay::{self, NewOverlay};
use super::{SnapshotReport, list, place};
use crate::history::HistorySource;
use crate::images::gate::FileGate;
use crate::images::mended::Mended;
use crate::images::{Workshop, offload_format};
use crate::{EngineError, Format, linkage};
use chain::{Access, OpenGate};
use std::path::Path;

impl Workshop {
    /// Has a disk that nobody uses go back to a snapshot. What it holds now, and no snapshot holds, is lost; its history goes
    /// on, but all marks are refused from now on.
    ///
    /// # Errors
    /// When the disk is in use, or has no such snapshot: it is as it was then.
    pub async fn revert(&self, source: HistorySource, name: String) -> Result<(), EngineError> {
        self.run(move || async move { revert(source, &name).await }).await
    }
}

async fn revert(source: HistorySource, name: &str) -> Result<(), EngineError> {
    let given = source.file.clone();
    let file = dataplane::offload({
        let file = given.clone();
        move || file.canonicalize()
    })
    .await
    .map_err(|e| EngineError::file(&given, "find", e))?;
    let format = offload_format(file.clone(), source.format).await?;
    let snapshot = list::named(list::of_file(&file, Some(format)).await?, &given.display().to_string(), name)?;
    linkage::refuse_half_merged(&snapshot.file).await?;
    if format != Format::Qcow2 {
        return Err(EngineError::Unsupported(format!(
            "{}: a raw image is not an overlay that could be exchanged; revert the disk that stands on it",
            given.display()
        )));
    }
    // Nobody uses the disk while its place is taken, and no clone stands on it.
    let lock = FileGate::cached().open_storage(&file, Access::ReadWrite).await?;
    linkage::refuse_parent(&file).await?;
    let history = Mended::before(&file, format, source.history.file.clone()).await;
    let done = exchange(&file, &snapshot).await;
    if let Some(history) = history {
        // The content is another one: no mark is worth anything, whatever became of the exchange.
        match &done {
            Ok(()) => history.after(false, None).await,
            Err(_) => history.give_up().await,
        }
    }
    drop(lock);
    done
}

/// Crash: the disk's name leads to the old file until one rename, and then to an overlay that is durable and holds nothing.
async fn exchange(file: &Path, snapshot: &SnapshotReport) -> Result<(), EngineError> {
    let new = NewOverlay {
        fresh: place::beside(file, ".new"),
        name: file.display().to_string(),
        parent: overlay::parent_name(file, &snapshot.file)?,
        parent_format: snapshot.format,
        size: snapshot.size,
        direct: false,
    };
    let (fresh, to) = (new.fresh.clone(), file.to_owned());
    let entered = match new.make().await {
        Ok(_) => dataplane::offload(move || place::replace(&fresh, &to)).await,
        Err(error) => Err(error),
    };
    if entered.is_err() {
        overlay::remove(new.fresh).await;
    }
    entered
}
