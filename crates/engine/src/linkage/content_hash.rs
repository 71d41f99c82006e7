//! The hash of what an image shows.
//!
//! BLAKE3 over the BLAKE3 hashes of its pieces of 1 MiB (the last one is as long as what is left), one behind the other.
//! So pieces that are known to be zero are not read, and not hashed more than once.

use super::fingerprint::{Fingerprint, now};
use super::identity_file::ContentHash;
use crate::EngineError;
use crate::images::Progress;
use blake3::Hasher;
use disk::{Buf, ByteRange, DiskHandle, LayerIdentity};
use futures_util::stream::{self, StreamExt};

/// Bytes of a piece.
const PIECE: u64 = 1 << 20;
/// Pieces that are read at the same time.
const UNDER_WAY: usize = 4;

/// Hashes all that a disk shows; `progress` counts its bytes.
pub(super) async fn hash(disk: &DiskHandle, progress: &Progress) -> Result<String, EngineError> {
    let size = disk.geometry().size;
    let zero_piece = blake3::hash(&vec![0; PIECE as usize]);
    let mut all = Hasher::new();
    let mut rest = ByteRange::new(0, size);
    while !rest.is_empty() {
        progress.check()?;
        let extent = disk.map(rest).await?;
        let len = extent.range.len();
        if extent.zero && len >= PIECE {
            let pieces = len / PIECE;
            for _ in 0..pieces {
                all.update(zero_piece.as_bytes());
            }
            progress.advance(pieces * PIECE);
            rest = rest.skip(pieces * PIECE);
            continue;
        }
        // Up to where the next run of zeroes may begin, in whole pieces.
        let run = rest.prefix(len.div_ceil(PIECE) * PIECE);
        let pieces = (0..run.len().div_ceil(PIECE)).map(|n| run.skip(n * PIECE).prefix(PIECE));
        let mut hashes = stream::iter(pieces)
            .map(|piece| async move {
                progress.check()?;
                let bytes = disk.read(piece.offset(), Buf::new(piece.len() as usize)).await?;
                let hash = dataplane::offload(move || blake3::hash(&bytes)).await;
                Ok::<_, EngineError>((piece.len(), hash))
            })
            .buffered(UNDER_WAY);
        while let Some(hashed) = hashes.next().await {
            let (len, hash) = hashed?;
            all.update(hash.as_bytes());
            progress.advance(len);
        }
        rest = rest.skip(run.len());
    }
    Ok(all.finalize().to_hex().to_string())
}

/// The record of a hash that was taken of an image like this.
pub(super) fn record(blake3: String, disk_size: u64, found: &LayerIdentity, print: &Fingerprint) -> ContentHash {
    ContentHash {
        blake3,
        disk_size,
        content: found.content.map(|id| id.to_string()),
        size: print.size,
        modified: print.modified,
        taken: now(),
    }
}
