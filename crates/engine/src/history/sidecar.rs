//! The sidecar file: where it is, how it is made and opened, and what becomes of a damaged one.

use super::host::FileHost;
use super::parked::{self, Lot};
use super::{HistoryMode, HistorySpec};
use crate::images::stack::Stack;
use crate::{CacheMode, EngineError, durable_file};
use chain::Chain;
use dataplane::LocalTask;
use disk::{Disk, DiskError, StorageHandle};
use std::cell::RefCell;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use storage::{FileStorage, LockMode, OpenOptions};
use tracking::{CreateOptions, Damage, Distrust, History, HistoryError, Host, Tracked};

/// Between two looks at what is due beside the guest's requests.
const TICK: Duration = Duration::from_secs(1);

/// Where the history of an image is, unless another place is named.
pub fn sidecar_of(image: &Path) -> PathBuf {
    let mut name = image.file_name().unwrap_or_default().to_owned();
    name.push(".history");
    image.with_file_name(name)
}

/// A history that is kept while its disk is open.
pub(crate) struct Kept {
    pub(crate) disk: Rc<Tracked<Chain>>,
    pub(crate) file: PathBuf,
    /// Why older marks are refused since this opening, if they are.
    pub(crate) distrust: Option<String>,
    pub(super) host: Rc<FileHost>,
    tender: RefCell<Option<LocalTask<()>>>,
}

impl Kept {
    pub(crate) fn history(&self) -> &Rc<History> {
        self.disk.history()
    }

    /// Ends what is done beside the guest's requests.
    pub(crate) async fn end_tending(&self) {
        let tender = self.tender.borrow_mut().take();
        if let Some(tender) = tender {
            self.history().end_tending();
            tender.await;
        }
    }
}

/// How a history is to be opened.
pub(crate) struct HistoryRequest<'a> {
    pub(crate) spec: &'a HistorySpec,
    pub(crate) image: &'a Path,
    pub(crate) writable: bool,
    pub(crate) cache: CacheMode,
}

/// Opens the history of a disk, and makes it if there is none. `Ok(Err(reason))`: the disk has none, and why.
///
/// # Errors
/// With [`HistoryMode::On`], whatever keeps the disk from having a history.
pub(crate) async fn open(
    request: HistoryRequest<'_>,
    chain: Rc<Chain>,
    files: &[FileStorage],
) -> Result<Result<Kept, String>, EngineError> {
    let image = request.image;
    // Who mends an image by other ways has its history written, but not the image.
    let mut lot = match request.writable && !chain.geometry().read_only {
        true => Lot::open(files).await,
        false => {
            if !request.writable {
                parked::tell_of_parked(image.to_owned()).await;
            }
            None
        }
    };
    let opened = open_kept(&request, &chain, files, &mut lot).await;
    match (lot, &opened) {
        (Some(lot), Ok(Ok(kept))) => lot.use_for(&kept.disk, image).await.map_err(|e| lost(&kept.file, e))?,
        (Some(lot), Ok(Err(_))) => lot.put_back(&chain, image).await?,
        _ => {}
    }
    opened
}

async fn open_kept(
    request: &HistoryRequest<'_>,
    chain: &Rc<Chain>,
    files: &[FileStorage],
    lot: &mut Option<Lot>,
) -> Result<Result<Kept, String>, EngineError> {
    let HistoryRequest { spec, image, .. } = request;
    let device = files.first().is_some_and(FileStorage::is_block_device);
    if spec.mode == HistoryMode::Off {
        let file = spec.file.clone().or_else(|| (!device).then(|| sidecar_of(image)));
        if let Some(file) = file.filter(|_| request.writable) {
            settle(request, file, chain, files, lot).await?;
        }
        return Ok(Err("it is switched off".to_owned()));
    }
    let file = match (&spec.file, device) {
        (Some(file), _) => file.clone(),
        (None, false) => sidecar_of(image),
        (None, true) => {
            return unavailable(spec, request, "a block device has no place beside it; name a file for it".to_owned());
        }
    };
    match open_file(request, file, Rc::clone(chain), files, lot).await {
        Ok(kept) => Ok(kept),
        Err(error) => unavailable(spec, request, crate::chain_text(&error)),
    }
}

/// Before an image is written to without its history: takes down how a killed writer has left it, so that the image's time
/// tells of what follows. A killed writer alone leaves a doubt of some seconds.
async fn settle(
    request: &HistoryRequest<'_>,
    file: PathBuf,
    chain: &Rc<Chain>,
    files: &[FileStorage],
    lot: &mut Option<Lot>,
) -> Result<(), EngineError> {
    let path = file.clone();
    if !dataplane::offload(move || path.exists()).await {
        return Ok(());
    }
    let host = Rc::new(FileHost::new(Rc::clone(chain), files.to_vec(), file.clone()));
    // Durable before anything is written unseen, as a sidecar always is.
    let settled = match open_sidecar(&file, request).await {
        Ok(storage) => History::open(storage, host.clone()).await,
        Err(error) => Err(error.into()),
    };
    match settled {
        Ok((_, distrust)) => {
            give_up_if_changed(lot, distrust.as_ref())?;
            // Writes from now on bear another time.
            host.let_time_pass().await;
        }
        Err(error) => tracing::warn!(history = %file.display(), %error, "the history that is not kept cannot be read"),
    }
    Ok(())
}

/// Parked writes belong to the image as it was.
fn give_up_if_changed(lot: &mut Option<Lot>, distrust: Option<&Distrust>) -> Result<(), EngineError> {
    match (lot, distrust) {
        // Of times the lot has its own signs, which go on where the sidecar is slow.
        (Some(_), Some(Distrust::Lost(_) | Distrust::ModifiedLater { .. })) => Ok(()),
        (Some(lot), Some(_)) => lot.give_up(),
        _ => Ok(()),
    }
}

fn unavailable(
    spec: &HistorySpec,
    request: &HistoryRequest<'_>,
    reason: String,
) -> Result<Result<Kept, String>, EngineError> {
    if spec.mode == HistoryMode::On {
        return Err(EngineError::NoHistory { image: request.image.to_owned(), reason });
    }
    tracing::warn!(image = %request.image.display(), reason, "no history is kept");
    Ok(Err(reason))
}

async fn open_file(
    request: &HistoryRequest<'_>,
    file: PathBuf,
    chain: Rc<Chain>,
    files: &[FileStorage],
    lot: &mut Option<Lot>,
) -> Result<Result<Kept, String>, EngineError> {
    let host = Rc::new(FileHost::new(Rc::clone(&chain), files.to_vec(), file.clone()));
    let geometry = chain.geometry();
    let options = CreateOptions { granule: request.spec.granule.unwrap_or(64 << 10), size: geometry.size };
    let path = file.clone();
    let exists =
        dataplane::offload(move || path.try_exists()).await.map_err(|e| EngineError::file(&file, "look for", e))?;
    if !exists && !request.writable {
        return Ok(Err("there is none, and a disk that is not written to needs none".to_owned()));
    }
    if !exists {
        make(&file, &host, options).await?;
    }
    let opened = match open_sidecar(&file, request).await {
        Ok(storage) => History::open(storage, host.clone()).await,
        Err(error) => Err(error.into()),
    };
    let (history, distrust) = match opened {
        Ok((history, distrust)) => {
            give_up_if_changed(lot, distrust.as_ref())?;
            (history, distrust.map(|d| d.to_string()))
        }
        // A later version's: it is not ours to judge.
        Err(HistoryError::Damaged(damage @ Damage::Version { .. })) => {
            return Err(lost(&file, HistoryError::Damaged(damage)));
        }
        Err(HistoryError::Damaged(damage)) if request.spec.file.is_some() && !is_history(file.clone()).await => {
            // Perhaps a slip of who named it: it may be anything, an image too.
            return Err(EngineError::Invalid(format!(
                "{} is no history ({damage}), and is left alone; name another file",
                file.display()
            )));
        }
        Err(HistoryError::Damaged(damage)) if request.writable => {
            let aside = put_aside(&file).await?;
            let reason = format!(
                "the history was damaged ({damage}); it is kept as {} and a new one has begun",
                aside.display()
            );
            tracing::error!(history = %file.display(), reason);
            make(&file, &host, options).await?;
            let (history, _) =
                History::open(open_sidecar(&file, request).await?, host.clone()).await.map_err(|e| lost(&file, e))?;
            (history, Some(reason))
        }
        Err(error) => return Err(lost(&file, error)),
    };
    if let Some(reason) = &distrust {
        tracing::warn!(history = %file.display(), reason, "older marks are refused");
    }
    if let Some(limit) = request.spec.open_limit {
        history.set_open_limit(limit);
    }
    history.set_flushes_void(request.cache == CacheMode::Unsafe);
    let history = Rc::new(history);
    let disk = Tracked::new(chain, Rc::clone(&history)).await.map_err(|e| lost(&file, e))?;
    let tender =
        request.writable.then(|| dataplane::spawn_local(async move { history.tend(|| dataplane::sleep(TICK)).await }));
    Ok(Ok(Kept { disk, file, distrust, host, tender: RefCell::new(tender) }))
}

/// Whether a file begins as histories do.
pub(crate) async fn is_history(file: PathBuf) -> bool {
    dataplane::offload(move || {
        let mut first_bytes = Vec::new();
        let read = fs::File::open(file).and_then(|file| file.take(8192).read_to_end(&mut first_bytes));
        read.is_ok() && History::is_one(&first_bytes)
    })
    .await
}

fn lost(file: &Path, error: HistoryError) -> EngineError {
    EngineError::History { file: file.to_owned(), source: error }
}

async fn open_sidecar(file: &Path, request: &HistoryRequest<'_>) -> Result<StorageHandle, DiskError> {
    // The image's lock is the history's, too. It is synced also where the image's flushes are ignored: it is what knows
    // that they were.
    let options = OpenOptions { read_only: !request.writable, lock: LockMode::Off, ..OpenOptions::default() };
    let file = file.to_owned();
    dataplane::offload(move || FileStorage::open(file, &options)).await.map(StorageHandle::new)
}

/// Makes a new history: under another name first, so that there is a whole one or none.
async fn make(file: &Path, host: &Rc<FileHost>, options: CreateOptions) -> Result<(), EngineError> {
    let mut fresh = file.file_name().unwrap_or_default().to_owned();
    fresh.push(".new");
    let fresh = file.with_file_name(fresh);
    let path = fresh.clone();
    let how = OpenOptions { lock: LockMode::Off, replace: true, ..OpenOptions::create_new(0) };
    let storage = dataplane::offload(move || FileStorage::open(path, &how)).await?;
    let made = History::create(StorageHandle::new(storage), host.clone(), options).await;
    let (from, to) = (fresh.clone(), file.to_owned());
    let failed = made.is_err();
    let named = dataplane::offload(move || {
        if failed {
            return fs::remove_file(&from);
        }
        fs::rename(&from, &to)?;
        durable_file::sync_directory_of(&to)
    })
    .await;
    made.map_err(|e| match e {
        HistoryError::Disk(e) => EngineError::Disk(e),
        other => lost(file, other),
    })?;
    named.map_err(|e| EngineError::file(file, "make", e))
}

/// Gives a damaged history another name, so that nothing is lost that somebody might read from it.
async fn put_aside(file: &Path) -> Result<PathBuf, EngineError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(format!(".damaged-{now}"));
    let aside = file.with_file_name(name);
    let (from, to) = (file.to_owned(), aside.clone());
    let moved: io::Result<()> = dataplane::offload(move || fs::rename(from, to)).await;
    moved.map_err(|e| EngineError::file(file, "put the damaged history aside", e))?;
    Ok(aside)
}

impl Stack {
    /// The history that is kept, or why none is.
    pub(crate) fn kept(&self) -> Result<&Kept, EngineError> {
        self.history().map_err(|reason| EngineError::NoHistory { image: self.image(), reason: reason.to_owned() })
    }
}
