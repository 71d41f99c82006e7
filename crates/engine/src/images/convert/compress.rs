//! Clusters in compressed form, made by worker threads.

use crate::images::zeroes;
use disk::{Buf, ByteRange};
use formats::qcow2::{Compression, encode_cluster};

/// A cluster on its way into the target.
pub(super) struct Cluster {
    pub(super) range: ByteRange,
    pub(super) bytes: Stored,
}

/// In which form.
pub(super) enum Stored {
    Zero,
    /// Does not become smaller, or must not become larger.
    Plain(Buf),
    Encoded(Vec<u8>),
}

/// Encodes all clusters of a buffer that belongs to `offset`. A last one that is short reaches up to `end`, the
/// target's, whose size may be rounded up; without, it stays as it is.
pub(super) fn encode(
    offset: u64,
    mut buf: Buf,
    unit: u64,
    end: Option<u64>,
    compression: Compression,
    keep_zeroes: bool,
) -> Vec<Cluster> {
    let mut clusters = Vec::with_capacity(buf.len().div_ceil(unit as usize));
    let mut at = offset;
    while !buf.is_empty() {
        let bytes = buf.split_to(buf.len().min(unit as usize));
        let mut range = ByteRange::new(at, bytes.len() as u64);
        at = range.end();
        let bytes = if !keep_zeroes && zeroes::is_zero(&bytes) {
            Stored::Zero
        } else {
            let short = bytes.len() < unit as usize;
            let encoded = if short && end.is_none() {
                None
            } else if short {
                // The last cluster of a disk may be cut by its end; its stored form is whole.
                let mut whole = Buf::zeroed(unit as usize);
                whole[..bytes.len()].copy_from_slice(&bytes);
                encode_cluster(compression, &whole)
            } else {
                encode_cluster(compression, &bytes)
            };
            match encoded {
                Some(encoded) => {
                    let whole = range.offset() + unit;
                    range = ByteRange::between(range.offset(), end.map_or(whole, |end| whole.min(end)));
                    Stored::Encoded(encoded)
                }
                None => Stored::Plain(bytes),
            }
        };
        clusters.push(Cluster { range, bytes });
    }
    clusters
}
