//! The picture as a PNG file, with letters of its own.

use super::layout::{Block, Layout, Metrics};
use super::{Forest, Health, font};
use std::io::{self, Write};

/// Pixels along a dot of a letter.
const DOT: u32 = 2;
const METRICS: Metrics = Metrics { character: (font::WIDTH + 1) * DOT, line: 22, padding: 14, gap: 40 };
/// Between the upper edge of a line and its letters.
const ABOVE: u32 = (METRICS.line - font::HEIGHT * DOT) / 2;
/// Most pixels of a picture; nobody looks at a larger one, and it costs as many bytes of memory.
const LARGEST: u64 = 256 << 20;

/// Colours by their places in [`PALETTE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Colour {
    Page,
    Layer,
    Snapshot,
    Asked,
    Line,
    Text,
    Warning,
    Fault,
}

/// The same as those of the SVG.
const PALETTE: [[u8; 3]; 8] = [
    [0xff, 0xff, 0xff],
    [0xf4, 0xf5, 0xf7],
    [0xe6, 0xf2, 0xfa],
    [0xff, 0xf6, 0xe0],
    [0x6b, 0x72, 0x80],
    [0x1f, 0x29, 0x37],
    [0xb4, 0x53, 0x09],
    [0xc6, 0x28, 0x28],
];

/// Writes the picture, the same for the same layers.
///
/// # Errors
/// Those of `out`; [`io::ErrorKind::FileTooLarge`] for more layers than a picture of pixels can show.
pub(crate) fn write_png(out: impl Write, forest: &Forest) -> io::Result<()> {
    let layout = Layout::of(forest, METRICS);
    let pixels = u64::from(layout.width) * u64::from(layout.height);
    if pixels > LARGEST {
        let text = format!("{} × {} pixels are too many; an SVG has no such bound", layout.width, layout.height);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    let mut encoder = png::Encoder::new(out, layout.width, layout.height);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_palette(PALETTE.concat());
    encoder.set_compression(png::Compression::Balanced);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&Canvas::drawn(&layout).pixels)?;
    Ok(writer.finish()?)
}

struct Canvas {
    width: u32,
    pixels: Vec<u8>,
}

impl Canvas {
    fn drawn(layout: &Layout) -> Self {
        let pixels = vec![Colour::Page as u8; layout.width as usize * layout.height as usize];
        let mut canvas = Self { width: layout.width, pixels };
        for edge in &layout.edges {
            let (child, parent) = (&layout.blocks[edge.child], &layout.blocks[edge.parent]);
            let (x1, y1) = (child.x + child.width / 2, child.y + child.height);
            let (x2, y2) = (parent.x + parent.width / 2, parent.y);
            let turn = y2.saturating_sub(METRICS.gap / 2).max(y1);
            let colour = if edge.faulty { Colour::Fault } else { Colour::Line };
            canvas.fill(x1, y1, DOT, turn - y1, colour);
            canvas.fill(x1.min(x2), turn, x1.abs_diff(x2) + DOT, DOT, colour);
            canvas.fill(x2, turn, DOT, y2 - turn, colour);
        }
        for block in &layout.blocks {
            canvas.block(block);
        }
        canvas
    }

    fn fill(&mut self, x: u32, y: u32, width: u32, height: u32, colour: Colour) {
        for row in y..y + height {
            let at = (row * self.width + x) as usize;
            self.pixels[at..at + width as usize].fill(colour as u8);
        }
    }

    fn block(&mut self, block: &Block) {
        let inside = match (block.asked, block.snapshot) {
            (true, _) => Colour::Asked,
            (false, true) => Colour::Snapshot,
            (false, false) => Colour::Layer,
        };
        let (border, edge) = match (block.health, block.asked) {
            (Health::Fault, _) => (2 * DOT, Colour::Fault),
            (Health::Warning, _) => (2 * DOT, Colour::Warning),
            (Health::Sound, true) => (2 * DOT, Colour::Text),
            (Health::Sound, false) => (DOT, Colour::Line),
        };
        let Block { x, y, width, height, .. } = *block;
        self.fill(x, y, width, height, edge);
        self.fill(x + border, y + border, width - 2 * border, height - 2 * border, inside);
        for (n, line) in block.lines.iter().enumerate() {
            let colour = match line.health {
                Health::Sound => Colour::Text,
                Health::Warning => Colour::Warning,
                Health::Fault => Colour::Fault,
            };
            let top = y + METRICS.padding + n as u32 * METRICS.line + ABOVE;
            self.text(x + METRICS.padding, top, &line.text, colour, n == 0);
        }
    }

    /// Thick letters are drawn twice, one pixel apart.
    fn text(&mut self, x: u32, y: u32, text: &str, colour: Colour, thick: bool) {
        for (n, letter) in text.chars().enumerate() {
            let left = x + n as u32 * METRICS.character;
            for (column, dots) in (0..).zip(font::columns(letter)) {
                for row in (0..font::HEIGHT).filter(|row| dots >> row & 1 == 1) {
                    let width = if thick { DOT + 1 } else { DOT };
                    self.fill(left + column * DOT, y + row * DOT, width, DOT, colour);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree_picture::tests::{everything, one};

    fn picture(forest: &Forest) -> (u32, Vec<u8>) {
        let mut file = Vec::new();
        write_png(&mut file, forest).unwrap();
        let mut again = Vec::new();
        write_png(&mut again, forest).unwrap();
        assert!(file == again, "the same layers, another file");
        let mut decoder = png::Decoder::new(io::Cursor::new(file));
        decoder.set_transformations(png::Transformations::EXPAND);
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!(info.color_type, png::ColorType::Rgb);
        (info.width, pixels)
    }

    fn count(pixels: &[u8], colour: Colour) -> usize {
        pixels.chunks_exact(3).filter(|pixel| **pixel == PALETTE[colour as usize]).count()
    }

    #[test]
    fn a_single_layer_is_a_box_with_its_text() {
        let forest = one();
        let (width, pixels) = picture(&forest);
        let layout = Layout::of(&forest, METRICS);
        let block = &layout.blocks[0];
        assert_eq!((width, layout.edges.len()), (layout.width, 0));
        assert_eq!(width, block.width + 2 * METRICS.gap);
        let inside = (block.width * block.height) as usize;
        let outside = pixels.len() / 3 - inside;
        assert_eq!(count(&pixels, Colour::Page), outside);
        assert_eq!(count(&pixels, Colour::Warning) + count(&pixels, Colour::Fault), 0);
        // Every dot of a thin line of text is four pixels.
        let dots: u32 = block.lines[1].text.chars().flat_map(font::columns).map(u8::count_ones).sum();
        assert!(count(&pixels, Colour::Text) >= 4 * dots as usize);
    }

    #[test]
    fn what_is_wrong_is_seen() {
        let (_, pixels) = picture(&everything());
        for colour in [Colour::Fault, Colour::Warning, Colour::Snapshot, Colour::Asked, Colour::Line] {
            assert!(count(&pixels, colour) > 100, "{colour:?}");
        }
        assert_eq!(picture(&Forest::default()).1, vec![0xff; (2 * METRICS.gap * 2 * METRICS.gap * 3) as usize]);
    }
}
