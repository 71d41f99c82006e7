//! The picture on a terminal.

use super::cells::{Cell, divide};
use super::{Change, ChangeKind};
use crate::size::human;
use rustix::termios::{Winsize, tcgetwinsize};
use std::ffi::OsStr;
use std::fmt::Write;

/// Columns that a row's offset takes, with the space behind it.
const LABEL: usize = 10;
/// Lines below the grid.
const LEGEND: usize = 3;
/// Most cells in a row; a longer row is hard to follow with the eye.
const MAX_COLUMNS: usize = 256;
/// A cell has at least this many bytes.
const SMALLEST_CELL: u64 = 4096;

/// From nothing changed to all of it.
const SHADES: [char; 5] = ['·', '░', '▒', '▓', '█'];
/// ANSI colours of the kinds, in the order of [`ChangeKind::ALL`]: yellow, cyan, green.
const COLOURS: [u8; 3] = [33, 36, 32];

/// The room for a chart, and how it may be painted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chart {
    /// Columns of the terminal.
    pub(crate) width: usize,
    /// Lines that the chart may take, its legend included.
    pub(crate) height: usize,
    /// Whether kinds have colours (see [`colour_wanted`]).
    pub(crate) colour: bool,
}

/// Columns and lines of the terminal that is standard output; 80 and 24 when it is none.
pub(crate) fn terminal_size() -> (usize, usize) {
    match tcgetwinsize(std::io::stdout()) {
        Ok(Winsize { ws_col, ws_row, .. }) if ws_col > 0 && ws_row > 0 => (ws_col.into(), ws_row.into()),
        _ => (80, 24),
    }
}

/// Whether output may be coloured: on a terminal, unless the user has set `NO_COLOR` to anything.
pub(crate) fn colour_wanted(is_terminal: bool, no_color: Option<&OsStr>) -> bool {
    is_terminal && no_color.is_none_or(OsStr::is_empty)
}

/// Draws a disk of `size` bytes. Cells follow each other in rows, and each row begins with its offset; the numbers of
/// cells in a row and of bytes in a cell are powers of two, so that offsets are round. The last lines say what cells
/// mean and how much was changed. Ends with a line feed.
pub(crate) fn chart(size: u64, changes: &[Change], chart: Chart) -> String {
    let Grid { columns, cell } = Grid::fitting(size, chart);
    let count = usize::try_from(size.div_ceil(cell)).unwrap_or(usize::MAX);
    let cells = divide(size, cell, count, changes);
    let mut text = String::new();
    let mut pen = Pen { colour: chart.colour, now: None };
    for (row, cells) in cells.chunks(columns).enumerate() {
        let offset = cell * (row * columns) as u64;
        let _ = write!(text, "{:>width$} ", human(offset), width = LABEL - 1);
        for cell in cells {
            pen.put(&mut text, cell.main_kind(), shade(cell));
        }
        pen.lift(&mut text);
        text.push('\n');
    }
    legend(&mut text, pen, columns, cell, &cells);
    text
}

struct Grid {
    columns: usize,
    /// Bytes.
    cell: u64,
}

impl Grid {
    fn fitting(size: u64, chart: Chart) -> Self {
        let room = chart.width.saturating_sub(LABEL).clamp(1, MAX_COLUMNS);
        let columns = 1 << room.ilog2();
        let rows = chart.height.saturating_sub(LEGEND).max(1) as u64;
        let wanted = size.div_ceil(columns as u64 * rows).max(SMALLEST_CELL);
        Self { columns, cell: wanted.checked_next_power_of_two().unwrap_or(u64::MAX) }
    }
}

fn shade(cell: &Cell) -> char {
    SHADES[cell.share(4) as usize]
}

/// Changes colours only where they differ.
struct Pen {
    colour: bool,
    now: Option<ChangeKind>,
}

impl Pen {
    fn put(&mut self, text: &mut String, kind: Option<ChangeKind>, mark: char) {
        match kind {
            Some(kind) if self.colour && self.now != Some(kind) => {
                let _ = write!(text, "\x1b[{}m", COLOURS[kind as usize]);
                self.now = Some(kind);
            }
            None => self.lift(text),
            Some(_) => {}
        }
        text.push(mark);
    }

    fn lift(&mut self, text: &mut String) {
        if self.now.take().is_some() {
            text.push_str("\x1b[0m");
        }
    }
}

fn legend(text: &mut String, mut pen: Pen, columns: usize, cell: u64, cells: &[Cell]) {
    let row = cell.saturating_mul(columns as u64);
    let _ = writeln!(text, "a cell is {}, a row is {}", human(cell), human(row));
    let [none, some, half, most, all] = SHADES;
    let _ = writeln!(text, "changed: {none} nothing  {some} to a quarter  {half} to half  {most} to 3/4  {all} more");
    for kind in ChangeKind::ALL {
        if kind != ChangeKind::Data {
            text.push_str("  ");
        }
        if pen.colour {
            pen.put(text, Some(kind), SHADES[4]);
            pen.lift(text);
            text.push(' ');
        }
        let bytes = cells.iter().map(|cell| cell.changed[kind as usize]).sum();
        let _ = write!(text, "{} {}", kind.word(), human(bytes));
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change_picture::ChangeKind::{Data, Discarded, Zero};
    use crate::change_picture::changes;

    const KIB: u64 = 1 << 10;
    const SMALL: Chart = Chart { width: 18, height: 5, colour: false };

    #[test]
    fn small_charts() {
        // 16 cells of 4 KiB in two rows.
        let runs = [
            (0, KIB, Data),
            (4 * KIB, KIB + 1, Data),
            (8 * KIB, 3 * KIB, Zero),
            (12 * KIB, 4 * KIB, Discarded),
            (63 * KIB, KIB, Zero),
        ];
        assert_eq!(
            chart(64 * KIB, &changes(&runs), SMALL),
            concat!(
                "      0 B ░▒▓█····\n",
                "   32 KiB ·······░\n",
                "a cell is 4 KiB, a row is 32 KiB\n",
                "changed: · nothing  ░ to a quarter  ▒ to half  ▓ to 3/4  █ more\n",
                "data 2 KiB  zero 4 KiB  discarded 4 KiB\n",
            )
        );
    }

    #[test]
    fn colours_change_where_they_must() {
        let runs = [(0, 8 * KIB, Data), (8 * KIB, 4 * KIB, Zero), (20 * KIB, 4 * KIB, Discarded)];
        let text = chart(28 * KIB, &changes(&runs), Chart { colour: true, ..SMALL });
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("      0 B \x1b[33m██\x1b[36m█\x1b[0m··\x1b[32m█\x1b[0m·"));
        let last = "\x1b[33m█\x1b[0m data 8 KiB  \x1b[36m█\x1b[0m zero 4 KiB  \x1b[32m█\x1b[0m discarded 4 KiB";
        assert_eq!(lines.next_back(), Some(last));
    }

    #[test]
    fn charts_fit() {
        let sizes = [0, 1, 4096, 100_000, 1 << 30, (1 << 40) + 1, i64::MAX as u64];
        for (width, height) in [(80, 24), (132, 50), (20, 6), (1, 1), (1000, 3)] {
            for size in sizes {
                let text = chart(size, &[], Chart { width, height, colour: true });
                let rows = text.lines().count() - LEGEND;
                assert!(rows <= height.saturating_sub(LEGEND).max(1), "{size} in {width}×{height}:\n{text}");
                let widest = text.lines().take(rows).map(|line| line.chars().count()).max().unwrap_or(0);
                assert!(widest <= width.max(LABEL + 1), "{size} in {width}×{height}:\n{text}");
            }
        }
    }

    #[test]
    fn colour_is_for_terminals_and_for_who_wants_it() {
        assert!(colour_wanted(true, None) && colour_wanted(true, Some(OsStr::new(""))));
        assert!(!colour_wanted(false, None) && !colour_wanted(true, Some(OsStr::new("1"))));
    }
}
