//! Work on image files: create, info, map, check, convert, compare, resize, measure.
//!
//! A [`Workshop`] does it on an I/O thread and knows nothing of printing; the daemon's jobs and the command
//! line share it.

pub(crate) mod check;
mod compare;
mod convert;
pub(crate) mod create;
pub(crate) mod gate;
pub(crate) mod info;
pub(crate) mod live;
pub(crate) mod map;
mod measure;
pub(crate) mod mended;
mod progress;
mod rate_limit;
mod rate_meter;
pub mod report;
pub mod request;
pub(crate) mod resize;
pub(crate) mod stack;
mod watched;
mod zeroes;

pub(crate) use progress::percent;
pub use progress::{Progress, ProgressUnit};

use crate::format_policy::format_of;
use crate::linkage::LinkageUse;
use crate::{EngineError, Format, JobKind};
use dataplane::{Backend, IoThread, IoThreads, IoThreadsConfig};
use disk::ByteRange;
use report::{CheckReport, CompareReport, ConvertReport, ImageInfo, MapEntry, MeasureReport};
use request::{CheckSpec, CompareSpec, ConvertSpec, CreateSpec, MeasureSpec, ResizeSpec, SourceSpec};
use serde::Serialize;
use stack::{OpenRequest, Stack};
use std::path::PathBuf;
use std::sync::Arc;

/// Does work on image files, on I/O threads.
#[derive(Clone)]
pub struct Workshop {
    threads: Arc<[IoThread]>,
    /// Threads that live for this workshop alone.
    _own: Option<Arc<IoThreads>>,
}

impl Workshop {
    /// A workshop with threads of its own, one per processor.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn start(backend: Backend) -> Result<Self, EngineError> {
        let threads = IoThreads::start(IoThreadsConfig { threads: 0, backend }).map_err(EngineError::Threads)?;
        Ok(Self { threads: threads.all().into(), _own: Some(Arc::new(threads)) })
    }

    /// A workshop on threads that do other things as well.
    pub(crate) fn on(threads: &[IoThread]) -> Self {
        Self { threads: threads.into(), _own: None }
    }

    pub(crate) async fn run<T, F, Fut>(&self, work: F) -> Result<T, EngineError>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, EngineError>> + 'static,
        T: Send + 'static,
    {
        self.threads[0].spawn(work).await.map_err(|_| EngineError::ThreadGone)?
    }

    /// Makes an image.
    ///
    /// # Errors
    /// When the file is in use, the options make no sense, or the backing file cannot be opened.
    pub async fn create(&self, spec: CreateSpec, progress: Progress) -> Result<ImageInfo, EngineError> {
        self.run(move || async move {
            let source = SourceSpec::of(spec.file.clone(), Some(spec.format));
            create::create_watched(&spec, &progress).await?;
            info::info(&source).await
        })
        .await
    }

    /// An image's facts, followed by those of the images below it when `chain` is set.
    ///
    /// # Errors
    /// When an image cannot be read.
    pub async fn info(&self, source: SourceSpec, chain: bool) -> Result<Vec<ImageInfo>, EngineError> {
        self.run(move || async move {
            if chain { info::chain(&source).await } else { Ok(vec![info::info(&source).await?]) }
        })
        .await
    }

    /// Runs of bytes in one state.
    ///
    /// # Errors
    /// When the image or one below it cannot be read.
    pub async fn map(&self, source: SourceSpec, range: ByteRange) -> Result<Vec<MapEntry>, EngineError> {
        self.run(move || async move {
            let stack = open_source_with(&source, LinkageUse::Told).await?;
            let result = map::map(&stack, range, usize::MAX).await;
            closing(&stack, result.map(|(entries, _)| entries)).await
        })
        .await
    }

    /// Checks an image's metadata, and mends it if that is asked for.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] for formats without metadata; when the image cannot be read.
    pub async fn check(&self, spec: CheckSpec, progress: Progress) -> Result<CheckReport, EngineError> {
        self.run(move || async move { check::check(spec, &progress).await }).await
    }

    /// Copies an image.
    ///
    /// # Errors
    /// When source or target cannot be opened, read or written. [`EngineError::Unfinished`] when the copy had begun: a target
    /// that was made for it is removed, another is left as far as it got.
    pub async fn convert(&self, spec: ConvertSpec, progress: Progress) -> Result<ConvertReport, EngineError> {
        self.run(move || async move { convert::convert(spec, progress).await }).await
    }

    /// Compares two images.
    ///
    /// # Errors
    /// When one cannot be opened or read.
    pub async fn compare(&self, spec: CompareSpec, progress: Progress) -> Result<CompareReport, EngineError> {
        compare::compare(&self.threads, spec, progress).await
    }

    /// Changes the size of an image that nobody uses.
    ///
    /// # Errors
    /// When it is in use, would lose bytes without leave, or cannot have that size.
    pub async fn resize(&self, spec: ResizeSpec, progress: Progress) -> Result<ImageInfo, EngineError> {
        self.run(move || async move { resize::resize(spec, &progress).await }).await
    }

    /// Finds out how much space a conversion would take.
    ///
    /// # Errors
    /// When the options make no sense or the source cannot be read.
    pub async fn measure(&self, spec: MeasureSpec, progress: Progress) -> Result<MeasureReport, EngineError> {
        self.run(move || async move { measure::measure(spec, &progress).await }).await
    }

    /// Does a job; the result is what the command of the same name prints with `--json`.
    pub(crate) async fn perform(&self, kind: JobKind, progress: Progress) -> Result<serde_json::Value, EngineError> {
        fn value(report: impl Serialize) -> Result<serde_json::Value, EngineError> {
            serde_json::to_value(report).map_err(|e| EngineError::Invalid(e.to_string()))
        }
        match kind {
            JobKind::Create(spec) => value(self.create(spec, progress).await?),
            JobKind::Convert(spec) => value(self.convert(spec, progress).await?),
            JobKind::Compare(spec) => value(self.compare(spec, progress).await?),
            JobKind::Audit(spec) => value(self.audit(spec, progress).await?),
            JobKind::Check(spec) => value(self.check(spec, progress).await?),
            JobKind::Measure(spec) => value(self.measure(spec, progress).await?),
            JobKind::Resize(spec) => value(self.resize(spec, progress).await?),
            JobKind::Restore(spec) => value(self.restore(spec, progress).await?),
            JobKind::Promote(_) | JobKind::Consolidate(_) | JobKind::Backup(_) => {
                Err(EngineError::Invalid("only a job of the daemon can work on its disks".to_owned()))
            }
        }
    }
}

/// The format of a file by [`format_of`], off the I/O thread because it may have to open the file.
pub(crate) async fn offload_format(file: PathBuf, given: Option<Format>) -> Result<Format, EngineError> {
    dataplane::offload(move || format_of(&file, given)).await
}

/// Opens a source for reading.
pub(crate) async fn open_source(source: &SourceSpec) -> Result<Stack, EngineError> {
    let linkage = if source.despite_fault { LinkageUse::Told } else { LinkageUse::Enforced };
    open_source_with(source, linkage).await
}

async fn open_source_with(source: &SourceSpec, linkage: LinkageUse) -> Result<Stack, EngineError> {
    match (&source.live, &source.disk) {
        (Some(live), _) => return Ok(Stack::live(live)),
        (None, Some(disk)) => {
            return Err(EngineError::Invalid(format!("only a job of the daemon can read its disk {disk:?}")));
        }
        (None, None) => {}
    }
    let format = offload_format(source.file.clone(), source.format).await?;
    let mut request = OpenRequest::reading(source.file.clone(), format);
    request.image.snapshot.clone_from(&source.snapshot);
    request.force_share = source.force_share;
    request.cache = source.cache;
    request.linkage = linkage;
    Stack::open(&request).await
}

/// Closes a stack whatever came out; the first failure is told.
pub(crate) async fn closing<T>(stack: &Stack, result: Result<T, EngineError>) -> Result<T, EngineError> {
    let closed = stack.close().await;
    let value = result?;
    closed?;
    Ok(value)
}
