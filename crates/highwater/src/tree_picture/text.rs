//! The picture on a terminal.
//!
//! What an image depends on stands above it. The line goes straight down from the base to the disk that was asked for;
//! others branch off to the right.

use super::{Forest, Health};
use std::ffi::OsString;
use std::fmt::Write;

/// How it may be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Style {
    /// Whether nothing but ASCII is understood.
    pub(crate) ascii: bool,
    /// Whether colours are.
    pub(crate) colour: bool,
}

/// Whether the terminal does not understand UTF-8, by the variables of the environment that say so.
pub(crate) fn ascii_wanted(variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let set = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(|name| variable(name).filter(|v| !v.is_empty()));
    let charset = set.unwrap_or_default().to_string_lossy().to_ascii_lowercase().replace('-', "");
    !charset.contains("utf8")
}

struct Signs {
    sound: char,
    asked: char,
    fault: char,
    down: &'static str,
    branch: &'static str,
    nothing: &'static str,
}

const UNICODE: Signs =
    Signs { sound: '○', asked: '●', fault: '✗', down: "│ ", branch: "├─", nothing: "  " };
const ASCII: Signs = Signs { sound: 'o', asked: '*', fault: 'x', down: "| ", branch: "+-", nothing: "  " };

/// ANSI sequences: bold, yellow, red, and back.
const BOLD: &str = "\x1b[1m";
const YELLOW: &str = "\x1b[33m";
const RED: &str = "\x1b[31m";
const BACK: &str = "\x1b[0m";

/// Draws all trees. Ends with a line feed, unless there is nothing to draw.
pub(crate) fn draw(forest: &Forest, style: Style) -> String {
    let (directory, names) = forest.names();
    let signs = if style.ascii { &ASCII } else { &UNICODE };
    let mut pen = Pen { forest, style, signs, names, text: String::new() };
    if directory.components().next().is_some() && !forest.layers.is_empty() {
        let directory = crate::output::plain(&directory.display().to_string());
        pen.line("", &format!("in {directory}"), None);
        pen.line("", "", None);
    }
    for (n, root) in forest.roots().into_iter().enumerate() {
        if n > 0 {
            pen.line("", "", None);
        }
        pen.tree(root);
    }
    pen.text
}

struct Pen<'a> {
    forest: &'a Forest,
    style: Style,
    signs: &'a Signs,
    names: Vec<String>,
    text: String,
}

impl Pen<'_> {
    fn line(&mut self, before: &str, text: &str, colour: Option<&str>) {
        let colour = colour.filter(|_| self.style.colour && !text.is_empty());
        let line = match colour {
            Some(colour) => format!("{before}{colour}{text}{BACK}"),
            None => format!("{before}{text}"),
        };
        let line = line.trim_end();
        if self.style.ascii {
            let shown = line.chars().map(|c| match c {
                '…' => "...".to_owned(),
                c if c.is_ascii() => c.to_string(),
                _ => "?".to_owned(),
            });
            self.text.extend(shown);
            self.text.push('\n');
        } else {
            let _ = writeln!(self.text, "{line}");
        }
    }

    /// Without recursion: chains may be long, and branches of branches, too.
    fn tree(&mut self, root: usize) {
        // A layer; what stands before its first line and before its others; and the line above it.
        let mut next = vec![(root, String::new(), String::new(), String::new())];
        while let Some((at, first, rest, above)) = next.pop() {
            if at != root {
                self.line(&above, "", None);
            }
            let children = self.forest.children(at);
            let goes_on = format!("{rest}{}", self.signs.down);
            let below = if children.is_empty() { format!("{rest}{}", self.signs.nothing) } else { goes_on.clone() };
            self.layer(at, &first, &below);
            let Some((straight, branches)) = children.split_last() else { continue };
            next.push((*straight, rest.clone(), rest.clone(), goes_on.clone()));
            for branch in branches.iter().rev() {
                next.push((*branch, format!("{rest}{}", self.signs.branch), goes_on.clone(), goes_on.clone()));
            }
        }
    }

    fn layer(&mut self, at: usize, first: &str, rest: &str) {
        let layer = &self.forest.layers[at];
        let (sign, colour) = match (layer.health(), layer.asked) {
            (Health::Fault, _) => (self.signs.fault, Some(RED)),
            (_, true) => (self.signs.asked, Some(BOLD)),
            (_, false) => (self.signs.sound, None),
        };
        let lines = self.forest.lines(at);
        let name = format!("{sign} {}", self.names[at]);
        let (facts, others) = lines.split_first().map_or((String::new(), &[][..]), |(f, o)| (f.text.clone(), o));
        self.line(first, &format!("{name}  {facts}"), colour);
        for line in others {
            let colour = match line.health {
                Health::Sound => None,
                Health::Warning => Some(YELLOW),
                Health::Fault => Some(RED),
            };
            let sign = if line.health == Health::Sound { "  " } else { "! " };
            self.line(rest, &format!("{sign}{}", line.text), colour);
        }
    }
}
