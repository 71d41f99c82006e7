//! A long row of bytes that holds only the pages that were written.

use disk::ByteRange;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes per page.
pub(crate) const PAGE: u64 = 4096;

/// A row of bytes of any size, of which only touched pages take memory. Bytes beyond the size read as zero.
#[derive(Clone, Default)]
pub struct SparseBytes {
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
    size: u64,
}

impl SparseBytes {
    /// `size` zero bytes.
    pub fn new(size: u64) -> Self {
        Self { pages: BTreeMap::new(), size }
    }

    /// The bytes of a file; its pages of zeroes become holes.
    ///
    /// # Errors
    /// What reading the file reports.
    pub fn from_file(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut bytes = Self::new(file.metadata()?.len());
        let mut chunk = vec![0; 1 << 20];
        let mut offset = 0;
        while offset < bytes.size {
            let n = chunk.len().min(usize::try_from(bytes.size - offset).unwrap_or(usize::MAX));
            file.read_exact_at(&mut chunk[..n], offset)?;
            for (at, page) in chunk[..n].chunks(PAGE as usize).enumerate() {
                if page.iter().any(|b| *b != 0) {
                    bytes.write(offset + at as u64 * PAGE, page);
                }
            }
            offset += n as u64;
        }
        Ok(bytes)
    }

    /// Writes a sparse file with these bytes, replacing what was there.
    ///
    /// # Errors
    /// What writing the file reports.
    pub fn write_to(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        file.set_len(self.size)?;
        for (page, bytes) in &self.pages {
            let offset = page * PAGE;
            if offset < self.size {
                let n = (self.size - offset).min(PAGE) as usize;
                file.write_all_at(&bytes[..n], offset)?;
            }
        }
        Ok(())
    }

    /// Present size.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of memory behind it.
    pub fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Fills `into` with the bytes from `offset`.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        for (page, within, part) in pieces(ByteRange::new(offset, into.len() as u64)) {
            let into = &mut into[part];
            match self.pages.get(&page) {
                Some(bytes) => into.copy_from_slice(&bytes[within..within + into.len()]),
                None => into.fill(0),
            }
        }
    }

    /// Writes `bytes` from `offset`, growing if need be.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (page, within, part) in pieces(ByteRange::new(offset, bytes.len() as u64)) {
            let bytes = &bytes[part];
            self.page(page)[within..within + bytes.len()].copy_from_slice(bytes);
        }
        self.size = self.size.max(offset + bytes.len() as u64);
    }

    /// Makes the range zero; whole pages become holes when `unmap`, and are set aside otherwise. Grows.
    pub fn zero(&mut self, range: ByteRange, unmap: bool) {
        self.size = self.size.max(range.end());
        if unmap {
            let whole = range.align_in(PAGE);
            let inside: Vec<u64> =
                self.pages.range(whole.offset() / PAGE..whole.end() / PAGE).map(|(p, _)| *p).collect();
            for page in inside {
                self.pages.remove(&page);
            }
        }
        for (page, within, part) in pieces(range) {
            if unmap && !self.pages.contains_key(&page) {
                continue;
            }
            self.page(page)[within..within + part.len()].fill(0);
        }
    }

    /// Sets memory aside for the range. Grows.
    pub fn allocate(&mut self, range: ByteRange) {
        self.size = self.size.max(range.end());
        for (page, ..) in pieces(range) {
            self.page(page);
        }
    }

    /// Grows with zeroes or shrinks.
    pub fn set_size(&mut self, size: u64) {
        if size < self.size {
            let cut = ByteRange::between(size, self.size);
            self.pages.split_off(&size.div_ceil(PAGE));
            self.zero(ByteRange::between(size, cut.end().min(cut.offset().next_multiple_of(PAGE))), true);
        }
        self.size = size;
    }

    /// The first run of pages that are all there, or all not; cut to `range`.
    pub fn extent(&self, range: ByteRange) -> (ByteRange, bool) {
        let first = range.offset() / PAGE;
        let last = (range.end() - 1) / PAGE;
        let hole = !self.pages.contains_key(&first);
        let mut page = first + 1;
        if hole {
            page = self.pages.range(page..).next().map_or(last + 1, |(p, _)| *p);
        } else {
            while page <= last && self.pages.contains_key(&page) {
                page += 1;
            }
        }
        (ByteRange::between(range.offset(), range.end().min(page.saturating_mul(PAGE))), hole)
    }

    /// All bytes in one piece, for small contents.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = vec![0; usize::try_from(self.size).expect("fits into memory")];
        self.read(0, &mut all);
        all
    }

    fn page(&mut self, page: u64) -> &mut [u8; PAGE as usize] {
        self.pages.entry(page).or_insert_with(|| Box::new([0; PAGE as usize]))
    }
}

/// Cuts a range at page boundaries: page, place within the page, place within the range.
fn pieces(range: ByteRange) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut rest = range;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let within = rest.offset() % PAGE;
        let n = (PAGE - within).min(rest.len());
        let at = (rest.offset() - range.offset()) as usize;
        let page = rest.offset() / PAGE;
        rest = rest.skip(n);
        Some((page, within as usize, at..at + n as usize))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_and_exact() {
        let mut bytes = SparseBytes::new(1 << 40);
        bytes.write((1 << 39) + 4000, &[7; 200]);
        assert_eq!(bytes.allocated(), 2 * PAGE);
        let mut got = [1; 300];
        bytes.read((1 << 39) + 3950, &mut got);
        assert_eq!((got[49], got[50], got[249], got[250]), (0, 7, 7, 0));
        assert_eq!(bytes.extent(ByteRange::new(0, 1 << 40)), (ByteRange::new(0, 1 << 39), true));
        assert_eq!(
            bytes.extent(ByteRange::new((1 << 39) + 10, 1 << 30)),
            (ByteRange::new((1 << 39) + 10, 2 * PAGE - 10), false)
        );
        bytes.zero(ByteRange::new((1 << 39) + 4096, 4096), true);
        assert_eq!(bytes.allocated(), PAGE);
    }

    #[test]
    fn shrinking_forgets() {
        let mut bytes = SparseBytes::new(0);
        bytes.write(0, &[9; 10_000]);
        bytes.set_size(5000);
        bytes.set_size(10_000);
        let all = bytes.to_vec();
        assert!(all[..5000].iter().all(|b| *b == 9) && all[5000..].iter().all(|b| *b == 0));
    }
}
