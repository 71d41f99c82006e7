//! How an input's bytes are read.

use crate::bases::bases;
use testkit::{MemoryStorage, SparseBytes};

/// Largest image file. Larger ones would only take longer.
const MAX_SIZE: u64 = 32 << 20;
/// The storage is full here.
const FULL_AT: u64 = 128 << 20;

/// What is done to an open image; offsets and lengths are fitted to it.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    pub kind: u8,
    pub offset: u32,
    pub len: u16,
}

/// An image and what is to be done to it.
pub struct Input {
    pub image: MemoryStorage,
    pub data: Option<MemoryStorage>,
    pub flags: u8,
    pub ops: Vec<Op>,
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    /// The next bytes, filled up with zeroes behind the end.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let n = N.min(self.0.len());
        out[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        out
    }
}

impl Input {
    /// Every row of bytes is an input.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut bytes = Bytes(bytes);
        let [mode, flags, count] = bytes.take();
        let ops = (0..count % 32)
            .map(|_| {
                let [kind, a, b, c, d, e] = bytes.take();
                Op { kind, offset: u32::from_be_bytes([0, a, b, c]), len: u16::from_be_bytes([d, e]) }
            })
            .collect();
        let bases = bases();
        let (image, data) = match usize::from(mode) % (bases.len() + 1) {
            0 => {
                let mut image = SparseBytes::new(0);
                image.write(0, bytes.0);
                // Incompatible feature bit 2: the image wants a data file.
                let wants_data = bytes.0.get(79).is_some_and(|byte| byte & 4 != 0);
                (image, wants_data.then(|| SparseBytes::new(0)))
            }
            n => {
                let base = bases[n - 1].clone();
                let mut image = base.image;
                while !bytes.0.is_empty() {
                    change(&mut image, &mut bytes, base.cluster_bits);
                }
                (image, base.data)
            }
        };
        let memory = |bytes| {
            let memory = MemoryStorage::of(bytes);
            memory.full_at(FULL_AT);
            memory
        };
        Self { image: memory(image), data: data.map(memory), flags, ops }
    }
}

/// Makes one change.
fn change(image: &mut SparseBytes, bytes: &mut Bytes<'_>, cluster_bits: u32) {
    let [kind] = bytes.take();
    match kind % 4 {
        // A few bytes anywhere in the first 16 MiB.
        0 => {
            let [a, b, c] = bytes.take();
            let value: [u8; 8] = bytes.take();
            let len = usize::from(kind >> 4) % 8 + 1;
            image.write(u64::from(u32::from_be_bytes([0, a, b, c])), &value[..len]);
        }
        // An entry of a table: some cluster with some flags.
        1 => {
            let [a, b, cluster, flags] = bytes.take();
            let at = u64::from(u16::from_be_bytes([a, b])) * 8;
            let entry = u64::from(cluster) << cluster_bits | u64::from(flags >> 4) << 60 | u64::from(flags & 15);
            image.write(at, &entry.to_be_bytes());
        }
        // An entry copied to another place.
        2 => {
            let [a, b, c, d] = bytes.take();
            let mut entry = [0; 8];
            image.read(u64::from(u16::from_be_bytes([a, b])) * 8, &mut entry);
            image.write(u64::from(u16::from_be_bytes([c, d])) * 8, &entry);
        }
        // Another size.
        _ => {
            let [a, b, c] = bytes.take();
            image.set_size((u64::from(u32::from_be_bytes([0, a, b, c])) << (kind >> 4 & 3)).min(MAX_SIZE));
        }
    }
}
