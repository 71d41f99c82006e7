//! Views: disks as they were at a mark, while their guests write on.
//!
//! A view lives on its disk's home thread and is exported, read-only, beside it, as `EXPORT@MARK`. Old bytes are saved in
//! a file without a name, which is gone with the process.

use super::contexts;
use crate::EngineError;
use crate::exports::{OpenExport, Served};
use crate::home::{DiskId, Home};
use chain::Chain;
use disk::{DiskHandle, StorageHandle};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use storage::{FileStorage, LockMode, OpenOptions};
use tracking::View;
use utoipa::ToSchema;

/// The least that is set aside for a view by default, in bytes.
const LEAST: u64 = 64 << 20;

/// A view to be made with a mark.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ViewSpec {
    /// The most bytes that old content may take; when the guest changes more, the view ends. A tenth of the disk when
    /// absent, and never more than half of what is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// Absolute path of the directory for them; the image's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub directory: Option<PathBuf>,
}

/// A view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ViewReport {
    /// Its name: the disk's and the mark's with `@` between.
    pub name: String,
    /// Of which disk.
    pub disk: String,
    /// At which mark.
    pub mark: String,
    /// NBD URIs of it.
    pub uris: Vec<String>,
    /// Bytes of old content that are saved.
    pub stored: u64,
    /// The most that this may become.
    pub limit: u64,
    /// Why it has ended, if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
}

thread_local! {
    static VIEWS: RefCell<HashMap<DiskId, Rc<View<Chain>>>> = RefCell::default();
}

/// A view that is open.
pub(crate) struct OpenView {
    pub(crate) disk: String,
    pub(crate) mark: String,
    /// Its disk's thread, and its own number there.
    pub(crate) home: Home,
    pub(crate) exports: Vec<OpenExport>,
}

impl OpenView {
    pub(crate) fn name(&self) -> String {
        format!("{}@{}", self.disk, self.mark)
    }

    pub(crate) fn uris(&self) -> Vec<String> {
        self.exports.iter().flat_map(|export| export.status.uris.clone()).collect()
    }
}

/// What is served of a view.
pub(crate) fn served(home: &Home, of: DiskId, mark: &str) -> Served {
    let id = home.id;
    Served { thread: home.thread.clone(), disk: Arc::new(move || disk(id)), contexts: contexts::of_view(of, mark) }
}

/// A view of this thread, to be read.
pub(crate) fn disk(id: DiskId) -> Option<DiskHandle> {
    VIEWS.with_borrow(|views| views.get(&id).map(|view| DiskHandle::from_rc(Rc::clone(view))))
}

/// Keeps a view on this thread.
pub(crate) fn keep(id: DiskId, view: View<Chain>) {
    VIEWS.with_borrow_mut(|views| views.insert(id, Rc::new(view)));
}

/// Forgets a view of this thread, and what it has saved.
pub(crate) fn forget(id: DiskId) {
    VIEWS.with_borrow_mut(|views| views.remove(&id));
}

/// Bytes saved, most bytes, and why it has ended.
pub(crate) fn look(id: DiskId) -> Option<(u64, u64, Option<String>)> {
    VIEWS.with_borrow(|views| views.get(&id).map(|view| (view.stored(), view.limit(), view.ended())))
}

/// A file without a name for old bytes, and how many it may take.
pub(crate) async fn store(spec: &ViewSpec, image: &Path, size: u64) -> Result<(StorageHandle, u64), EngineError> {
    let directory = match &spec.directory {
        Some(directory) => directory.clone(),
        None => image.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned(),
    };
    let wanted = spec.limit.unwrap_or((size / 10).max(LEAST));
    dataplane::offload(move || {
        let failed =
            |e: rustix::io::Errno| EngineError::file(&directory, "make a file for a view's old bytes in", e.into());
        let space = rustix::fs::statvfs(&directory).map_err(failed)?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        let name = format!(".highwater-view-{}", super::host::random_id());
        let path = directory.join(name);
        let options =
            OpenOptions { lock: LockMode::Off, cache: storage::CacheMode::Unsafe, ..OpenOptions::create_new(0) };
        let file = FileStorage::open(&path, &options)?;
        fs::remove_file(&path).map_err(|e| EngineError::file(&path, "take the name from", e))?;
        Ok((StorageHandle::new(file), wanted.min(free / 2)))
    })
    .await
}
