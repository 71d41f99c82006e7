//! Which layers are merged, and which way.

use super::spec::Merged;
use super::{ConsolidateReport, ConsolidateSpec, Neighbour};
use crate::images::gate::{FileGate, FileId};
use crate::images::stack::Stack;
use crate::linkage;
use crate::promotion::{Enter, JobControl};
use crate::snapshots::place::Place;
use crate::snapshots::rearranging::Rearranging;
use crate::{EngineError, Format, JobHandle};
use chain::{Access, LayerInfo, OpenGate};
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// A consolidation that is to be done.
pub(crate) struct Consolidation {
    pub(crate) spec: ConsolidateSpec,
    pub(crate) job: JobHandle,
    /// Makes another image known as the disk's, where its name changes.
    pub(crate) enter: Enter,
}

/// What is to be done.
enum Choice {
    /// Two neighbours become one.
    Merge(Pair),
    /// The disk does not stand on it: a revert has left it, or its deletion was cut off at the end. Nothing is to be merged.
    Remove(PathBuf),
}

/// Two neighbours that become one.
pub(super) struct Pair {
    /// The place of the upper one, 0 for the top.
    pub(super) upper: usize,
    pub(super) into: Neighbour,
}

impl Consolidation {
    /// Does it. After an error, or when it is stopped, the disk shows what it showed before.
    ///
    /// # Errors
    /// When there is no such snapshot, other images stand on what would change, or a layer fails.
    pub(crate) async fn run(self, stack: Rc<Stack>) -> Result<ConsolidateReport, EngineError> {
        let Self { spec, job, enter } = self;
        if stack.snapshot.borrow().is_some() {
            return Err(EngineError::Rearranging { image: stack.image(), word: "is having a snapshot taken" });
        }
        let _alone = stack.rearrange(Rearranging::Consolidation)?;
        // Which layer goes is noted before anything is changed: the daemon may end after the last step, before the job's end
        // is noted, and then others have its place.
        let noted: Option<PathBuf> = job.position().and_then(|noted| serde_json::from_value(noted).ok());
        if let Some(noted) = noted
            && !stack.chain().layers().iter().skip(1).any(|layer| layer.path == noted)
        {
            if let Some(name) = &spec.snapshot
                && is_left(&stack, &noted, name).await
            {
                super::into_child::leave(&noted, &stack.image()).await;
            }
            let into = spec.into.unwrap_or(Neighbour::Parent);
            return Ok(Merged::ALREADY.report(spec, into, stack.image()));
        }
        let pair = match choose(&stack, &spec).await? {
            Choice::Merge(pair) => pair,
            Choice::Remove(file) => {
                remove_left(&file).await?;
                let into = spec.into.unwrap_or(Neighbour::Parent);
                return Ok(Merged { removed: Some(file), ..Merged::ALREADY }.report(spec, into, stack.image()));
            }
        };
        let lower = stack.chain().layers()[pair.upper + 1].path.clone();
        job.save_position(serde_json::json!(lower)).await?;
        let control = JobControl::new(job.progress().clone(), Rc::clone(stack.chain()));
        job.progress().set_total(stack.disk().geometry().size);
        let merged = match (pair.into, pair.upper) {
            (Neighbour::Parent, upper) => super::into_parent::merge(&stack, upper, &control, enter).await?,
            (Neighbour::Child, 0) => super::into_child::merge(&stack, &control).await?,
            (Neighbour::Child, upper) => super::into_frozen_child::merge(&stack, upper, &control).await?,
        };
        Ok(merged.report(spec, pair.into, stack.image()))
    }
}

/// The layer of that snapshot is merged with the one above it: what that one holds goes down, or what it holds itself comes up.
async fn choose(stack: &Rc<Stack>, spec: &ConsolidateSpec) -> Result<Choice, EngineError> {
    let layers = stack.chain().layers();
    let refused = |why: String| Err(EngineError::Unsupported(format!("{}: {why}", stack.image().display())));
    if stack.disk().geometry().read_only {
        return refused("is read-only, and so are its layers".to_owned());
    }
    if !stack.is_plain() {
        return refused(
            "was opened over a parent, data file or internal snapshot that the image does not name itself".to_owned(),
        );
    }
    let Some(name) = &spec.snapshot else {
        if layers.len() < 2 {
            return refused("has no parent to be committed into".to_owned());
        }
        let pair = Pair { upper: 0, into: Neighbour::Parent };
        return checked(&layers, pair).await.map(Choice::Merge);
    };
    let snapshots = stack.snapshots(&spec.disk).await?;
    let file = match crate::snapshots::named(snapshots, &spec.disk, name) {
        Ok(snapshot) => snapshot.file,
        Err(unknown) => {
            // The lowest layer stands on nothing that would tell of it.
            let usual = Place::of(&stack.image(), stack.format(), name).frozen;
            return if is_left(stack, &usual, name).await { Ok(Choice::Remove(usual)) } else { Err(unknown) };
        }
    };
    let is_it = |layer: &LayerInfo| layer.path.canonicalize().is_ok_and(|path| path == file);
    let Some(place) = layers.iter().position(is_it) else {
        return match is_left(stack, &file, name).await {
            true => Ok(Choice::Remove(file)),
            false => refused(format!("{} is one of its layers under another name", file.display())),
        };
    };
    let upper = place - 1;
    if let Some(into) = spec.into {
        return checked(&layers, Pair { upper, into }).await.map(Choice::Merge);
    }
    let (above, below) = (bytes_of(&layers[upper]).await, bytes_of(&layers[place]).await);
    let cheaper = if above <= below { Neighbour::Parent } else { Neighbour::Child };
    let other = if cheaper == Neighbour::Parent { Neighbour::Child } else { Neighbour::Parent };
    let pair = match checked(&layers, Pair { upper, into: cheaper }).await {
        Ok(pair) => Ok(pair),
        Err(first) => checked(&layers, Pair { upper, into: other }).await.map_err(|_| first),
    };
    pair.map(Choice::Merge)
}

/// Whether a file is known as the snapshot of that name, and is none of the disk's layers.
async fn is_left(stack: &Stack, file: &Path, name: &str) -> bool {
    let known = linkage::read(file).await.map(|read| read.or_nothing().snapshot);
    if !known.is_ok_and(|snapshot| snapshot.is_some_and(|snapshot| snapshot.name == name)) {
        return false;
    }
    let (files, file) = (stack.files(), file.to_owned());
    dataplane::offload(move || {
        let Ok(id) = fs::metadata(file).map(|facts| FileId::of(&facts)) else { return false };
        !files.iter().any(|open| open.file().metadata().is_ok_and(|facts| FileId::of(&facts) == id))
    })
    .await
}

/// Removes a snapshot that nothing stands on and nobody reads.
async fn remove_left(file: &Path) -> Result<(), EngineError> {
    let _lock = FileGate::cached().open_storage(file, Access::ReadWrite).await?;
    linkage::refuse_parent(file).await?;
    super::into_child::remove(file).await
}

/// Refuses what would change an image that others stand on.
async fn checked(layers: &[LayerInfo], pair: Pair) -> Result<Pair, EngineError> {
    let (upper, lower) = (&layers[pair.upper].path, &layers[pair.upper + 1].path);
    // Its own deletion comes first: it has another one's bytes.
    linkage::refuse_half_merged(upper).await?;
    if let Some(below) = layers.get(pair.upper + 2) {
        // What is noted there names the lower one.
        linkage::refuse_half_merged(&below.path).await?;
    }
    if pair.into == Neighbour::Parent {
        refuse_others(lower, upper).await?;
        if pair.upper > 0 && is_block_device(lower).await {
            return Err(EngineError::Unsupported(format!(
                "{}: is a block device, which cannot have the name of {}; merge that one into its child, or commit the disk",
                lower.display(),
                upper.display()
            )));
        }
        let (format, below) = (layers[pair.upper].format, layers[pair.upper + 1].format);
        if pair.upper > 0 && format != below {
            return Err(EngineError::Unsupported(format!(
                "{}: is {}, and its parent {}, which cannot have its name; merge that one into it",
                upper.display(),
                Format::from(format),
                Format::from(below)
            )));
        }
    }
    Ok(pair)
}

async fn is_block_device(file: &Path) -> bool {
    let file = file.to_owned();
    dataplane::offload(move || fs::metadata(file).is_ok_and(|facts| facts.file_type().is_block_device())).await
}

/// Refuses when other images than `child` stand on `parent`.
pub(super) async fn refuse_others(parent: &Path, child: &Path) -> Result<(), EngineError> {
    let others: Vec<PathBuf> = other_children(parent, child).await?;
    match others.split_first() {
        None => Ok(()),
        Some((first, rest)) => {
            Err(EngineError::HasChildren { image: parent.to_owned(), child: first.clone(), others: rest.len() })
        }
    }
}

/// The images that stand on `parent` beside `child`.
pub(super) async fn other_children(parent: &Path, child: &Path) -> Result<Vec<PathBuf>, EngineError> {
    let children = linkage::children(parent).await?;
    let child = child.to_owned();
    Ok(dataplane::offload(move || {
        let id = |path: &Path| fs::metadata(path).ok().map(|facts| FileId::of(&facts));
        let child = id(&child);
        children.into_iter().filter(|other| id(other) != child).collect()
    })
    .await)
}

async fn bytes_of(layer: &LayerInfo) -> u64 {
    let path = layer.path.clone();
    dataplane::offload(move || fs::metadata(path).map_or(u64::MAX, |facts| crate::snapshots::allocated(&facts))).await
}
