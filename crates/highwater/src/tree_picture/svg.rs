//! The picture as SVG.

use super::layout::{Block, Layout, Metrics};
use super::{Forest, Health};
use std::fmt::Write;

/// Of a monospaced font of 13 pixels. Where the font is another one, `textLength` keeps lines within their box.
const METRICS: Metrics = Metrics { character: 8, line: 18, padding: 10, gap: 28 };
/// From the top of a line to where its letters stand.
const BASELINE: u32 = 13;

/// The drawing, the same for the same layers.
pub(crate) fn draw(forest: &Forest) -> String {
    let layout = Layout::of(forest, METRICS);
    let mut text = String::new();
    let (width, height) = (layout.width, layout.height);
    let _ = writeln!(
        text,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<style>
.page {{ fill: #ffffff }}
.layer {{ fill: #f4f5f7; stroke: #6b7280; stroke-width: 1.5 }}
.snapshot {{ fill: #e6f2fa }}
.asked {{ fill: #fff6e0; stroke: #1f2937; stroke-width: 2.5 }}
.warning {{ stroke: #b45309; stroke-width: 2.5 }}
.fault {{ stroke: #c62828; stroke-width: 2.5 }}
.link {{ fill: none; stroke: #6b7280; stroke-width: 1.5 }}
.broken {{ stroke: #c62828; stroke-dasharray: 6 4 }}
text {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 13px; fill: #1f2937; white-space: pre }}
text.name {{ font-weight: bold }}
text.warning {{ fill: #b45309; stroke: none }}
text.fault {{ fill: #c62828; stroke: none }}
</style>
<rect class="page" width="{width}" height="{height}"/>"##
    );
    for edge in &layout.edges {
        let (child, parent) = (&layout.blocks[edge.child], &layout.blocks[edge.parent]);
        let (x1, y1) = (child.x + child.width / 2, child.y + child.height);
        let (x2, y2) = (parent.x + parent.width / 2, parent.y);
        // Straight down, across in the gap above the parent's row, and down.
        let turn = y2.saturating_sub(METRICS.gap / 2).max(y1);
        let broken = if edge.faulty { " broken" } else { "" };
        let _ = writeln!(text, r#"<path class="link{broken}" d="M{x1} {y1}V{turn}H{x2}V{y2}"/>"#);
    }
    for block in &layout.blocks {
        draw_block(&mut text, block);
    }
    text.push_str("</svg>\n");
    text
}

fn draw_block(text: &mut String, block: &Block) {
    let Block { x, y, width, height, .. } = block;
    let mut class = String::from("layer");
    for (word, is) in [
        ("snapshot", block.snapshot),
        ("asked", block.asked),
        ("warning", block.health == Health::Warning),
        ("fault", block.health == Health::Fault),
    ] {
        if is {
            let _ = write!(class, " {word}");
        }
    }
    let _ = writeln!(text, r#"<g><rect class="{class}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>"#);
    for (n, line) in block.lines.iter().enumerate() {
        let class = match (n, line.health) {
            (0, _) => r#" class="name""#,
            (_, Health::Sound) => "",
            (_, Health::Warning) => r#" class="warning""#,
            (_, Health::Fault) => r#" class="fault""#,
        };
        let (x, y) = (x + METRICS.padding, y + METRICS.padding + n as u32 * METRICS.line + BASELINE);
        let length = line.text.chars().count() as u32 * METRICS.character;
        let shown = escaped(&line.text);
        let _ = writeln!(
            text,
            r#"<text{class} x="{x}" y="{y}" textLength="{length}" lengthAdjust="spacingAndGlyphs">{shown}</text>"#
        );
    }
    text.push_str("</g>\n");
}

/// Text between tags. What XML cannot hold has been taken out before.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace(['\u{fffe}', '\u{ffff}'], "\u{fffd}")
}
