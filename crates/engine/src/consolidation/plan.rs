//! Which layers are merged, and which way.

use super::spec::Merged;
use super::{ConsolidateReport, ConsolidateSpec, Neighbour};
use crate::images::gate::FileId;
use crate::images::stack::Stack;
use crate::linkage;
use crate::promotion::{Enter, JobControl};
use crate::snapshots::rearranging::Rearranging;
use crate::{EngineError, Format, JobHandle};
use chain::LayerInfo;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// A consolidation that is to be done.
pub(crate) struct Consolidation {
    pub(crate) spec: ConsolidateSpec,
    pub(crate) job: JobHandle,
    /// Makes another image known as the disk's, where its name changes.
    pub(crate) enter: Enter,
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
            let into = spec.into.unwrap_or(Neighbour::Parent);
            return Ok(Merged::ALREADY.report(spec, into, stack.image()));
        }
        let pair = choose(&stack, &spec).await?;
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
async fn choose(stack: &Rc<Stack>, spec: &ConsolidateSpec) -> Result<Pair, EngineError> {
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
        return checked(&layers, pair).await;
    };
    let snapshots = stack.snapshots(&spec.disk).await?;
    let snapshot = crate::snapshots::named(snapshots, &spec.disk, name)?;
    let is_it = |layer: &LayerInfo| layer.path.canonicalize().is_ok_and(|path| path == snapshot.file);
    let Some(place) = layers.iter().position(is_it) else {
        return refused(format!(
            "its content does not stand on snapshot {name:?}, which a revert has left; go back to it, or remove {} by hand",
            snapshot.file.display()
        ));
    };
    let upper = place - 1;
    if let Some(into) = spec.into {
        return checked(&layers, Pair { upper, into }).await;
    }
    let (above, below) = (bytes_of(&layers[upper]).await, bytes_of(&layers[place]).await);
    let cheaper = if above <= below { Neighbour::Parent } else { Neighbour::Child };
    let other = if cheaper == Neighbour::Parent { Neighbour::Child } else { Neighbour::Parent };
    match checked(&layers, Pair { upper, into: cheaper }).await {
        Ok(pair) => Ok(pair),
        Err(first) => checked(&layers, Pair { upper, into: other }).await.map_err(|_| first),
    }
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
