//! Where everything stands in a drawing, whatever it is drawn with.
//!
//! The base is at the bottom, and what depends on it above, as layers lie on each other: all layers of one depth in a
//! row, and each over its parent.

use super::{Forest, Health, Line};

/// Most characters of a line; longer ones are cut.
const WIDEST: usize = 48;
/// A box is not narrower than this many characters.
const NARROWEST: usize = 16;

/// Pixels of what the layout is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Metrics {
    /// Width of a character.
    pub(super) character: u32,
    /// From line to line.
    pub(super) line: u32,
    /// Between a box and its text.
    pub(super) padding: u32,
    /// Between boxes, and between them and the edge.
    pub(super) gap: u32,
}

/// A layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) asked: bool,
    pub(super) snapshot: bool,
    pub(super) health: Health,
    /// The first one is the name.
    pub(super) lines: Vec<Line>,
}

/// From a child's lower edge to its parent's upper one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Edge {
    pub(super) child: usize,
    pub(super) parent: usize,
    /// The link is not sound.
    pub(super) faulty: bool,
}

/// A drawing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) blocks: Vec<Block>,
    pub(super) edges: Vec<Edge>,
}

impl Layout {
    pub(super) fn of(forest: &Forest, metrics: Metrics) -> Self {
        let (_, names) = forest.names();
        let Metrics { character, line, padding, gap } = metrics;
        let mut blocks: Vec<Block> =
            names.into_iter().enumerate().map(|(at, name)| block(forest, at, name, metrics)).collect();
        let widest = blocks.iter().flat_map(|block| &block.lines).map(|line| line.text.chars().count()).max();
        let width = widest.unwrap_or(0).max(NARROWEST) as u32 * character + 2 * padding;
        let (depths, columns) = places(forest);
        let rows = depths.iter().max().map_or(0, |deepest| deepest + 1);
        let mut heights = vec![0; rows];
        for (block, depth) in blocks.iter_mut().zip(&depths) {
            block.height = block.lines.len() as u32 * line + 2 * padding;
            heights[*depth] = block.height.max(heights[*depth]);
        }
        // From the lower edge up; turned over when the height is known.
        let mut bottoms = Vec::new();
        let mut at = gap;
        for height in heights {
            bottoms.push(at);
            at += height + gap;
        }
        let height = at.max(2 * gap);
        let mut right = gap;
        for ((block, depth), column) in blocks.iter_mut().zip(depths).zip(columns) {
            block.width = width;
            block.x = gap + column * (width + gap) / 2;
            block.y = height - bottoms[depth] - block.height;
            right = right.max(block.x + width);
        }
        let faulty = |child: usize| forest.layers[child].link == Some(super::Link::Fault);
        let edges = forest.parents.iter().enumerate();
        let edges = edges.filter_map(|(child, parent)| Some(Edge { child, parent: (*parent)?, faulty: faulty(child) }));
        Self { width: right + gap, height, edges: edges.collect(), blocks }
    }
}

fn block(forest: &Forest, at: usize, name: String, _: Metrics) -> Block {
    let layer = &forest.layers[at];
    let mut lines = vec![Line { text: cut_middle(&name), health: Health::Sound }];
    lines.extend(forest.lines(at).into_iter().flat_map(wrapped));
    Block {
        x: 0,
        y: 0,
        width: 0,
        height: 0,
        asked: layer.asked,
        snapshot: layer.snapshot.is_some(),
        health: layer.health(),
        lines,
    }
}

/// Of each layer how many are below it, and its column in halves of a block: leaves stand side by side, and what they
/// depend on in their middle.
fn places(forest: &Forest) -> (Vec<usize>, Vec<u32>) {
    let count = forest.layers.len();
    let (mut depths, mut columns) = (vec![0; count], vec![0; count]);
    let mut leaves = 0;
    // Each layer is met twice: before what depends on it, and behind that.
    let mut next: Vec<(usize, bool)> = forest.roots().into_iter().rev().map(|root| (root, false)).collect();
    while let Some((at, behind)) = next.pop() {
        let children = forest.children(at);
        match (children.first(), children.last()) {
            (Some(first), Some(last)) if behind => columns[at] = (columns[*first] + columns[*last]) / 2,
            (Some(_), Some(_)) => {
                next.push((at, true));
                for child in children.iter().rev() {
                    depths[*child] = depths[at] + 1;
                    next.push((*child, false));
                }
            }
            _ => {
                columns[at] = 2 * leaves;
                leaves += 1;
            }
        }
    }
    (depths, columns)
}

/// The beginning and the end of a name are what tells it from others.
fn cut_middle(name: &str) -> String {
    let all: Vec<char> = name.chars().collect();
    if all.len() <= WIDEST {
        return name.to_owned();
    }
    let end = WIDEST / 2;
    let begin = WIDEST - end - 1;
    all[..begin].iter().chain(&['…']).chain(&all[all.len() - end..]).collect()
}

/// A line in as many as it takes, broken at spaces where there are some.
fn wrapped(line: Line) -> Vec<Line> {
    let mut lines: Vec<String> = vec![String::new()];
    for word in line.text.split(' ') {
        let mut word: Vec<char> = word.chars().collect();
        let last = lines.last_mut().expect("there is one always");
        let room = WIDEST - last.chars().count();
        if !last.is_empty() && word.len() < room {
            last.push(' ');
            last.extend(&word);
            continue;
        }
        if !last.is_empty() {
            lines.push(String::new());
        }
        while word.len() > WIDEST {
            let rest = word.split_off(WIDEST);
            lines.last_mut().expect("there is one always").extend(&word);
            lines.push(String::new());
            word = rest;
        }
        lines.last_mut().expect("there is one always").extend(&word);
    }
    lines.into_iter().map(|text| Line { text, health: line.health }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_and_broken() {
        let name = format!("{}{}", "a".repeat(40), "z".repeat(40));
        let cut = cut_middle(&name);
        assert_eq!(cut.chars().count(), WIDEST);
        assert!(cut.starts_with("aaa") && cut.contains("a…z") && cut.ends_with("zzz"), "{cut}");
        let line = |text: &str| Line { text: text.to_owned(), health: Health::Fault };
        assert_eq!(wrapped(line("short")), [line("short")]);
        let text = format!("{} {} bb cc", "a".repeat(30), "b".repeat(100));
        let parts = wrapped(line(&text));
        assert!(parts.iter().all(|part| part.text.chars().count() <= WIDEST && part.health == Health::Fault));
        let lengths: Vec<usize> = parts.iter().map(|part| part.text.len()).collect();
        assert_eq!(lengths, [30, 48, 48, 10]);
    }
}
