//! Pictures of which images depend on which: for the terminal, as SVG and as PNG.
//!
//! The model is plain data and knows nothing of where its facts come from. An image that several disks stand on
//! is in it once, so chains that share images become one tree.

mod font;
mod layout;
pub(crate) mod png_file;
pub(crate) mod svg;
pub(crate) mod text;

use crate::output::plain;
use crate::size::human;
use engine::utc_text;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Marks whose names are told; of more, how many.
const NAMED_MARKS: usize = 4;
/// Digits of a content id that tell it from others for people.
const SHORT_ID: usize = 8;

/// One image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Layer {
    /// Its file; two layers are the same when their files are.
    pub(crate) file: PathBuf,
    /// Its format's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) format: Option<String>,
    /// Bytes of the disk that it shows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) virtual_size: Option<u64>,
    /// Bytes that its file occupies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) actual_size: Option<u64>,
    /// Whether it was asked for: it is the top of a chain.
    pub(crate) asked: bool,
    /// The daemon's disks that it is the top of.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) disks: Vec<String>,
    /// What names its content, in hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content_id: Option<String>,
    /// How it stands to its parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) link: Option<Link>,
    /// The snapshot that it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) snapshot: Option<Snapshot>,
    /// Names of instants that its history has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) marks: Option<Marks>,
    /// What is wrong with it, or might be.
    pub(crate) findings: Vec<Finding>,
}

/// Whether a parent is what its child was made over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Link {
    /// It is.
    Sound,
    /// The child does not remember what it was made over.
    Unbound,
    /// It is not; a finding says why.
    Fault,
}

impl Link {
    const fn word(self) -> &'static str {
        match self {
            Self::Sound => "sound",
            Self::Unbound => "not bound to its parent",
            Self::Fault => "faulty",
        }
    }
}

/// The name of a frozen layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Snapshot {
    pub(crate) name: String,
    /// When, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) time: Option<u64>,
    /// What the instant is worth: `crash`, `frozen` or `offline`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) consistency: Option<String>,
}

/// The marks of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Marks {
    pub(crate) count: usize,
    /// How many of them are not trusted.
    pub(crate) refused: usize,
    /// Absent when they were not asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) names: Vec<String>,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Health {
    /// Nothing is known to be wrong.
    #[default]
    Sound,
    /// Something is to be known.
    Warning,
    /// The disks above cannot be trusted, or not be opened.
    Fault,
}

/// Something that is wrong with an image, or might be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Finding {
    pub(crate) health: Health,
    pub(crate) text: String,
}

impl Finding {
    pub(crate) fn warning(text: impl Into<String>) -> Self {
        Self { health: Health::Warning, text: text.into() }
    }

    pub(crate) fn fault(text: impl Into<String>) -> Self {
        Self { health: Health::Fault, text: text.into() }
    }
}

impl Layer {
    /// The worst that is known of it.
    pub(crate) fn health(&self) -> Health {
        let link = if self.link == Some(Link::Fault) { Health::Fault } else { Health::Sound };
        self.findings.iter().map(|finding| finding.health).max().unwrap_or_default().max(link)
    }
}

/// Images and what they depend on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Forest {
    layers: Vec<Layer>,
    /// Of each layer.
    parents: Vec<Option<usize>>,
}

impl Forest {
    /// Adds a chain, top first. What is there already is not added again: what it lacks is filled in.
    pub(crate) fn add_chain(&mut self, chain: Vec<Layer>) {
        let mut child: Option<usize> = None;
        for layer in chain {
            let at = self.add(layer);
            if let Some(child) = child
                && self.parents[child].is_none()
                && !self.depends(at, child)
            {
                self.parents[child] = Some(at);
            }
            child = Some(at);
        }
    }

    /// Adds an image that is known to depend on another one that is there.
    pub(crate) fn add_child(&mut self, parent: &Path, child: Layer) {
        let Some(parent) = self.find(parent) else { return };
        let at = self.add(child);
        if self.parents[at].is_none() && !self.depends(parent, at) {
            self.parents[at] = Some(parent);
        }
    }

    /// How many images there are.
    pub(crate) fn count(&self) -> usize {
        self.layers.len()
    }

    fn find(&self, file: &Path) -> Option<usize> {
        self.layers.iter().position(|layer| layer.file == file)
    }

    /// Whether a layer depends on another, or is that one.
    fn depends(&self, layer: usize, on: usize) -> bool {
        std::iter::successors(Some(layer), |at| self.parents[*at]).any(|at| at == on)
    }

    fn add(&mut self, layer: Layer) -> usize {
        let Some(at) = self.find(&layer.file) else {
            self.layers.push(layer);
            self.parents.push(None);
            return self.layers.len() - 1;
        };
        let known = &mut self.layers[at];
        known.asked |= layer.asked;
        known.disks.extend(layer.disks);
        known.format = known.format.take().or(layer.format);
        known.virtual_size = known.virtual_size.or(layer.virtual_size);
        known.actual_size = known.actual_size.or(layer.actual_size);
        known.content_id = known.content_id.take().or(layer.content_id);
        known.link = known.link.or(layer.link);
        known.snapshot = known.snapshot.take().or(layer.snapshot);
        known.marks = known.marks.take().or(layer.marks);
        for finding in layer.findings {
            if !known.findings.contains(&finding) {
                known.findings.push(finding);
            }
        }
        at
    }

    /// The images that depend on nothing, in the order in which they came.
    fn roots(&self) -> Vec<usize> {
        (0..self.layers.len()).filter(|at| self.parents[*at].is_none()).collect()
    }

    /// The images that depend on one directly: those that were not asked for and lead to none that was come first, so that
    /// what was asked for ends a drawing.
    fn children(&self, parent: usize) -> Vec<usize> {
        let mut children: Vec<usize> = (0..self.layers.len()).filter(|at| self.parents[*at] == Some(parent)).collect();
        children.sort_by_key(|at| self.leads_to_asked(*at));
        children
    }

    fn leads_to_asked(&self, at: usize) -> bool {
        (0..self.layers.len()).any(|top| self.layers[top].asked && self.depends(top, at))
    }

    /// The directory that all files are in, and each file as seen from there.
    fn names(&self) -> (PathBuf, Vec<String>) {
        let mut common: Option<PathBuf> = None;
        for layer in &self.layers {
            let directory = layer.file.parent().unwrap_or(Path::new(""));
            common = Some(match common {
                None => directory.to_owned(),
                Some(common) => {
                    let both = common.components().zip(directory.components()).take_while(|(a, b)| a == b);
                    both.map(|(part, _)| part).collect()
                }
            });
        }
        let common = common.unwrap_or_default();
        let name = |layer: &Layer| {
            let name = layer.file.strip_prefix(&common).unwrap_or(&layer.file);
            plain(&name.display().to_string())
        };
        let names = self.layers.iter().map(name).collect();
        (common, names)
    }

    /// What is told of a layer beside its name: line by line, the first one being there always.
    fn lines(&self, at: usize) -> Vec<Line> {
        let layer = &self.layers[at];
        let mut lines = Vec::new();
        let mut say = |text: String, health| lines.push(Line { text: plain(&text), health });
        let mut facts = vec![layer.format.clone().unwrap_or_else(|| "unknown format".to_owned())];
        facts.extend(layer.virtual_size.map(human));
        facts.extend(layer.actual_size.map(|bytes| format!("{} in the file", human(bytes))));
        say(facts.join(", "), Health::Sound);
        if !layer.disks.is_empty() {
            let names: Vec<String> = layer.disks.iter().map(|name| format!("{name:?}")).collect();
            say(format!("disk {}", names.join(", ")), Health::Sound);
        }
        if let Some(Snapshot { name, time, consistency }) = &layer.snapshot {
            let time = time.map(|time| format!(", {}", utc_text(time))).unwrap_or_default();
            let worth = consistency.as_ref().map(|worth| format!(", {worth}-consistent")).unwrap_or_default();
            say(format!("snapshot {name:?}{time}{worth}"), Health::Sound);
        }
        let id =
            layer.content_id.as_ref().map(|id| format!("content {}", id.chars().take(SHORT_ID).collect::<String>()));
        let link = layer.link.map(|link| format!("link {}", link.word()));
        let both: Vec<String> = id.into_iter().chain(link).collect();
        if !both.is_empty() {
            say(both.join(", "), if layer.link == Some(Link::Fault) { Health::Fault } else { Health::Sound });
        }
        if let Some(marks) = layer.marks.as_ref().filter(|marks| marks.count > 0) {
            say(marks_text(marks), if marks.refused > 0 { Health::Warning } else { Health::Sound });
        }
        let needed = self.parents.iter().filter(|parent| **parent == Some(at)).count();
        if needed > 1 {
            say(format!("{needed} images depend on it"), Health::Sound);
        }
        for finding in &layer.findings {
            say(finding.text.clone(), finding.health);
        }
        lines
    }

    /// All layers as they are drawn, with what depends on what, for programs.
    pub(crate) fn report(&self) -> impl Serialize + use<'_> {
        #[derive(Serialize)]
        #[serde(rename_all = "kebab-case")]
        struct Reported<'a> {
            #[serde(flatten)]
            layer: &'a Layer,
            #[serde(skip_serializing_if = "Option::is_none")]
            parent: Option<&'a Path>,
            children: Vec<&'a Path>,
            health: Health,
        }
        #[derive(Serialize)]
        struct Report<'a> {
            layers: Vec<Reported<'a>>,
        }
        let file = |at: usize| &*self.layers[at].file;
        let mut layers = Vec::new();
        let mut next: Vec<usize> = self.roots();
        next.reverse();
        while let Some(at) = next.pop() {
            let children = self.children(at);
            layers.push(Reported {
                layer: &self.layers[at],
                parent: self.parents[at].map(file),
                children: children.iter().map(|child| file(*child)).collect(),
                health: self.layers[at].health(),
            });
            next.extend(children.into_iter().rev());
        }
        Report { layers }
    }
}

/// A line about a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    text: String,
    health: Health,
}

fn marks_text(marks: &Marks) -> String {
    let Marks { count, refused, names } = marks;
    let mut text = format!("{count} {}", if *count == 1 { "mark" } else { "marks" });
    if !names.is_empty() {
        let named: Vec<String> = names.iter().rev().take(NAMED_MARKS).map(|name| format!("{name:?}")).collect();
        text.push_str(&format!(": {}", named.join(", ")));
        if names.len() > NAMED_MARKS {
            text.push_str(", …");
        }
    }
    if *refused > 0 {
        text.push_str(&format!(" ({refused} refused)"));
    }
    text
}

#[cfg(test)]
mod tests;
