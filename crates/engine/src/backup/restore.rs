//! A disk of a restore point into an image, every byte proven on the way.
//!
//! A new target is made, filled and synced; one that fails is taken away again. In place, leaves that the target holds already are
//! left alone; a restore that breaks off there leaves a target of both, which another restore completes.

use super::{RepositorySpec, RestoreReport, RestoreSpec};
use crate::images::request::{BackingSpec, CreateSpec};
use crate::images::stack::{HistoryUse, OpenRequest, Stack};
use crate::images::{Progress, Workshop, closing, create, offload_format};
use crate::{CacheMode, EngineError};
use disk::{Buf, ByteRange, WriteFlags, ZeroMode};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use repository::{DiskReader, Extent, Point, PointDisk, Repository, RepositoryError};
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Bytes of the disk whose extents are asked for at a time.
const WINDOW: u64 = 256 << 20;
/// Bytes that are read and written at a time, and how many such pieces are under way.
const PIECE: u64 = 1 << 20;
const UNDER_WAY: usize = 4;

/// A disk of a point, and the repository that it is in.
pub(super) struct Opened {
    pub(super) repository: Repository,
    pub(super) point: Point,
    pub(super) disk: PointDisk,
}

impl Opened {
    /// Finds it. Blocks.
    pub(super) fn find(spec: &RepositorySpec, point: &str, disk: Option<&str>) -> Result<Self, EngineError> {
        let repository = spec.open()?;
        let point = repository.find_point(point).map_err(|e| spec.failed(e))?;
        let names = || point.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
        let found = match (disk, &point.disks[..]) {
            (None, [one]) => one,
            (None, _) => {
                return Err(EngineError::Invalid(format!(
                    "point {} has several disks; say which one with --disk: {}",
                    point.id,
                    names()
                )));
            }
            (Some(name), _) => point.disk(name).ok_or_else(|| {
                EngineError::Invalid(format!("point {} has no disk {name}; it has {}", point.id, names()))
            })?,
        };
        let disk = found.clone();
        Ok(Self { repository, point, disk })
    }
}

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
    let wanted = spec.clone();
    let (opened, since) = dataplane::offload(move || {
        let opened = Opened::find(&wanted.repository, &wanted.point, wanted.disk.as_deref())?;
        let since = match &wanted.over {
            Some(over) => Some(Opened::find(&wanted.repository, &over.since, Some(&opened.disk.name))?.disk),
            None => None,
        };
        Ok::<_, EngineError>((opened, since))
    })
    .await?;
    if !spec.in_place {
        make(&spec, opened.disk.size, &progress).await?;
    }
    let done = async {
        let stack = open_target(&spec).await?;
        let filled = fill(&spec, &opened, since.as_ref(), &stack, &progress).await;
        closing(&stack, filled).await
    };
    let done = done.await;
    if done.is_err() && !spec.in_place {
        let target = spec.target.clone();
        if let Err(error) = dataplane::offload(move || fs::remove_file(target)).await {
            tracing::warn!(target = %spec.target.display(), %error, "an incomplete restore could not be removed");
        }
    }
    let (written, same) = done?;
    Ok(RestoreReport {
        point: opened.point.id.to_string(),
        disk: opened.disk.name,
        target: spec.target,
        format: spec.format,
        size: opened.disk.size,
        written,
        same,
    })
}

async fn make(spec: &RestoreSpec, size: u64, progress: &Progress) -> Result<(), EngineError> {
    let there = spec.target.clone();
    if dataplane::offload(move || fs::symlink_metadata(there).is_ok()).await {
        return Err(EngineError::Taken {
            file: spec.target.clone(),
            what: "a restore makes a new file, but there is one already; choose another name, or give --in-place",
        });
    }
    let backing = spec.over.as_ref().map(|over| BackingSpec { file: over.backing.clone(), format: over.format });
    let create = CreateSpec {
        file: spec.target.clone(),
        format: spec.format,
        size: Some(size),
        options: spec.options.clone(),
        backing,
        unsafe_backing: false,
    };
    create::create_watched(&create, progress).await.map(drop)
}

async fn open_target(spec: &RestoreSpec) -> Result<Stack, EngineError> {
    let format = match spec.in_place {
        true => offload_format(spec.target.clone(), Some(spec.format)).await?,
        false => spec.format,
    };
    let request = OpenRequest {
        writable: true,
        cache: CacheMode::Writeback,
        history: if spec.in_place { HistoryUse::IfThere(None) } else { HistoryUse::None },
        ..OpenRequest::reading(spec.target.clone(), format)
    };
    Stack::open(&request).await
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
    let file = stack.files().first().cloned();
    file.iter().for_each(|file| file.set_write_behind(true));
    let (mut written, mut same) = (0, 0);
    let mut at = 0;
    // Differences are few, and found in one go.
    let window = if since.is_some() { size } else { WINDOW };
    while at < size {
        let window = at..(at + window).min(size);
        let pieces = pieces(&spec.repository, opened, since, &reader, window.clone()).await?;
        let done: Vec<(u64, u64)> = stream::iter(pieces)
            .map(|piece| write(spec, opened, &reader, stack, piece, progress))
            .buffer_unordered(UNDER_WAY)
            .try_collect()
            .await?;
        done.iter().for_each(|(new, old)| (written, same) = (written + new, same + old));
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
    file.iter().for_each(|file| file.set_write_behind(false));
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
    let found = dataplane::offload(move || {
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
            let read = dataplane::offload(move || {
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
    let differing = dataplane::offload(move || {
        let leaf = repository.settings().leaf_bytes as usize;
        let mut differing = Vec::new();
        for extent in reader.extents(range.clone()) {
            let (leaf_range, id) = match extent {
                Extent::Data(leaf_range, id) => (leaf_range, id),
                Extent::Zero(_) => continue,
                Extent::Lost(_, error) => return Err(error),
            };
            let (from, to) = ((leaf_range.start - range.start) as usize, (leaf_range.end - range.start) as usize);
            // The disk's last leaf is named with zeroes up to its end.
            let mut held = there[from..to].to_vec();
            held.resize(leaf, 0);
            if repository.leaf_id(&held) != id {
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
    spec: &RepositorySpec,
    point: &str,
    disk: Option<&str>,
    mut write: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> Result<u64, EngineError> {
    let opened = Opened::find(spec, point, disk)?;
    let reader = opened.repository.disk(&opened.disk, 0);
    let mut bytes = vec![0; PIECE as usize];
    let mut at = 0;
    while at < reader.size() {
        let len = (reader.size() - at).min(PIECE) as usize;
        reader.read(at, &mut bytes[..len]).map_err(|e| spec.failed(e))?;
        write(&bytes[..len]).map_err(|e| EngineError::file(Path::new("-"), "write to standard output", e))?;
        at += len as u64;
    }
    Ok(at)
}
