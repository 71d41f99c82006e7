//! Copying an image, perhaps into another format.
//!
//! The source's map says what need not be read, and where the rest stands. Storages may be used by any thread, so
//! plain data is read, searched for zeroes and (into raw files) written by all I/O threads; what needs a layer to be
//! asked is done on the first. Compressed clusters are made by worker threads and written in the order of the disk, so
//! that the file is compact and reads ahead well.
//!
//! The target is written without barriers, as a crash would leave a file that nobody asked for anyway, and
//! made durable as a whole at the end.

use super::report::ConvertReport;
use super::request::{ConvertSpec, CreateSpec};
use super::stack::{OpenRequest, Stack};
use super::zeroes::Run;
use super::{Progress, closing, create, open_source, zeroes};
use crate::{CacheMode, EngineError, Format};
use dataplane::IoThread;
use disk::{Buf, ByteRange, DiskExtent, StorageHandle, StorageId, WriteFlags, ZeroMode};
use formats::qcow2::{Compression, encode_cluster};
use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};
use std::cell::Cell;
use std::fs::File;
use std::sync::Arc;

/// Bytes of one piece of work.
const PIECE: u64 = 1 << 20;
/// Bytes that are read and written at a time where nothing stands between: little enough to stay in the
/// processor's cache from the read to the write.
const BLOCK: u64 = 256 << 10;
/// Pieces under way at the same time on each thread.
const UNDER_WAY: usize = 2;
/// Pieces under way at the same time when clusters are compressed.
const ENCODING: usize = 8;
/// Zeroes in a row that become a hole unless the request says otherwise.
const SPARSE: u64 = 4096;

/// Copies the image.
pub(crate) async fn convert(
    spec: ConvertSpec,
    progress: Progress,
    threads: Arc<[IoThread]>,
) -> Result<ConvertReport, EngineError> {
    refuse_same_file(&spec).await?;
    if spec.compress && spec.format == Format::Raw {
        return Err(EngineError::Invalid("raw images do not hold compressed data; give -O qcow2".to_owned()));
    }
    let source = open_source(&spec.source).await?;
    let result = into_target(&spec, &source, progress, &threads).await;
    closing(&source, result).await
}

async fn refuse_same_file(spec: &ConvertSpec) -> Result<(), EngineError> {
    let (source, target) = (spec.source.file.clone(), spec.target.clone());
    let same = dataplane::offload(
        move || matches!((source.canonicalize(), target.canonicalize()), (Ok(source), Ok(target)) if source == target),
    )
    .await;
    match same {
        true => Err(EngineError::Invalid(format!("{} is both source and target", spec.target.display()))),
        false => Ok(()),
    }
}

async fn into_target(
    spec: &ConvertSpec,
    source: &Stack,
    progress: Progress,
    threads: &[IoThread],
) -> Result<ConvertReport, EngineError> {
    let size = source.disk().geometry().size;
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
    let target = Stack::open(&request).await?;
    let copy = Copy {
        spec,
        source,
        target: &target,
        progress,
        threads,
        turn: Cell::new(0),
        reads_zero,
        size,
        report: Cell::default(),
    };
    let result = copy.run().await;
    let report = closing(&target, result).await?;
    if spec.cache != CacheMode::Unsafe {
        sync(&target).await?;
    }
    Ok(report)
}

/// Makes all files of the top image durable.
async fn sync(stack: &Stack) -> Result<(), EngineError> {
    let files = super::info::files_of_top(stack);
    dataplane::offload(move || {
        for file in files {
            File::open(&file).and_then(|f| f.sync_all()).map_err(|e| EngineError::file(file, "make it durable", e))?;
        }
        Ok(())
    })
    .await
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
    threads: &'a [IoThread],
    /// Whose turn it is among the threads.
    turn: Cell<usize>,
    /// Whether what is not written in the target reads as zero.
    reads_zero: bool,
    size: u64,
    report: Cell<Counts>,
}

/// A piece of work: a range, and whether it is known to read as zero.
struct Piece {
    range: ByteRange,
    zero: bool,
    /// Where all its bytes stand as they are.
    source: Option<(StorageHandle, u64)>,
}

impl Copy<'_> {
    async fn run(&self) -> Result<ConvertReport, EngineError> {
        let there = self.target.disk().geometry().size;
        if there < self.size {
            return Err(EngineError::Invalid(format!(
                "{} has {there} bytes, the source has {}; resize it or let it be created",
                self.spec.target.display(),
                self.size
            )));
        }
        self.progress.set_total(self.size);
        match self.compression().await? {
            Some(compression) => self.copy_compressed(compression).await?,
            None => {
                self.pieces()
                    .map(|piece| async { self.copy_piece(piece?).await })
                    .buffer_unordered(UNDER_WAY * self.threads.len())
                    .try_for_each(|()| async { Ok(()) })
                    .await?;
            }
        }
        let rest = ByteRange::between(self.size, there);
        if !self.reads_zero {
            self.zero(rest).await?;
        }
        let Counts { copied, zero } = self.report.get();
        Ok(ConvertReport { filename: self.spec.target.display().to_string(), virtual_size: self.size, copied, zero })
    }

    async fn compression(&self) -> Result<Option<Compression>, EngineError> {
        if !self.spec.compress {
            return Ok(None);
        }
        super::info::compression_of(self.target).await.map(Some)
    }

    /// The unit that the target stores: pieces begin and end on it.
    fn unit(&self) -> u64 {
        let geometry = self.target.chain().top().geometry();
        let encoded = geometry.encoded_unit.filter(|_| self.spec.compress).unwrap_or(1);
        geometry.unit.max(encoded)
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
        if extent.zero && whole > at {
            return Ok(Piece { range: ByteRange::between(at, whole), zero: true, source: None });
        }
        // Data, up to the next multiple of the request's size; a short extent takes its neighbour along.
        let piece = PIECE.max(unit);
        let boundary = (at / piece + 1).saturating_mul(piece);
        let end = end.div_ceil(unit).saturating_mul(unit).min(boundary).min(self.size);
        let range = ByteRange::between(at, end);
        let source = match (extent.source, extent.depth) {
            (Some(source), Some(depth)) if extent.range.contains(range) && !extent.zero => {
                let layer = self.source.chain().layers().get(depth as usize);
                layer.map(|layer| (layer.handle.storage(source.storage).clone(), source.offset))
            }
            _ => None,
        };
        Ok(Piece { range, zero: false, source })
    }

    async fn copy_piece(&self, piece: Piece) -> Result<(), EngineError> {
        self.progress.check()?;
        let Piece { range, zero, source } = piece;
        if zero {
            if !self.reads_zero {
                self.zero(range).await?;
            }
            self.count(0, range.len());
            return Ok(());
        }
        let block = match self.spec.sparse_size {
            Some(0) => None,
            sparse => Some(sparse.unwrap_or(SPARSE).max(1).next_power_of_two().max(self.unit())),
        };
        let raw = self.spec.format == Format::Raw && self.spec.backing.is_none() && self.reads_zero;
        let runs = match source {
            Some(from) if raw => {
                let to = (self.target.chain().top().storage(StorageId::IMAGE).clone(), range.offset());
                let counts = self.elsewhere(move || copy_storage(from, to, range.len(), block)).await?;
                self.count(counts.copied, counts.zero);
                return Ok(());
            }
            Some((storage, offset)) => {
                let buf = Buf::new(range.len() as usize);
                self.elsewhere(move || async move {
                    let buf = storage.read(offset, buf).await?;
                    Ok(cut(range, buf, block))
                })
                .await?
            }
            None => {
                let buf = self.source.disk().read(range.offset(), Buf::new(range.len() as usize)).await?;
                cut(range, buf, block)
            }
        };
        for (range, bytes) in runs {
            match bytes {
                Some(bytes) => self.write(range, bytes).await?,
                None => {
                    if !self.reads_zero {
                        self.zero(range).await?;
                    }
                    self.count(0, range.len());
                }
            }
        }
        Ok(())
    }

    /// Does work on the next thread in turn.
    async fn elsewhere<T, F, Fut>(&self, work: F) -> Result<T, EngineError>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, EngineError>> + 'static,
        T: Send + 'static,
    {
        // From the last to the first, where everything else happens.
        let turn = self.turn.get();
        self.turn.set((turn + 1) % self.threads.len());
        let thread = &self.threads[self.threads.len() - 1 - turn];
        thread.spawn(work).await.map_err(|_| EngineError::ThreadGone)?
    }

    /// Writes, or leaves out what the target shows already through its backing file.
    async fn write(&self, range: ByteRange, bytes: Buf) -> Result<(), EngineError> {
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
        self.count(range.len(), 0);
        Ok(self.target.disk().write(range.offset(), bytes, WriteFlags::default()).await?)
    }

    async fn zero(&self, range: ByteRange) -> Result<(), EngineError> {
        let mode = ZeroMode { unmap: true, fast_only: false };
        Ok(self.target.disk().write_zeroes(range, mode, WriteFlags::default()).await?)
    }

    /// Counts bytes as done.
    fn count(&self, copied: u64, zero: u64) {
        let counts = self.report.get();
        self.report.set(Counts { copied: counts.copied + copied, zero: counts.zero + zero });
        self.progress.advance(copied + zero);
    }

    async fn copy_compressed(&self, compression: Compression) -> Result<(), EngineError> {
        let unit = self.target.chain().top().geometry().encoded_unit.ok_or_else(|| {
            EngineError::Unsupported(format!("{} cannot hold compressed data", self.spec.target.display()))
        })?;
        let there = self.target.disk().geometry().size;
        let encoded = self
            .pieces()
            .map(|piece| async move {
                let piece = piece?;
                self.progress.check()?;
                if piece.zero {
                    return Ok((piece, Vec::new()));
                }
                let range = piece.range;
                let buf = self.source.disk().read(range.offset(), Buf::new(range.len() as usize)).await?;
                let clusters = dataplane::offload(move || encode(range.offset(), buf, unit, there, compression)).await;
                Ok::<_, EngineError>((piece, clusters))
            })
            .buffered(ENCODING);
        let mut encoded = std::pin::pin!(encoded);
        while let Some(done) = encoded.next().await {
            let (piece, clusters) = done?;
            if piece.zero {
                if !self.reads_zero {
                    self.zero(piece.range).await?;
                }
                self.count(0, piece.range.len());
            }
            for Cluster { range, bytes } in clusters {
                match bytes {
                    Bytes::Zero if self.reads_zero => self.count(0, range.len()),
                    Bytes::Zero => {
                        self.zero(range).await?;
                        self.count(0, range.len());
                    }
                    Bytes::Plain(bytes) => self.write(range, bytes).await?,
                    Bytes::Encoded(bytes) => {
                        self.target.chain().top().write_encoded(range, &bytes).await?;
                        self.count(range.len(), 0);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Cuts a buffer that belongs to `range` where zeroes begin and end, if `block` says how finely.
fn cut(range: ByteRange, buf: Buf, block: Option<u64>) -> Vec<Run> {
    match block {
        None => vec![(range, Some(buf))],
        Some(block) => zeroes::split(range.offset(), buf, block),
    }
}

/// Copies `len` bytes from one place to another that reads as zero, and leaves zeroes out.
async fn copy_storage(
    from: (StorageHandle, u64),
    to: (StorageHandle, u64),
    len: u64,
    block: Option<u64>,
) -> Result<Counts, EngineError> {
    let mut counts = Counts::default();
    let mut done = 0;
    while done < len {
        let part = BLOCK.min(len - done);
        let buf = from.0.read(from.1 + done, Buf::new(part as usize)).await?;
        for (range, bytes) in cut(ByteRange::new(to.1 + done, part), buf, block) {
            match bytes {
                None => counts.zero += range.len(),
                Some(bytes) => {
                    to.0.write(range.offset(), bytes).await?;
                    counts.copied += range.len();
                }
            }
        }
        done += part;
    }
    Ok(counts)
}

struct Cluster {
    range: ByteRange,
    bytes: Bytes,
}

enum Bytes {
    Zero,
    /// Does not become smaller.
    Plain(Buf),
    Encoded(Vec<u8>),
}

/// Encodes all clusters of a buffer that belongs to `offset`. A last one that is short reaches up to `end`, the
/// target's: its size may be rounded up.
fn encode(offset: u64, mut buf: Buf, unit: u64, end: u64, compression: Compression) -> Vec<Cluster> {
    let mut clusters = Vec::with_capacity(buf.len().div_ceil(unit as usize));
    let mut at = offset;
    while !buf.is_empty() {
        let bytes = buf.split_to(buf.len().min(unit as usize));
        let mut range = ByteRange::new(at, bytes.len() as u64);
        at = range.end();
        let bytes = if zeroes::is_zero(&bytes) {
            Bytes::Zero
        } else {
            let short = bytes.len() < unit as usize;
            let encoded = if short {
                // The last cluster of a disk may be cut by its end; its stored form is whole.
                let mut whole = Buf::zeroed(unit as usize);
                whole[..bytes.len()].copy_from_slice(&bytes);
                encode_cluster(compression, &whole)
            } else {
                encode_cluster(compression, &bytes)
            };
            match encoded {
                Some(encoded) => {
                    range = ByteRange::between(range.offset(), (range.offset() + unit).min(end));
                    Bytes::Encoded(encoded)
                }
                None => Bytes::Plain(bytes),
            }
        };
        clusters.push(Cluster { range, bytes });
    }
    clusters
}
