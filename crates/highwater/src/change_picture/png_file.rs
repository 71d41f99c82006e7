//! The picture as a PNG file.

use super::cells::{Cell, divide};
use super::{Change, hilbert};
use std::io::Write;

/// Width and height in pixels.
const SIDE: u32 = 1024;
/// Most cells along a side are `2^10`, one for each pixel; fewest `2^3`.
const ORDERS: std::ops::RangeInclusive<u32> = 3..=10;
/// Cells of a small disk have at least this many bytes, and are drawn as squares of several pixels.
const SMALLEST_CELL: u64 = 4096;

type Colour = [u8; 3];

/// Of the kinds, in the order of `ChangeKind::ALL`; colours that people with a colour vision deficiency tell apart
/// (Okabe and Ito): orange for data, sky blue for zeroes, green for what was discarded.
const KINDS: [Colour; 3] = [[0xE6, 0x9F, 0x00], [0x56, 0xB4, 0xE9], [0x00, 0x9E, 0x73]];
const UNCHANGED: Colour = [0x20, 0x24, 0x2C];
/// Beyond the disk's end.
const OUTSIDE: Colour = [0x00, 0x00, 0x00];

/// Strength of a colour, of 255, in a cell of which next to nothing was changed: it must be seen.
const FAINTEST: u32 = 72;

/// Writes the picture of a disk of `size` bytes: 1024 × 1024 pixels, the same for the same changes.
///
/// The disk begins in the upper left corner and ends in the upper right one, if it fills the picture; in between it
/// follows a Hilbert curve. Colours say how bytes were changed, and are the stronger the more of a cell was.
///
/// # Errors
/// Those of `out`.
pub(crate) fn write_png(out: impl Write, size: u64, changes: &[Change]) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(out, SIDE, SIDE);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Balanced);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels(size, changes))?;
    writer.finish()
}

/// Cells along a side, as a power of two, and the bytes of one.
fn scale(size: u64) -> (u32, u64) {
    let cells = |order: u32| 1u64 << (2 * order);
    let order = ORDERS.rev().find(|order| size / cells(*order) >= SMALLEST_CELL).unwrap_or(*ORDERS.start());
    (order, size.div_ceil(cells(order)).max(1))
}

fn pixels(size: u64, changes: &[Change]) -> Vec<u8> {
    let (order, cell) = scale(size);
    let count = 1u32 << (2 * order);
    let square = SIDE >> order;
    let mut pixels = vec![0; (SIDE * SIDE * 3) as usize];
    for (n, cell) in (0..count).zip(divide(size, cell, count as usize, changes)) {
        let (column, row) = hilbert::place(order, n);
        let colour = colour(&cell).repeat(square as usize);
        for y in row * square..(row + 1) * square {
            let at = ((y * SIDE + column * square) * 3) as usize;
            pixels[at..at + colour.len()].copy_from_slice(&colour);
        }
    }
    pixels
}

fn colour(cell: &Cell) -> Colour {
    if cell.len == 0 {
        return OUTSIDE;
    }
    let strength = match cell.share(255) {
        0 => return UNCHANGED,
        share => FAINTEST + share * (255 - FAINTEST) / 255,
    };
    let changed = u128::from(cell.changed_bytes());
    std::array::from_fn(|channel| {
        // Of several kinds in one cell each colours by its bytes.
        let sum: u128 =
            KINDS.iter().zip(cell.changed).map(|(kind, bytes)| u128::from(kind[channel]) * u128::from(bytes)).sum();
        let full = u32::try_from(sum / changed).unwrap_or(255);
        let mixed = (full * strength + u32::from(UNCHANGED[channel]) * (255 - strength)) / 255;
        u8::try_from(mixed).unwrap_or(255)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change_picture::ChangeKind::{Data, Discarded, Zero};
    use crate::change_picture::changes;

    struct Picture(Vec<u8>);

    impl Picture {
        fn of(size: u64, changes: &[Change]) -> Self {
            let mut file = Vec::new();
            write_png(&mut file, size, changes).unwrap();
            let mut again = Vec::new();
            write_png(&mut again, size, changes).unwrap();
            assert!(file == again, "the same changes, another file");
            let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            let info = reader.next_frame(&mut pixels).unwrap();
            assert_eq!((info.width, info.height, info.color_type), (1024, 1024, png::ColorType::Rgb));
            Self(pixels)
        }

        fn at(&self, x: usize, y: usize) -> Colour {
            self.0[(y * 1024 + x) * 3..][..3].try_into().unwrap()
        }

        fn count(&self, colour: Colour) -> usize {
            self.0.chunks_exact(3).filter(|pixel| **pixel == colour).count()
        }
    }

    #[test]
    fn scales() {
        assert_eq!(scale(0), (3, 1));
        assert_eq!(scale(1 << 20), (4, 4096));
        assert_eq!(scale(1 << 32), (10, 4096));
        assert_eq!(scale((1 << 40) + 1), (10, (1 << 20) + 1));
    }

    #[test]
    fn quarters() {
        // 256 cells of 64 × 64 pixels; the second quarter of the disk is the lower left one of the picture.
        let mib = 1 << 20;
        let picture = Picture::of(mib, &changes(&[(mib / 4, mib / 4, Data), (mib / 2, mib / 4, Zero)]));
        assert_eq!(picture.at(0, 0), UNCHANGED);
        assert_eq!([picture.at(0, 512), picture.at(511, 1023)], [KINDS[0]; 2]);
        assert_eq!([picture.at(512, 512), picture.at(1023, 1023)], [KINDS[1]; 2]);
        assert_eq!([picture.at(512, 0), picture.at(1023, 511)], [UNCHANGED; 2]);
        assert_eq!(picture.count(KINDS[0]), 512 * 512);
    }

    #[test]
    fn little_is_faint_and_much_is_strong() {
        let tib = 1 << 40;
        let picture = Picture::of(tib, &changes(&[(0, 1, Discarded), (1 << 20, 1 << 20, Discarded)]));
        let faint = picture.at(0, 0);
        assert!(faint != UNCHANGED && faint[1] > UNCHANGED[1] && faint[1] < KINDS[2][1], "{faint:?}");
        assert_eq!(picture.count(KINDS[2]), 1);
        assert_eq!(picture.count(UNCHANGED), 1024 * 1024 - 2);
    }

    #[test]
    fn kinds_mix_by_bytes() {
        let cell = Cell { len: 8, changed: [6, 0, 2] };
        assert_eq!(colour(&cell), [(0xE6 * 6) as u32, 0x9F * 6 + 0x9E * 2, 0x73 * 2].map(|sum| (sum / 8) as u8));
    }

    #[test]
    fn an_empty_disk_and_one_that_does_not_fill_the_picture() {
        assert_eq!(Picture::of(0, &[]).count(OUTSIDE), 1024 * 1024);
        // 65 bytes in 64 cells of two.
        let odd = Picture::of(65, &changes(&[(64, 1, Data)]));
        assert_eq!((odd.count(KINDS[0]), odd.count(UNCHANGED)), (128 * 128, 32 * 128 * 128));
    }
}
