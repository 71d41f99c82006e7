//! A disk of a restore point into an image, every byte proven on the way.
//!
//! A new target is filled under another name, `TARGET.restoring-…`, made durable, and then gets its own, which nothing may have by then. So
//! whatever has the target's name is whole; a crash leaves a file of the other name. In place, leaves that the target holds already
//! are left alone; a restore that breaks off there leaves a target of both, which another restore completes.

use super::find::Opened;
use super::proof::is_equal;
use super::{PointSpec, RepositorySpec, RestoreReport, RestoreSpec, RestoredParent};
use crate::history::host::random_id;
use crate::images::request::{BackingSpec, CreateSpec};
use crate::images::stack::{HistoryUse, OpenRequest, Stack};
use crate::images::{Progress, Workshop, closing, create, offload_format};
use crate::{CacheMode, EngineError, durable_file, linkage};
use disk::{Buf, ByteRange, WriteFlags, ZeroMode};
use futures_util::future::ready;
use futures_util::stream::{self, StreamExt};
use repository::{DiskReader, Extent, PointDisk, RepositoryError};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::cell::Cell;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};
use storage::FileStorage;

/// Bytes of the disk whose extents are asked for at a time.
const WINDOW: u64 = 256 << 20;
/// Bytes that are read and written at a time, and how many such pieces are under way.
const PIECE: u64 = 1 << 20;
const UNDER_WAY: usize = 4;

/// What is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Zero(Range<u64>),
    Data(Range<u64>),
}

impl Workshop {
    /// Makes an image of a disk of a restore point.
    ///
    /// # Errors
    /// When there is no such point, it is damaged, or the target cannot be written. A target that was made is gone then.
    pub async fn restore(&self, spec: RestoreSpec, progress: Progress) -> Result<RestoreReport, EngineError> {
        spec.validate()?;
        self.run(move || async move { restore(spec, progress).await }).await
    }
}

pub(crate) async fn restore(spec: RestoreSpec, progress: Progress) -> Result<RestoreReport, EngineError> {
    let (source, over) = (spec.source(), spec.over.clone());
    let (opened, since) = dataplane::offload_remote(move || {
        let opened = Opened::find(&source)?;
        let since = match over {
            Some(RestoredParent { since: point, .. }) => {
                let disk = Some(opened.disk.name.clone());
                Some(Opened::find(&PointSpec { point, machine: None, disk, ..source })?.disk)
            }
            None => None,
        };
        Ok::<_, EngineError>((opened, since))
    })
    .await?;
    let (written, same) = match spec.in_place {
        true => fill_file(&spec, &spec.target, &opened, None, &progress).await?,
        false => into_new(&spec, &opened, since.as_ref(), &progress).await?,
    };
    Ok(RestoreReport {
        point: opened.point.id.to_string(),
        machine: opened.point.machine,
        disk: opened.disk.name,
        target: spec.target,
        format: spec.format,
        size: opened.disk.size,
        written,
        same,
    })
}

/// Makes the target.
async fn into_new(
    spec: &RestoreSpec,
    opened: &Opened,
    since: Option<&PointDisk>,
    progress: &Progress,
) -> Result<(u64, u64), EngineError> {
    let taken = || EngineError::Taken {
        file: spec.target.clone(),
        what: "a restore makes a new file, but there is one already; choose another name, or give --in-place",
    };
    let there = spec.target.clone();
    if dataplane::offload(move || fs::symlink_metadata(there).is_ok()).await {
        return Err(taken());
    }
    let mut name = spec.target.file_name().unwrap_or_default().to_owned();
    name.push(format!(".restoring-{}", &random_id().to_string()[..8]));
    let fresh = spec.target.with_file_name(name);
    let backing = spec.over.as_ref().map(|over| BackingSpec { file: over.backing.clone(), format: over.format });
    let create = CreateSpec {
        file: fresh.clone(),
        format: spec.format,
        size: Some(opened.disk.size),
        options: spec.options.clone(),
        backing,
        unsafe_backing: false,
    };
    create::create_watched(&create, progress).await?;
    let done = async {
        let filled = fill_file(spec, &fresh, opened, since, progress).await?;
        let (from, to) = (fresh.clone(), spec.target.clone());
        dataplane::offload(move || {
            renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE)?;
            durable_file::sync_directory_of(&to)
        })
        .await
        .map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => taken(),
            _ => EngineError::file(&spec.target, "give the restored image its name", e),
        })?;
        if let Some(over) = &spec.over {
            let parent = spec.target.parent().unwrap_or(Path::new("/")).join(&over.backing);
            linkage::forget_child(&parent, &fresh).await?;
            linkage::register_child(&parent, &spec.target).await?;
        }
        Ok(filled)
    };
    let done = done.await;
    if done.is_err() {
        // Its name is nobody else's.
        let gone = fresh.clone();
        match dataplane::offload(move || fs::remove_file(gone)).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(target = %fresh.display(), %error, "an incomplete restore could not be removed");
            }
            _ => {}
        }
    }
    done
}

async fn fill_file(
    spec: &RestoreSpec,
    file: &Path,
    opened: &Opened,
    since: Option<&PointDisk>,
    progress: &Progress,
) -> Result<(u64, u64), EngineError> {
    let format = offload_format(file.to_owned(), Some(spec.format)).await?;
    let request = OpenRequest {
        writable: true,
        cache: CacheMode::Writeback,
        history: if spec.in_place { HistoryUse::IfThere(None) } else { HistoryUse::None },
        ..OpenRequest::reading(file.to_owned(), format)
    };
    let stack = Stack::open(&request).await?;
    let filled = async {
        if let (Some(since), Some(over)) = (since, &spec.over) {
            refuse_other_parent(spec, opened, since, &over.backing, &stack, progress).await?;
        }
        fill(spec, opened, since, &stack, progress).await
    };
    let filled = filled.await;
    closing(&stack, filled).await
}

/// Refuses a parent that does not hold the point that the differences are from: what it shows through the new image, which holds nothing
/// yet, is read and compared with the point's hashes.
async fn refuse_other_parent(
    spec: &RestoreSpec,
    opened: &Opened,
    since: &PointDisk,
    backing: &str,
    stack: &Stack,
    progress: &Progress,
) -> Result<(), EngineError> {
    let reader = Arc::new(opened.repository.disk(since, 0));
    let end = since.size.min(stack.disk().geometry().size);
    let mut at = 0;
    while at < end {
        progress.pace(0).await?;
        let bytes = stack.disk().read(at, Buf::new((end - at).min(PIECE) as usize)).await?;
        let (repository, reader, from) = (opened.repository.clone(), Arc::clone(&reader), at);
        at += bytes.len() as u64;
        let equal = dataplane::offload_remote(move || is_equal(&repository, &reader, from, &bytes)).await;
        if !equal.map_err(|e| spec.repository.failed(e))? {
            return Err(EngineError::Invalid(format!(
                "{backing}: does not hold what the disk held at that point (it differs within {from:#x} to {at:#x}); give the image that \
                 was exported of it, and that nobody has written to"
            )));
        }
    }
    Ok(())
}

/// Fills the target; returns how many bytes were written, and how many were there.
async fn fill(
    spec: &RestoreSpec,
    opened: &Opened,
    since: Option<&PointDisk>,
    stack: &Stack,
    progress: &Progress,
) -> Result<(u64, u64), EngineError> {
    let size = opened.disk.size;
    let has = stack.disk().geometry().size;
    if has < size {
        return Err(EngineError::Invalid(format!(
            "{}: has {has} bytes, and disk {} of the point has {size}; resize it first",
            spec.target.display(),
            opened.disk.name
        )));
    }
    let reader = Arc::new(opened.repository.disk(&opened.disk, 0));
    progress.set_total(size);
    let _writing_behind = stack.files().first().map(FileStorage::write_behind);
    let (mut written, mut same) = (0, 0);
    let mut at = 0;
    // Differences are few, and found in one go.
    let window = if since.is_some() { size } else { WINDOW };
    while at < size {
        let window = at..(at + window).min(size);
        let pieces = pieces(&spec.repository, opened, since, &reader, window.clone()).await?;
        // What was begun is finished, also after a failure: a write that is dropped may still be on its way at the close.
        let failed = Cell::new(false);
        let done: Vec<Result<(u64, u64), EngineError>> = stream::iter(pieces)
            .take_while(|_| ready(!failed.get()))
            .map(|piece| write(spec, opened, &reader, stack, piece, progress))
            .buffer_unordered(UNDER_WAY)
            .inspect(|done| failed.set(failed.get() || done.is_err()))
            .collect()
            .await;
        for done in done {
            let (new, old) = done?;
            (written, same) = (written + new, same + old);
        }
        let (now, _) = progress.now();
        progress.advance(window.end.saturating_sub(now));
        at = window.end;
    }
    if spec.in_place && has > size {
        // What the disk had beyond the point's end is not the point's.
        let rest = ByteRange::between(size, has);
        stack.disk().write_zeroes(rest, ZeroMode { unmap: true, fast_only: false }, WriteFlags::default()).await?;
    }
    stack.disk().flush().await?;
    Ok((written, same))
}

/// What is to be written in a part of the disk.
async fn pieces(
    spec: &RepositorySpec,
    opened: &Opened,
    since: Option<&PointDisk>,
    reader: &Arc<DiskReader>,
    window: Range<u64>,
) -> Result<Vec<Piece>, EngineError> {
    let failed = |e: RepositoryError| spec.failed(e);
    let (reader, repository, disk, since) =
        (Arc::clone(reader), opened.repository.clone(), opened.disk.clone(), since.cloned());
    let found = dataplane::offload_remote(move || {
        let mut pieces = Vec::new();
        if let Some(since) = since {
            for difference in repository.differences(&since, &disk) {
                let (range, zero) = difference?;
                let range = range.start.max(window.start)..range.end.min(window.end).min(disk.size);
                push(&mut pieces, range, zero);
            }
            return Ok(pieces);
        }
        for extent in reader.extents(window) {
            match extent {
                Extent::Zero(range) => push(&mut pieces, range, true),
                Extent::Data(range, _) => push(&mut pieces, range, false),
                Extent::Lost(_, error) => return Err(error),
            }
        }
        Ok(pieces)
    });
    found.await.map_err(failed)
}

/// Adds a range to the last piece, if it goes on there.
fn push(pieces: &mut Vec<Piece>, range: Range<u64>, zero: bool) {
    if range.is_empty() {
        return;
    }
    match (pieces.last_mut(), zero) {
        (Some(Piece::Zero(last)), true) if last.end == range.start => last.end = range.end,
        (Some(Piece::Data(last)), false) if last.end == range.start && range.end - last.start <= PIECE => {
            last.end = range.end;
        }
        _ => pieces.push(if zero { Piece::Zero(range) } else { Piece::Data(range) }),
    }
}

/// Writes one piece: bytes written, and bytes that were there.
async fn write(
    spec: &RestoreSpec,
    opened: &Opened,
    reader: &Arc<DiskReader>,
    stack: &Stack,
    piece: Piece,
    progress: &Progress,
) -> Result<(u64, u64), EngineError> {
    let disk = stack.disk();
    match piece {
        Piece::Zero(range) => {
            progress.pace(0).await?;
            let range = ByteRange::between(range.start, range.end);
            // A new image without a parent shows zeroes by itself.
            if spec.in_place || spec.over.is_some() {
                disk.write_zeroes(range, ZeroMode { unmap: true, fast_only: false }, WriteFlags::default()).await?;
            }
            Ok((0, 0))
        }
        Piece::Data(range) => {
            let len = range.end - range.start;
            progress.pace(len).await?;
            if spec.in_place {
                return write_differing(spec, opened, reader, stack, range).await;
            }
            let reader = Arc::clone(reader);
            let at = range.start;
            let read = dataplane::offload_remote(move || {
                let mut bytes = Buf::new(len as usize);
                reader.read(at, &mut bytes).map(|()| bytes)
            });
            let bytes = read.await.map_err(|e| spec.repository.failed(e))?;
            disk.write(at, bytes, WriteFlags::default()).await?;
            Ok((len, 0))
        }
    }
}

/// Writes the leaves that the target does not hold already, as their hashes tell.
async fn write_differing(
    spec: &RestoreSpec,
    opened: &Opened,
    reader: &Arc<DiskReader>,
    stack: &Stack,
    range: Range<u64>,
) -> Result<(u64, u64), EngineError> {
    let len = range.end - range.start;
    let there = stack.disk().read(range.start, Buf::new(len as usize)).await?;
    let (repository, reader) = (opened.repository.clone(), Arc::clone(reader));
    let differing = dataplane::offload_remote(move || {
        let mut differing = Vec::new();
        for extent in reader.extents(range.clone()) {
            let (leaf_range, id) = match extent {
                Extent::Data(leaf_range, id) => (leaf_range, id),
                Extent::Zero(_) => continue,
                Extent::Lost(_, error) => return Err(error),
            };
            let (from, to) = ((leaf_range.start - range.start) as usize, (leaf_range.end - range.start) as usize);
            if repository.leaf_id(&there[from..to]) != id {
                let mut bytes = Buf::new(to - from);
                reader.read(leaf_range.start, &mut bytes)?;
                differing.push((leaf_range.start, bytes));
            }
        }
        Ok(differing)
    });
    let mut written = 0;
    for (at, bytes) in differing.await.map_err(|e| spec.repository.failed(e))? {
        written += bytes.len() as u64;
        stack.disk().write(at, bytes, WriteFlags::default()).await?;
    }
    Ok((written, len - written))
}

/// Reads a disk of a point in order, for whoever writes it somewhere else. Blocks.
///
/// # Errors
/// When there is no such point, it is damaged, or `write` fails.
pub fn read_in_order(
    source: &PointSpec,
    mut write: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> Result<u64, EngineError> {
    let opened = Opened::find(source)?;
    let reader = opened.repository.disk(&opened.disk, 0);
    let mut bytes = vec![0; PIECE as usize];
    let mut at = 0;
    while at < reader.size() {
        let len = (reader.size() - at).min(PIECE) as usize;
        reader.read(at, &mut bytes[..len]).map_err(|e| source.repository.failed(e))?;
        write(&bytes[..len]).map_err(|e| EngineError::file(Path::new("-"), "write to standard output", e))?;
        at += len as u64;
    }
    Ok(at)
}
