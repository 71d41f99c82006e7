//! The work of one promotion, on the disk's home thread.
//!
//! 1. The target is made, and opened as a disk of its own.
//! 2. A mark of the disk's history is taken, where one is kept: what changes from here on will be known.
//! 3. The mirror is attached, and the pass copies. Now and then the target is flushed, and how far it came is made durable as the
//!    job's position.
//! 4. The guest's changes are held; the target is flushed, the history names it, and the catalogue (the one step) names it as
//!    the disk's image. The guest goes on in the target.
//!
//! Crash before step 4: the disk is what it was; the target is a file that a resumed job goes on with, as far as its position
//! says, but for what the history calls changed since the mark. A target without a history is begun anew. After step 4:
//! the target is the disk, and held all.

use super::offline::is_same;
use super::pace::{TRIES, microseconds};
use super::{JobControl, PromoteReport, PromoteSpec};
use crate::history::host::random_id;
use crate::images::create;
use crate::images::gate::FileId;
use crate::images::request::{CheckSpec, CreateSpec, RepairMode};
use crate::images::stack::{HistoryUse, OpenRequest, Stack};
use crate::images::{Progress, check};
use crate::linkage::{self, LinkageUse};
use crate::snapshots::exchange::{Exchange, Exchanged};
use crate::snapshots::rearranging::Rearranging;
use crate::{CacheMode, EngineError, ErrorClass, Format, ImageSpec, JobHandle, chain_text};
use chain::{CopyPass, CopyStats, LayerInfo, Mirror};
use disk::ByteRange;
use futures_util::future::{Either, join, select};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::time::{Duration, Instant};
use std::{fs, io};
use tracking::NewPoint;

/// Between two positions that are made durable. Each costs a flush of the target.
const BETWEEN_POSITIONS: Duration = Duration::from_secs(3);

/// Makes the target known as the disk's image, durably; given the image, its format, and the history's file. Blocks.
pub(crate) type Enter = Box<dyn FnOnce(&Path, Format, Option<PathBuf>) -> Result<(), EngineError> + Send>;

/// A promotion that is to be done.
pub(crate) struct Promotion {
    pub(crate) spec: PromoteSpec,
    pub(crate) cache: CacheMode,
    pub(crate) job: JobHandle,
    pub(crate) enter: Enter,
}

/// What a resumed job knows.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Position {
    /// Bytes from the start that were equal and durable.
    copied: u64,
    /// The mark that was taken before the first was copied.
    mark: String,
    /// Which file the target is; absent before there was one.
    target: Option<FileId>,
    /// Whether it is an image already.
    made: bool,
}

impl Promotion {
    /// Does it. After an error, or when it is stopped, the disk is as it was.
    ///
    /// # Errors
    /// When the target cannot be made, or fails; [`EngineError::Cancelled`].
    pub(crate) async fn run(self, stack: Rc<Stack>) -> Result<PromoteReport, EngineError> {
        let Self { spec, cache, job, enter } = self;
        let _alone = stack.rearrange(Rearranging::Promotion)?;
        if job.is_begun_again() && is_same(&stack.image(), &spec.target) {
            // The daemon ended after the last step, before the job's end was noted.
            forget_mark(&stack, &mark_of(&job)).await;
            let (disk, file, format) = (spec.disk, spec.target, spec.format);
            return Ok(PromoteReport { disk, file, format, copied: 0, mirrored: 0, resumed: 0, pause_us: 0 });
        }
        let mark = mark_of(&job);
        let position = job.position().and_then(|found| serde_json::from_value::<Position>(found).ok());
        let target = match &position {
            Some(position) if position.made => match open_again(&spec, position, cache).await {
                Ok(target) => target,
                Err(error) => {
                    forget_mark(&stack, &mark).await;
                    return Err(error);
                }
            },
            Some(position) => {
                remove_begun(&spec.target, position).await;
                make(&stack, &spec, cache, &mark, &job).await?
            }
            None => make(&stack, &spec, cache, &mark, &job).await?,
        };
        let begun = match position.filter(|position| position.made) {
            Some(position) => attach_again(&stack, &target, &spec, &position).await,
            None => attach(&stack, &target, &mark, &job).await.map(|mirror| (mirror, 0)),
        };
        let (mirror, resumed) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                leave_target(&stack, &target, &spec, &mark, &job).await;
                return Err(error);
            }
        };
        let writing_behind = target.files()[0].write_behind();
        let done = async {
            job.progress().set_total(stack.disk().geometry().size);
            let mut copied = 0;
            let mut enter = Some(enter);
            for _ in 0..TRIES {
                copied += copy(&stack, &mirror, &target, &mark, &job).await?.written;
                if let Some(pause) = switch(&stack, &mirror, &target, &spec, &mut enter).await? {
                    return Ok((copied, pause));
                }
            }
            Err(EngineError::Invalid(format!(
                "{}: the guest discards faster than can be copied; try again when it is at rest",
                spec.disk
            )))
        };
        let done = done.await;
        drop(writing_behind);
        match done {
            Ok((copied, pause)) => {
                forget_mark(&stack, &mark).await;
                Ok(PromoteReport {
                    disk: spec.disk,
                    file: spec.target,
                    format: spec.format,
                    copied,
                    mirrored: mirror.mirrored(),
                    resumed,
                    pause_us: microseconds(pause),
                })
            }
            Err(error) => {
                give_up(&stack, &mirror, &target, &spec, &mark, &job).await;
                Err(error)
            }
        }
    }
}

fn mark_of(job: &JobHandle) -> String {
    format!("job {}: promote", job.id())
}

/// Attaches the mirror of a job that begins.
async fn attach(stack: &Stack, target: &Stack, mark: &str, job: &JobHandle) -> Result<Rc<Mirror>, EngineError> {
    take_mark(stack, mark).await?;
    save(target, mark, 0, job).await?;
    let mirror = Mirror::new(target.disk().clone(), []);
    stack.chain().attach_mirror(&mirror).await?;
    Ok(mirror)
}

/// Attaches the mirror of a job that goes on; and how many bytes are equal already.
///
/// Nothing changes between the question what is equal and the attaching: a write that the guest made there would be on the
/// disk alone.
async fn attach_again(
    stack: &Stack,
    target: &Stack,
    spec: &PromoteSpec,
    position: &Position,
) -> Result<(Rc<Mirror>, u64), EngineError> {
    let _held = stack.hold_changes("the job does not go on").await?;
    let equal = still_equal(stack, spec, position).await;
    let resumed = equal.iter().map(|range| range.len()).sum();
    let mirror = Mirror::new(target.disk().clone(), equal);
    stack.chain().attach_mirror(&mirror).await?;
    Ok((mirror, resumed))
}

/// The ranges that are equal on both sides though a job was interrupted: what it had copied, durably, and what has not
/// changed since it began.
async fn still_equal(stack: &Stack, spec: &PromoteSpec, position: &Position) -> Vec<ByteRange> {
    let changes = match stack.changes(&spec.disk, &position.mark, None, 0, usize::MAX).await {
        Ok(changes) => changes,
        // Without a history nothing is known: all is copied again.
        Err(error) => {
            tracing::info!(disk = spec.disk, error = chain_text(&error), "the copy begins at the start");
            return Vec::new();
        }
    };
    let mut equal = Vec::new();
    let mut at = 0;
    for range in changes.ranges {
        equal.push(ByteRange::between(at, range.start.min(position.copied)));
        at = (range.start + range.length).min(position.copied).max(at);
    }
    equal.push(ByteRange::between(at, position.copied));
    equal.retain(|range| !range.is_empty());
    equal
}

/// Makes the target where nothing stands.
///
/// Crash: that nothing stands there is noted before, so what is there afterwards is the job's.
async fn make(
    stack: &Stack,
    spec: &PromoteSpec,
    cache: CacheMode,
    mark: &str,
    job: &JobHandle,
) -> Result<Stack, EngineError> {
    // Whatever a crash leaves of this is known to be the job's: an empty file, and then the one that is noted.
    note(Position { copied: 0, mark: mark.to_owned(), target: None, made: false }, job).await?;
    let new = spec.target.clone();
    let new = dataplane::offload(move || fs::File::create_new(new).and_then(|file| file.metadata())).await;
    let facts = new.map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => EngineError::Taken {
            file: spec.target.clone(),
            what: "the disk's new image is a new file, but there is one already; remove it or choose another name",
        },
        _ => EngineError::file(&spec.target, "create", e),
    })?;
    let made = async {
        note(Position { copied: 0, mark: mark.to_owned(), target: Some(FileId::of(&facts)), made: false }, job).await?;
        fill(stack, spec, job).await?;
        open(spec, cache).await
    };
    let made = made.await;
    if made.is_err() {
        remove_target(&spec.target).await;
    }
    made
}

/// Has the new file be an image that shows nothing.
async fn fill(stack: &Stack, spec: &PromoteSpec, job: &JobHandle) -> Result<(), EngineError> {
    let create = CreateSpec {
        file: spec.target.clone(),
        format: spec.format,
        size: Some(stack.disk().geometry().size),
        options: spec.options.clone(),
        backing: None,
        unsafe_backing: false,
    };
    create::create_watched(&create, job.progress()).await.map(drop)
}

/// Removes what a job that was interrupted had begun to make: the file that it had noted, or an empty one.
async fn remove_begun(target: &Path, position: &Position) {
    let (file, noted) = (target.to_owned(), position.target);
    let is_ours = dataplane::offload(move || {
        fs::symlink_metadata(file).is_ok_and(|facts| match noted {
            Some(noted) => FileId::of(&facts) == noted,
            None => facts.is_file() && facts.len() == 0,
        })
    });
    if is_ours.await {
        remove_target(target).await;
    }
}

/// Opens the target of a job that was interrupted.
async fn open_again(spec: &PromoteSpec, position: &Position, cache: CacheMode) -> Result<Stack, EngineError> {
    let target = spec.target.clone();
    let found = dataplane::offload(move || fs::metadata(target).ok().map(|facts| FileId::of(&facts))).await;
    if found != position.target {
        return Err(EngineError::Invalid(format!(
            "{}: is not the file that this job has made; remove it or choose another target, and begin the job anew",
            spec.target.display()
        )));
    }
    if spec.format == Format::Qcow2 {
        // Space that a killed process had set aside is given back.
        let mend = CheckSpec {
            file: spec.target.clone(),
            format: Some(spec.format),
            repair: Some(RepairMode::Leaks),
            history_file: None,
            force_share: false,
        };
        check::check(mend, &Progress::new()).await?;
    }
    open(spec, cache).await
}

async fn open(spec: &PromoteSpec, cache: CacheMode) -> Result<Stack, EngineError> {
    let request = OpenRequest {
        image: ImageSpec::of(spec.target.clone(), Some(spec.format)),
        format: spec.format,
        writable: true,
        force_share: false,
        cache,
        history: HistoryUse::None,
        linkage: LinkageUse::Enforced,
    };
    Stack::open(&request).await
}

async fn remove_target(target: &Path) {
    let file = target.to_owned();
    let removed = dataplane::offload(move || fs::remove_file(file)).await;
    if let Err(error) = removed
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(target = %target.display(), %error, "an incomplete copy could not be removed");
    }
}

async fn take_mark(stack: &Stack, mark: &str) -> Result<(), EngineError> {
    let Ok(kept) = stack.kept() else { return Ok(()) };
    // Of a job of that number in another life.
    forget_mark(stack, mark).await;
    let new = NewPoint { name: mark.to_owned(), set: random_id() };
    let taken = kept.disk.mark(new).await;
    taken.map(drop).map_err(|source| EngineError::History { file: kept.file.clone(), source })
}

async fn forget_mark(stack: &Stack, mark: &str) {
    if let Err(error) = stack.delete_mark(mark).await
        && error.class() != ErrorClass::NotFound
        && stack.kept().is_ok()
    {
        tracing::warn!(mark, error = chain_text(&error), "a mark of an ended job is left");
    }
}

/// Runs the pass, and makes positions durable beside it.
async fn copy(
    stack: &Stack,
    mirror: &Rc<Mirror>,
    target: &Stack,
    mark: &str,
    job: &JobHandle,
) -> Result<CopyStats, EngineError> {
    let control = JobControl::new(job.progress().clone(), Rc::clone(stack.chain()));
    let (ended, end) = futures_channel::oneshot::channel::<()>();
    let pass = async {
        let copied = stack.chain().copy_to_mirror(mirror, CopyPass::default(), &control).await;
        drop(ended);
        copied
    };
    let saving = async {
        let mut end = end;
        loop {
            let next = pin!(dataplane::sleep(BETWEEN_POSITIONS));
            match select(&mut end, next).await {
                Either::Left(_) => return,
                Either::Right(_) => {}
            }
            // A failure of the target ends the pass, which tells of it.
            let Ok(copied) = mirror.flush().await else { continue };
            if let Err(error) = save(target, mark, copied, job).await {
                tracing::warn!(job = job.id(), error = chain_text(&error), "how far the job is cannot be noted");
            }
        }
    };
    let (copied, ()) = join(pass, saving).await;
    copied
}

async fn save(target: &Stack, mark: &str, copied: u64, job: &JobHandle) -> Result<(), EngineError> {
    let Some(file) = target.files().first().cloned() else { return Ok(()) };
    let facts = dataplane::offload(move || file.file().metadata()).await;
    let facts = facts.map_err(|e| EngineError::file(target.image(), "look at it", e))?;
    note(Position { copied, mark: mark.to_owned(), target: Some(FileId::of(&facts)), made: true }, job).await
}

async fn note(position: Position, job: &JobHandle) -> Result<(), EngineError> {
    let position = serde_json::to_value(position).map_err(|e| EngineError::Invalid(e.to_string()))?;
    job.save_position(position).await
}

/// Makes the target the disk; says for how long the guest's changes waited. `None`: something is to be copied again before.
async fn switch(
    stack: &Rc<Stack>,
    mirror: &Rc<Mirror>,
    target: &Stack,
    spec: &PromoteSpec,
    enter: &mut Option<Enter>,
) -> Result<Option<Duration>, EngineError> {
    let old: Rc<[LayerInfo]> = stack.chain().layers();
    let old_image = stack.image();
    let new_layers = target.chain().layers();
    // What is not durable yet is made so while the guest goes on: on the target, and in the old image, which is closed.
    stack.disk().flush().await?;
    mirror.flush().await?;
    let marked = stack.mark_new_top(&new_layers[0].handle).await?;
    let began = Instant::now();
    let held = stack.hold_changes("the disk stays where it is").await?;
    if mirror.position() < stack.disk().geometry().size {
        return Ok(None);
    }
    let Some(enter) = enter.take() else { return Ok(None) };
    let history = stack.kept().ok().map(|kept| kept.file.clone());
    let (file, format) = (spec.target.clone(), spec.format);
    stack
        .exchange(Exchanged::Mirror(mirror), async |layers| {
            // Whoever opens the old image finds it whole.
            layers[0].handle.close().await?;
            let last = Box::pin(dataplane::offload(move || enter(&file, format, history)));
            Ok(Exchange { layers: new_layers.to_vec(), files: target.files(), marked, last })
        })
        .await?;
    stack.set_top(spec.target.clone(), spec.format);
    drop(held);
    let pause = began.elapsed();
    for layer in old.iter() {
        if let Err(error) = layer.handle.close().await {
            tracing::warn!(path = %layer.path.display(), %error, "closing an image that is not used any more");
        }
    }
    drop(old);
    leave_old_image(&old_image, spec).await;
    Ok(Some(pause))
}

/// The disk has moved: its old image says so, or is removed.
async fn leave_old_image(old: &Path, spec: &PromoteSpec) {
    let left = match spec.remove_source {
        false => linkage::set_moved_to(old, Some(spec.target.clone())).await,
        true => match linkage::refuse_parent(old).await {
            Ok(()) => {
                let file = old.to_owned();
                dataplane::offload(move || fs::remove_file(&file).map_err(|e| EngineError::file(file, "remove", e)))
                    .await
            }
            refused => refused,
        },
    };
    if let Err(error) = left {
        tracing::warn!(image = %old.display(), error = chain_text(&error), "the disk's old image is left as it is");
    }
}

/// The disk goes on without the target.
async fn give_up(stack: &Stack, mirror: &Rc<Mirror>, target: &Stack, spec: &PromoteSpec, mark: &str, job: &JobHandle) {
    if job.will_be_begun_again()
        && let Ok(copied) = mirror.flush().await
        // While it is attached, what was flushed stays equal.
        && let Err(error) = save(target, mark, copied, job).await
    {
        tracing::warn!(job = job.id(), error = chain_text(&error), "how far the job is cannot be noted");
    }
    stack.chain().detach_mirror(mirror).await;
    leave_target(stack, target, spec, mark, job).await;
}

/// What can be used by a job that is begun again is kept; all else is removed.
async fn leave_target(stack: &Stack, target: &Stack, spec: &PromoteSpec, mark: &str, job: &JobHandle) {
    if let Err(error) = target.close().await {
        tracing::debug!(error = chain_text(&error), "closing the target of a job that was given up");
    }
    if !job.will_be_begun_again() {
        forget_mark(stack, mark).await;
        remove_target(&spec.target).await;
    }
}
