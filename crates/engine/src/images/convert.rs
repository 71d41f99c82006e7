//! Copying an image, perhaps into another format.
//!
//! The source's map says what need not be read, and where the rest stands. Data that stand as they are in a file are
//! read, searched for zeroes and written by worker threads with plain system calls, in pieces that are large enough for
//! the page cache to take large folios; this thread only asks the layers where they are and where they go. What
//! a layer must be asked for (compressed clusters, direct I/O, targets over a parent) goes through the disks. Compressed
//! clusters are made by workers and written in the order of the disk, so that the file is compact and reads
//! ahead well.
//!
//! The target is written without barriers, as a crash would leave a file that nobody asked for anyway. Its writeback
//! begins while the copy goes on, and at the end it is made durable as a whole. A copy that fails takes the
//! target that it made away again, as nobody could tell it from a whole one.

mod compress;
mod files;

use self::compress::{Cluster, Stored, encode};
use self::files::{Writeback, copy_range, read_file, write_file};
use super::gate::FileId;
use super::report::ConvertReport;
use super::request::{ConvertSpec, CreateSpec};
use super::stack::{OpenRequest, Stack};
use super::{Progress, closing, create, open_source, zeroes};
use crate::{CacheMode, EngineError, Format};
use disk::{Below, Buf, ByteRange, DiskExtent, Fill, LayerHandle, Storage, WriteFlags, ZeroMode};
use formats::qcow2::Compression;
use futures_util::future::ready;
use futures_util::stream::{self, Stream, StreamExt};
use rustix::io::Errno;
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use storage::FileStorage;

/// Bytes of one piece of work.
const PIECE: u64 = 2 << 20;
/// Pieces under way at the same time: beside those that workers have, and those that wait for a place in the target.
/// With [`PIECE`] they bound the memory.
const UNDER_WAY: usize = 4;
/// Pieces under way at the same time when clusters are compressed.
const ENCODING: usize = 8;
/// Zeroes in a row that become a hole unless the request says otherwise.
const SPARSE: u64 = 4096;

/// Copies the image.
pub(crate) async fn convert(spec: ConvertSpec, progress: Progress) -> Result<ConvertReport, EngineError> {
    validate(&spec)?;
    let source = open_source(&spec.source).await?;
    let result = into_target(&spec, &source, progress).await;
    closing(&source, result).await
}

/// Refuses what cannot be done before anything is touched.
fn validate(spec: &ConvertSpec) -> Result<(), EngineError> {
    let invalid = |text: &str| Err(EngineError::Invalid(text.to_owned()));
    if spec.compress && spec.format == Format::Raw {
        return invalid("raw images do not hold compressed data; give -O qcow2");
    }
    if spec.compress && !spec.no_create && spec.options.contains_key("data_file") {
        return invalid("an image with a data_file holds no compressed data; leave out -c or the option data_file");
    }
    if spec.copy_range && spec.compress {
        return invalid("the kernel does not compress what it copies; leave out -c or -C");
    }
    if spec.copy_range && spec.sparse_size.is_some() {
        return invalid("what the kernel copies is not searched for zeroes; leave out -S or -C");
    }
    Ok(())
}

/// Every file of the source, and refuses a target that is one of them under whatever name.
async fn files_to_keep(spec: &ConvertSpec, source: &Stack) -> Result<Vec<FileId>, EngineError> {
    let files = source.files();
    let mut written = vec![spec.target.clone()];
    if let Some(data) = spec.options.get("data_file").filter(|_| !spec.no_create) {
        written.push(beside(&spec.target, data));
    }
    dataplane::offload(move || {
        let mut kept = Vec::with_capacity(files.len());
        for file in &files {
            let found = file.file().metadata();
            kept.push(FileId::of(&found.map_err(|e| EngineError::file(file.name(), "look at it", e))?));
        }
        for target in &written {
            // What is not there is none of the source's files.
            let Ok(id) = target.metadata().map(|found| FileId::of(&found)) else { continue };
            if let Some(at) = kept.iter().position(|kept| *kept == id) {
                return Err(EngineError::Invalid(format!(
                    "{} is both source and target: it is the same file as {}, which is read; choose another target",
                    target.display(),
                    files[at].name()
                )));
            }
        }
        Ok(kept)
    })
    .await
}

fn beside(image: &Path, name: &str) -> PathBuf {
    image.parent().map_or_else(|| PathBuf::from(name), |dir| dir.join(name))
}

async fn into_target(spec: &ConvertSpec, source: &Stack, progress: Progress) -> Result<ConvertReport, EngineError> {
    let kept = files_to_keep(spec, source).await?;
    let size = source.disk().geometry().size;
    progress.check()?;
    let mut reads_zero = spec.target_is_zero;
    if !spec.no_create {
        let made = create::create(&CreateSpec {
            file: spec.target.clone(),
            format: spec.format,
            size: Some(size),
            options: spec.options.clone(),
            backing: spec.backing.clone(),
            unsafe_backing: false,
        })
        .await?;
        reads_zero = made.reads_zero && spec.backing.is_none();
    }
    let request = OpenRequest {
        writable: true,
        // Direct I/O where it is asked for; barriers come at the end.
        cache: if spec.cache == CacheMode::None { CacheMode::None } else { CacheMode::Unsafe },
        ..OpenRequest::reading(spec.target.clone(), spec.format)
    };
    let target = match Stack::open_beside(&request, &kept).await {
        Ok(target) => target,
        Err(error) if spec.no_create => return Err(error),
        Err(error) => return Err(unfinished(spec, &[], error).await),
    };
    let prepared = prepare(spec, source, &target, progress, reads_zero).await;
    let copy = match prepared {
        Ok(copy) => copy,
        // Nothing has been written.
        Err(error) if spec.no_create => return closing(&target, Err(error)).await,
        Err(error) => {
            let error = closing::<()>(&target, Err(error)).await.err().unwrap_or(EngineError::Cancelled);
            return Err(unfinished(spec, &target.files(), error).await);
        }
    };
    let result = copy.run().await;
    let result = closing(&target, result).await;
    let result = match result {
        Ok(report) if spec.cache != CacheMode::Unsafe => sync(spec, &target).await.map(|()| report),
        other => other,
    };
    match result {
        Ok(report) => Ok(report),
        Err(error) => Err(unfinished(spec, &target.files(), error).await),
    }
}

/// Says that the copy has not come to its end, and removes the files that were made for it. They are locked by
/// `files` meanwhile.
async fn unfinished(spec: &ConvertSpec, files: &[FileStorage], cause: EngineError) -> EngineError {
    let target = spec.target.clone();
    let mut made: Vec<(PathBuf, Option<FileId>)> = Vec::new();
    if !spec.no_create {
        for file in files.iter().filter(|file| !file.limits().read_only) {
            let id = file.file().metadata().ok().map(|found| FileId::of(&found));
            made.push((PathBuf::from(file.name()), id));
        }
        if made.is_empty() {
            made.push((target.clone(), None));
        }
    }
    let removed = dataplane::offload(move || {
        let mut removed = !made.is_empty();
        for (path, id) in made {
            let done = path.canonicalize().and_then(|path| {
                let found = path.metadata()?;
                // Devices stay, and so does what somebody else has put there meanwhile.
                let ours = found.is_file() && id.is_none_or(|id| id == FileId::of(&found));
                if ours { std::fs::remove_file(path).map(|()| true) } else { Ok(false) }
            });
            removed &= match done {
                Ok(done) => done,
                Err(error) => {
                    tracing::warn!(file = %path.display(), %error, "an incomplete copy could not be removed");
                    false
                }
            };
        }
        removed
    })
    .await;
    EngineError::Unfinished { target, removed, source: Box::new(cause) }
}

/// Makes what was written durable, and the names of new files.
async fn sync(spec: &ConvertSpec, target: &Stack) -> Result<(), EngineError> {
    let files: Vec<FileStorage> = target.files().into_iter().filter(|file| !file.limits().read_only).collect();
    let created = !spec.no_create;
    dataplane::offload(move || {
        for file in files {
            file.file().sync_data().map_err(|e| EngineError::file(file.name(), "make it durable", e))?;
            let path = Path::new(file.name());
            if created && let Some(dir) = path.parent() {
                let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
                match File::open(dir).and_then(|dir| dir.sync_all()) {
                    // Some file systems have nothing to sync there.
                    Err(error) if error.raw_os_error() != Some(Errno::INVAL.raw_os_error()) => {
                        return Err(EngineError::file(dir, "make the new file's name durable", error));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    })
    .await
}

/// Looks whether the target can take the copy; writes nothing.
async fn prepare<'a>(
    spec: &'a ConvertSpec,
    source: &'a Stack,
    target: &'a Stack,
    progress: Progress,
    reads_zero: bool,
) -> Result<Copy<'a>, EngineError> {
    let size = source.disk().geometry().size;
    let there = target.disk().geometry().size;
    if there < size {
        return Err(EngineError::Invalid(format!(
            "{} has {there} bytes, the source has {size}; resize it or let it be created",
            spec.target.display(),
        )));
    }
    let compression = match spec.compress {
        false => None,
        true => {
            let unit = target.chain().top().geometry().encoded_unit.ok_or_else(|| {
                EngineError::Unsupported(format!(
                    "{} keeps its data in a data file and cannot hold compressed data; leave out -c",
                    spec.target.display()
                ))
            })?;
            Some((super::info::compression_of(target).await?, unit))
        }
    };
    // What shows through from a parent has to be compared, so everything goes through the disk then.
    let own_layer = target.chain().layers().len() == 1 && spec.backing.is_none();
    progress.set_total(size);
    Ok(Copy {
        spec,
        source,
        target,
        progress,
        compression,
        own_layer,
        reads_zero,
        size,
        there,
        writeback: Arc::new(Writeback::new(spec.cache == CacheMode::Writeback)),
        no_copy_range: Arc::default(),
        buffers: RefCell::default(),
        report: Cell::default(),
    })
}

#[derive(Clone, Copy, Default)]
struct Counts {
    copied: u64,
    zero: u64,
}

struct Copy<'a> {
    spec: &'a ConvertSpec,
    source: &'a Stack,
    target: &'a Stack,
    progress: Progress,
    /// How clusters are compressed, and their size.
    compression: Option<(Compression, u64)>,
    /// Nothing shows through the target.
    own_layer: bool,
    /// Whether what is not written in the target reads as zero.
    reads_zero: bool,
    size: u64,
    /// The target's size.
    there: u64,
    writeback: Arc<Writeback>,
    /// The kernel has refused to copy between these files.
    no_copy_range: Arc<AtomicBool>,
    /// Buffers of [`PIECE`] bytes that are nobody's now.
    buffers: RefCell<Vec<Buf>>,
    report: Cell<Counts>,
}

/// A piece of work.
struct Piece {
    range: ByteRange,
    state: State,
}

/// How the source holds a piece.
enum State {
    /// It reads as zero.
    Zero,
    /// All its bytes stand as they are in a file, from that offset.
    File(FileStorage, u64),
    /// The disk has to be asked.
    Disk,
}

/// Bytes on their way into the target.
#[derive(Clone)]
enum Bytes {
    /// A part of a buffer, from that place.
    Memory(Arc<Buf>, usize),
    /// In a file, from that offset.
    File(FileStorage, u64),
}

impl State {
    /// How many of the piece's bytes are moved.
    fn bytes(&self, range: ByteRange) -> u64 {
        match self {
            Self::Zero => 0,
            Self::File(..) | Self::Disk => range.len(),
        }
    }
}

impl Copy<'_> {
    async fn run(&self) -> Result<ConvertReport, EngineError> {
        match self.compression {
            Some((compression, unit)) => self.copy_compressed(compression, unit).await?,
            None => self.copy_plain().await?,
        }
        let Counts { copied, zero } = self.report.get();
        Ok(ConvertReport { filename: self.spec.target.display().to_string(), virtual_size: self.size, copied, zero })
    }

    async fn copy_plain(&self) -> Result<(), EngineError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let failed: RefCell<Option<EngineError>> = RefCell::default();
        // After a failure pieces under way are still awaited: a write that goes on behind our back could meet
        // whoever opens the target next.
        self.pieces()
            .take_while(|_| ready(failed.borrow().is_none()))
            .map(|piece| async {
                let done = match piece {
                    Ok(piece) => self.copy_piece(piece).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = done {
                    failed.borrow_mut().get_or_insert(error);
                }
            })
            .buffer_unordered(UNDER_WAY + 2 * cores)
            .for_each(|()| ready(()))
            .await;
        match failed.into_inner() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// The unit that the target stores: pieces begin and end on it.
    fn unit(&self) -> u64 {
        let unit = self.target.chain().top().geometry().unit;
        unit.max(self.compression.map_or(1, |(_, encoded)| encoded))
    }

    /// The whole disk in pieces of up to [`PIECE`] bytes, or one unit if that is more.
    fn pieces(&self) -> impl Stream<Item = Result<Piece, EngineError>> {
        stream::try_unfold(0u64, move |at| async move {
            if at >= self.size {
                return Ok(None);
            }
            self.progress.check()?;
            let piece = self.piece(at).await?;
            let end = piece.range.end();
            Ok(Some((piece, end)))
        })
    }

    /// The piece that begins at `at`, which is a multiple of the unit.
    async fn piece(&self, at: u64) -> Result<Piece, EngineError> {
        let rest = ByteRange::between(at, self.size);
        let extent: DiskExtent = self.source.disk().map(rest).await?;
        let end = extent.range.end();
        let unit = self.unit();
        let whole = if end == self.size { end } else { end / unit * unit };
        if extent.zero && whole > at && self.spec.sparse_size != Some(0) {
            return Ok(Piece { range: ByteRange::between(at, whole), state: State::Zero });
        }
        // Data, up to the next multiple of the request's size; a short extent takes its neighbour along.
        let piece = PIECE.max(unit);
        let boundary = (at / piece + 1).saturating_mul(piece);
        let end = end.div_ceil(unit).saturating_mul(unit).min(boundary).min(self.size);
        let range = ByteRange::between(at, end);
        let state = match (extent.source, extent.depth) {
            (Some(source), Some(depth)) if extent.range.contains(range) && !extent.zero => {
                let layers = self.source.chain().layers();
                let file = layers
                    .get(depth as usize)
                    .and_then(|layer| self.source.plain_file(layer.handle.storage(source.storage)));
                file.map_or(State::Disk, |file| State::File(file, source.offset))
            }
            _ => State::Disk,
        };
        Ok(Piece { range, state })
    }

    /// How finely data are searched for zeroes; `None`: not at all.
    fn zero_block(&self) -> Option<u64> {
        match self.spec.sparse_size {
            Some(0) => None,
            sparse => Some(sparse.unwrap_or(SPARSE).max(1).next_power_of_two().max(self.unit())),
        }
    }

    async fn copy_piece(&self, piece: Piece) -> Result<(), EngineError> {
        let Piece { range, state } = piece;
        self.progress.pace(state.bytes(range)).await?;
        let block = self.zero_block();
        let (buf, runs) = match state {
            State::Zero => return self.leave_zero(range).await,
            State::File(file, offset) => {
                if self.spec.copy_range && self.own_layer && !self.no_copy_range.load(Ordering::Relaxed) {
                    return self.write(range, Bytes::File(file, offset)).await;
                }
                let buf = self.buffer(range.len());
                if let Some(to) = self.raw_target(range) {
                    return self.copy_file(range, (file, offset), to, buf).await;
                }
                dataplane::offload(move || {
                    let mut buf = buf;
                    read_file(&file, offset, &mut buf)?;
                    let runs = cut(range, &buf, block);
                    Ok::<_, EngineError>((buf, runs))
                })
                .await?
            }
            State::Disk => {
                let buf = self.source.disk().read(range.offset(), self.buffer(range.len())).await?;
                match block {
                    None => (buf, vec![(range, false)]),
                    Some(_) => {
                        dataplane::offload(move || {
                            let runs = cut(range, &buf, block);
                            (buf, runs)
                        })
                        .await
                    }
                }
            }
        };
        let buf = Arc::new(buf);
        for (run, zero) in runs {
            if zero {
                self.leave_zero(run).await?;
            } else {
                let from = (run.offset() - range.offset()) as usize;
                self.write(run, Bytes::Memory(Arc::clone(&buf), from)).await?;
            }
        }
        self.give_back(Arc::try_unwrap(buf).ok());
        Ok(())
    }

    /// The target's file, if it holds the range's bytes at their own offset and as zeroes until now.
    fn raw_target(&self, range: ByteRange) -> Option<FileStorage> {
        if self.spec.format != Format::Raw || !self.own_layer || !self.reads_zero {
            return None;
        }
        let file = self.target.plain_file(self.target.chain().top().storage(disk::StorageId::IMAGE))?;
        (range.end() <= file.size()).then_some(file)
    }

    /// Copies into a raw target, in one go on one worker.
    async fn copy_file(
        &self,
        range: ByteRange,
        from: (FileStorage, u64),
        to: FileStorage,
        buf: Buf,
    ) -> Result<(), EngineError> {
        let (block, writeback) = (self.zero_block(), Arc::clone(&self.writeback));
        let (buf, counts) = dataplane::offload(move || {
            let mut buf = buf;
            read_file(&from.0, from.1, &mut buf)?;
            let mut counts = Counts::default();
            for (run, zero) in cut(range, &buf, block) {
                if zero {
                    counts.zero += run.len();
                    continue;
                }
                let at = (run.offset() - range.offset()) as usize;
                write_file(&to, run.offset(), &buf[at..at + run.len() as usize], &writeback)?;
                counts.copied += run.len();
            }
            Ok::<_, EngineError>((buf, counts))
        })
        .await?;
        self.give_back(Some(buf));
        self.count(counts.copied, counts.zero);
        Ok(())
    }

    fn buffer(&self, len: u64) -> Buf {
        let kept = if len == PIECE { self.buffers.borrow_mut().pop() } else { None };
        kept.unwrap_or_else(|| Buf::new(len as usize))
    }

    fn give_back(&self, buf: Option<Buf>) {
        if let Some(buf) = buf.filter(|buf| buf.len() as u64 == PIECE) {
            self.buffers.borrow_mut().push(buf);
        }
    }

    /// Writes a run of data.
    async fn write(&self, range: ByteRange, bytes: Bytes) -> Result<(), EngineError> {
        let unit = self.target.chain().top().geometry().unit;
        let (mut rest, mut bytes) = (range, bytes);
        // Whole units need no filling around them, so that a worker can write them.
        if self.own_layer && rest.offset().is_multiple_of(unit) {
            let end = rest.end() / unit * unit;
            let top = self.target.chain().top();
            while rest.offset() < end {
                let whole = ByteRange::between(rest.offset(), end);
                let Some(done) = self.write_planned(&top, whole, &bytes).await? else { break };
                self.count(done, 0);
                rest = rest.skip(done);
                bytes.advance(done);
            }
        }
        if rest.is_empty() {
            return Ok(());
        }
        let bytes = match bytes {
            Bytes::Memory(buf, from) if from == 0 && buf.len() as u64 == rest.len() => {
                Arc::try_unwrap(buf).unwrap_or_else(|shared| Buf::copy_of(&shared))
            }
            Bytes::Memory(buf, from) => Buf::copy_of(&buf[from..from + rest.len() as usize]),
            Bytes::File(..) => self.source.disk().read(rest.offset(), Buf::new(rest.len() as usize)).await?,
        };
        self.write_through(rest, bytes).await
    }

    /// Has a worker write a beginning of whole units of the target; returns how many bytes. `None` when the disk has to do
    /// it.
    async fn write_planned(
        &self,
        top: &LayerHandle,
        range: ByteRange,
        bytes: &Bytes,
    ) -> Result<Option<u64>, EngineError> {
        let _guard = top.guard();
        let prepared = top.prepare_write(range, Below::Zeroes).await?;
        let plan = *prepared.plan();
        let filled = plan.ticket.is_some_and(|ticket| ticket.fill != Fill::Nothing);
        let file = self.target.plain_file(top.storage(plan.storage));
        // A file that has to grow is the storage's business.
        let Some(file) = file.filter(|file| !filled && plan.offset.saturating_add(plan.range.len()) <= file.size())
        else {
            return Ok(None); // What was planned is rolled back.
        };
        let (bytes, len, writeback) = (bytes.clone(), plan.range.len(), Arc::clone(&self.writeback));
        let no_copy_range = Arc::clone(&self.no_copy_range);
        dataplane::offload(move || match bytes {
            Bytes::Memory(buf, from) => write_file(&file, plan.offset, &buf[from..from + len as usize], &writeback),
            Bytes::File(from, offset) => {
                copy_range((&from, offset), (&file, plan.offset), len, &no_copy_range, &writeback)
            }
        })
        .await?;
        prepared.commit().await?;
        Ok(Some(len))
    }

    /// Writes through the disk, and leaves out what the target shows already through its backing file.
    async fn write_through(&self, range: ByteRange, bytes: Buf) -> Result<(), EngineError> {
        if self.spec.backing.is_some() {
            let there = self.target.disk().read(range.offset(), Buf::new(bytes.len())).await?;
            let unit = self.unit() as usize;
            let mut bytes = bytes;
            let mut at = range.offset();
            for old in there.chunks(unit) {
                let new = bytes.split_to(old.len());
                if new[..] == *old {
                    self.count(0, new.len() as u64);
                } else {
                    self.count(new.len() as u64, 0);
                    self.target.disk().write(at, new, WriteFlags::default()).await?;
                }
                at += old.len() as u64;
            }
            return Ok(());
        }
        self.target.disk().write(range.offset(), bytes, WriteFlags::default()).await?;
        self.count(range.len(), 0);
        Ok(())
    }

    /// Sees to it that the range reads as zero.
    async fn leave_zero(&self, range: ByteRange) -> Result<(), EngineError> {
        if !self.reads_zero {
            let mode = ZeroMode { unmap: true, fast_only: false };
            self.target.disk().write_zeroes(range, mode, WriteFlags::default()).await?;
        }
        self.count(0, range.len());
        Ok(())
    }

    /// Counts bytes as done.
    fn count(&self, copied: u64, zero: u64) {
        let counts = self.report.get();
        self.report.set(Counts { copied: counts.copied + copied, zero: counts.zero + zero });
        self.progress.advance(copied + zero);
    }

    async fn copy_compressed(&self, compression: Compression, unit: u64) -> Result<(), EngineError> {
        // A last cluster that is cut by the source's end is stored whole, but not over bytes of a longer target: new
        // targets are longer by what rounding adds, all of it zero.
        let end = (!self.spec.no_create || self.size == self.there).then_some(self.there);
        let keep_zeroes = self.spec.sparse_size == Some(0);
        let encoded = self
            .pieces()
            .map(|piece| async move {
                let Piece { range, state } = piece?;
                self.progress.pace(state.bytes(range)).await?;
                let clusters = match state {
                    State::Zero => return Ok((range, None)),
                    State::File(file, offset) => {
                        let buf = self.buffer(range.len());
                        dataplane::offload(move || {
                            let mut buf = buf;
                            read_file(&file, offset, &mut buf)?;
                            Ok::<_, EngineError>(encode(range.offset(), buf, unit, end, compression, keep_zeroes))
                        })
                        .await?
                    }
                    State::Disk => {
                        let buf = self.source.disk().read(range.offset(), self.buffer(range.len())).await?;
                        let work = move || encode(range.offset(), buf, unit, end, compression, keep_zeroes);
                        dataplane::offload(work).await
                    }
                };
                Ok::<_, EngineError>((range, Some(clusters)))
            })
            .buffered(ENCODING);
        let mut encoded = std::pin::pin!(encoded);
        while let Some(done) = encoded.next().await {
            let (range, clusters) = done?;
            let Some(clusters) = clusters else {
                self.leave_zero(range).await?;
                continue;
            };
            for Cluster { range, bytes } in clusters {
                match bytes {
                    Stored::Zero => self.leave_zero(range).await?,
                    Stored::Plain(bytes) => self.write_through(range, bytes).await?,
                    Stored::Encoded(bytes) => {
                        self.target.chain().top().write_encoded(range, &bytes).await?;
                        self.count(range.len().min(self.size - range.offset()), 0);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Bytes {
    fn advance(&mut self, by: u64) {
        match self {
            Self::Memory(_, from) => *from += by as usize,
            Self::File(_, offset) => *offset += by,
        }
    }
}

/// Cuts bytes that belong to `range` where zeroes begin and end, if `block` says how finely.
fn cut(range: ByteRange, bytes: &[u8], block: Option<u64>) -> Vec<zeroes::Run> {
    match block {
        None => vec![(range, false)],
        Some(block) => zeroes::runs(range.offset(), bytes, block),
    }
}
