//! Packs: immutable objects in which leaves and nodes stand as frames, with a table of them at the end.
//!
//! ```text
//! header 32 │ frame │ frame │ … │ sealed table │ trailer 64
//! ```
//! A frame is named by the byte at which it begins, which is also its nonce. `docs/repository.md` has every byte.

use crate::error::{Damage, DamageReason, RepositoryError, Result};
use crate::fields::Fields;
use crate::id::{ContentId, Id};
use crate::secret::{Cipher, Secret, TAG};
use crate::store::{Store, StoreErrorKind};

const MAGIC: &[u8; 8] = b"HWRPACK1";
const END_MAGIC: &[u8; 8] = b"HWRPEND1";
pub(crate) const HEADER: usize = 32;
pub(crate) const TRAILER: usize = 64;
/// The most that a pack may hold: what `target` allows and one frame above it.
pub(crate) const MAX_PACK: u64 = 80 << 20;
/// The most plain bytes of one frame: the largest leaf.
pub(crate) const MAX_PLAIN: usize = 1 << 20;
/// Codec byte and tag.
pub(crate) const OVERHEAD: usize = 1 + TAG;
const TABLE_NONCE: u64 = u64::MAX;
const ENTRY: usize = 1 + 4 + 32;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FrameKind {
    Leaf = 1,
    Node = 2,
}

/// Where a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Location {
    pub(crate) pack: Id,
    pub(crate) offset: u32,
    /// Bytes as they are stored, with codec and tag.
    pub(crate) length: u32,
}

/// A line of a pack's table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    pub(crate) kind: FrameKind,
    pub(crate) offset: u32,
    pub(crate) length: u32,
    pub(crate) id: ContentId,
}

/// A pack that is being filled.
pub(crate) struct PackBuilder {
    id: Id,
    cipher: Cipher,
    bytes: Vec<u8>,
    frames: Vec<Frame>,
}

/// zstd's state and its room, which each thread has once.
pub(crate) struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    room: Vec<u8>,
}

impl Compressor {
    pub(crate) fn new() -> Compressor {
        // Fails for a level that does not exist or without memory.
        let zstd = zstd::bulk::Compressor::new(1).expect("zstd has a level 1");
        Compressor { zstd, room: Vec::new() }
    }

    /// The compressed form, if there is a shorter one.
    fn shorter(&mut self, plain: &[u8]) -> Option<&[u8]> {
        if plain.len() < 64 || looks_random(plain) {
            return None;
        }
        self.room.clear();
        self.room.reserve(zstd::zstd_safe::compress_bound(plain.len()));
        let length = self.zstd.compress_to_buffer(plain, &mut self.room).ok()?;
        (length < plain.len()).then(|| &self.room[..length])
    }
}

/// Whether a sample of 4 KiB, from 8 places, has more than 7.9 bits of entropy per byte: nothing that zstd could shorten.
fn looks_random(plain: &[u8]) -> bool {
    const PIECE: usize = 512;
    if plain.len() < 8 * PIECE {
        return false;
    }
    let mut counts = [[0_u16; 256]; 2];
    for piece in 0..8 {
        let from = (plain.len() - PIECE) / 7 * piece;
        for pair in plain[from..from + PIECE].chunks_exact(2) {
            counts[0][pair[0] as usize] += 1;
            counts[1][pair[1] as usize] += 1;
        }
    }
    let total = (8 * PIECE) as f32;
    let sum: f32 =
        (0..256).map(|n| f32::from(counts[0][n] + counts[1][n])).filter(|c| *c > 0.0).map(|c| c * c.log2()).sum();
    total.log2() - sum / total > 7.9
}

fn about(pack: Id, offset: u64, kind: u8) -> [u8; 25] {
    let mut about = [0; 25];
    about[..16].copy_from_slice(&pack.0);
    about[16..24].copy_from_slice(&offset.to_le_bytes());
    about[24] = kind;
    about
}

impl PackBuilder {
    /// Begins a pack in `bytes`, whose content goes and whose room is used.
    pub(crate) fn new(secret: &Secret, id: Id, mut bytes: Vec<u8>) -> PackBuilder {
        bytes.clear();
        bytes.extend(MAGIC);
        bytes.extend(1_u32.to_le_bytes());
        bytes.extend([u8::from(secret.encrypted()), 0, 0, 0]);
        bytes.extend(id.0);
        PackBuilder { id, cipher: secret.pack_cipher(id), bytes, frames: Vec::new() }
    }

    pub(crate) fn id(&self) -> Id {
        self.id
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Appends a frame; `plain` is at most `MAX_PLAIN` bytes.
    pub(crate) fn push(
        &mut self,
        kind: FrameKind,
        id: ContentId,
        plain: &[u8],
        compressor: &mut Compressor,
    ) -> Location {
        let offset = self.bytes.len();
        match compressor.shorter(plain) {
            Some(short) => {
                self.bytes.push(1);
                self.bytes.extend_from_slice(short);
            }
            None => {
                self.bytes.push(0);
                self.bytes.extend_from_slice(plain);
            }
        }
        let about = about(self.id, offset as u64, kind as u8);
        let tag = self.cipher.seal(offset as u64, &about, &mut self.bytes[offset..]);
        self.bytes.extend(tag);
        let location = Location { pack: self.id, offset: offset as u32, length: (self.bytes.len() - offset) as u32 };
        self.frames.push(Frame { kind, offset: location.offset, length: location.length, id });
        location
    }

    /// The stored bytes of a frame that was pushed.
    pub(crate) fn stored(&self, location: Location) -> Option<Vec<u8>> {
        let from = location.offset as usize;
        (location.pack == self.id).then(|| self.bytes.get(from..from + location.length as usize))?.map(<[u8]>::to_vec)
    }

    /// Table and trailer: the pack as it is put.
    pub(crate) fn seal(mut self) -> (Id, Vec<u8>, Vec<Frame>) {
        let mut table = Vec::with_capacity(4 + self.frames.len() * ENTRY);
        table.extend((self.frames.len() as u32).to_le_bytes());
        for frame in &self.frames {
            table.push(frame.kind as u8);
            table.extend(frame.length.to_le_bytes());
            table.extend(frame.id.0);
        }
        let from = self.bytes.len() as u64;
        let tag = self.cipher.seal(TABLE_NONCE, &about(self.id, from, 3), &mut table);
        self.bytes.extend(table);
        self.bytes.extend(tag);
        let end = self.bytes.len() as u64;
        let mut trailer = Vec::with_capacity(TRAILER);
        trailer.extend(END_MAGIC);
        trailer.extend(self.id.0);
        trailer.extend(from.to_le_bytes());
        trailer.extend((end - from).to_le_bytes());
        trailer.extend([0; 8]);
        let sum = blake3::hash(&trailer);
        trailer.extend(&sum.as_bytes()[..16]);
        self.bytes.extend(trailer);
        (self.id, self.bytes, self.frames)
    }
}

/// Opens a frame's stored bytes. `limit` bounds the plain ones.
pub(crate) fn open_frame(
    cipher: &Cipher,
    at: Location,
    kind: FrameKind,
    mut stored: Vec<u8>,
    limit: usize,
) -> Result<Vec<u8>, DamageReason> {
    if stored.len() != at.length as usize {
        return Err(DamageReason::Short);
    }
    cipher.open(u64::from(at.offset), &about(at.pack, u64::from(at.offset), kind as u8), &mut stored)?;
    match stored.first() {
        Some(0) if stored.len() <= limit + 1 => {
            stored.remove(0);
            Ok(stored)
        }
        Some(1) => {
            let size = zstd::zstd_safe::get_frame_content_size(&stored[1..]).ok().flatten();
            let size =
                size.and_then(|s| usize::try_from(s).ok()).filter(|s| *s <= limit).ok_or(DamageReason::Compression)?;
            zstd::bulk::decompress(&stored[1..], size).map_err(|_| DamageReason::Compression)
        }
        _ => Err(DamageReason::Field),
    }
}

/// Whether a reference's numbers can be: a frame between header and trailer of a pack.
pub(crate) fn possible(offset: u32, length: u32) -> bool {
    offset as usize >= HEADER
        && length as usize >= OVERHEAD
        && length as usize <= MAX_PLAIN + OVERHEAD
        && u64::from(offset) + u64::from(length) <= MAX_PACK
}

/// Reads a pack's table from the store, and proves it.
pub(crate) fn read_table(store: &dyn Store, secret: &Secret, pack: Id) -> Result<Vec<Frame>> {
    let name = pack.pack_name();
    let damaged = |offset, reason| RepositoryError::from(Damage::new(&name, offset, reason));
    let length = match store.look(&name) {
        Ok(object) => object.length,
        Err(e) if e.kind == StoreErrorKind::Missing => return Err(damaged(0, DamageReason::Missing)),
        Err(e) => return Err(RepositoryError::store(&name, "look at")(e)),
    };
    if length > MAX_PACK || length < (HEADER + TRAILER) as u64 {
        return Err(damaged(0, DamageReason::Trailer));
    }
    let read = |range| store.read(&name, range).map_err(RepositoryError::store(&name, "read"));
    // One read that mostly has trailer and table: 1,024 frames of them.
    let guess = length.saturating_sub(40 << 10);
    let tail = read(guess..length)?;
    let from = parse_trailer(&tail, pack, length).map_err(|reason| damaged(length - TRAILER as u64, reason))?;
    let end = length - TRAILER as u64;
    let mut sealed =
        if from >= guess { tail[(from - guess) as usize..(end - guess) as usize].to_vec() } else { read(from..end)? };
    let parse = |sealed: &mut Vec<u8>| -> Result<Vec<Frame>, DamageReason> {
        secret.pack_cipher(pack).open(TABLE_NONCE, &about(pack, from, 3), sealed)?;
        parse_table(sealed, from)
    };
    parse(&mut sealed).map_err(|reason| damaged(from, reason))
}

fn parse_trailer(tail: &[u8], pack: Id, length: u64) -> Result<u64, DamageReason> {
    let trailer = tail.last_chunk::<TRAILER>().ok_or(DamageReason::Trailer)?;
    let mut fields = Fields::of(trailer);
    if fields.array()? != *END_MAGIC {
        return Err(DamageReason::Trailer);
    }
    let id = Id(fields.array()?);
    let (from, count) = (fields.u64()?, fields.u64()?);
    fields.take(8)?;
    if fields.take(16)? != &blake3::hash(&trailer[..TRAILER - 16]).as_bytes()[..16] {
        return Err(DamageReason::Checksum);
    }
    if id != pack {
        return Err(DamageReason::Identity);
    }
    if from < HEADER as u64 || from.checked_add(count) != Some(length - TRAILER as u64) {
        return Err(DamageReason::Field);
    }
    Ok(from)
}

fn parse_table(bytes: &[u8], end: u64) -> Result<Vec<Frame>, DamageReason> {
    let mut fields = Fields::of(bytes);
    let count = fields.count(ENTRY)?;
    let mut frames = Vec::with_capacity(count);
    let mut offset = HEADER as u64;
    for _ in 0..count {
        let kind = match fields.u8()? {
            1 => FrameKind::Leaf,
            2 => FrameKind::Node,
            _ => return Err(DamageReason::Field),
        };
        let length = fields.u32()?;
        let id = ContentId(fields.array()?);
        if offset + u64::from(length) > end || !possible(offset as u32, length) {
            return Err(DamageReason::Field);
        }
        frames.push(Frame { kind, offset: offset as u32, length, id });
        offset += u64::from(length);
    }
    fields.end()?;
    if offset == end { Ok(frames) } else { Err(DamageReason::Field) }
}
