//! The identity of an image's content, and the link to its parent's.
//!
//! The format has no word for which content an image holds, so a child cannot see that its parent was changed under it.
//! The extension of type `HWLI` in the header gives it that word (how it is stored: `sector_record.rs`). The record:
//!
//! | byte of the record | what |
//! |---|---|
//! | 0–15 | the id of the image's content; 0–7 name the image, 8–15 its content |
//! | 16–31 | the id of its parent's content; zero: the parent bore none |
//! | 32–47 | a second content of the parent that is right as well; zero: none |
//! | 48–55 | bytes of the parent's file |
//! | 56–63 | when the parent's file was modified last, in nanoseconds since 1970, signed |
//! | 64–71 | when the link was made, in milliseconds since 1970 |
//! | 72–75 | bit 0: there is a link (bytes 16–71); other bits are zero |
//! | 76–79 | zero |
//!
//! The id holds as long as autoclear bit 43 is set, which a program that does not know it must clear before it writes. (What
//! that does not see: `history.rs`.) The link holds in any case: what a guest does to the child through QEMU changes nothing
//! about the parent that it was bound to.

use super::extensions;
use super::header::{AUTOCLEAR_IDENTITY, Header};
use super::image::Image;
use super::sector_record::{FRONT, SectorRecord};
use disk::{ContentId, LayerIdentity, ParentLink, Result};

/// Bytes of the record.
const RECORD: usize = 80;
/// Flag: the record has a link.
const LINKED: u32 = 1;

/// The record: room for three, so that one can move to another place without a moment at which there is none.
pub(super) const IDENTITY: SectorRecord =
    SectorRecord { kind: extensions::IDENTITY, len: FRONT + 3 * RECORD - 8, record: RECORD, bit: AUTOCLEAR_IDENTITY };

/// What the record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    content: Option<ContentId>,
    link: Option<ParentLink>,
}

impl Record {
    /// `bytes` are [`RECORD`] in number. Whatever they are, they mean something: a link that makes no sense fits no
    /// parent.
    fn parse(bytes: &[u8]) -> Self {
        let id = |at: usize| ContentId::from_bytes(bytes[at..at + 16].try_into().expect("sixteen bytes"));
        let linked = extensions::be32(bytes, 72) & LINKED != 0;
        let link = linked.then(|| ParentLink {
            parent: id(16),
            second: id(32),
            size: extensions::be64(bytes, 48),
            modified: extensions::be64(bytes, 56).cast_signed(),
            linked: extensions::be64(bytes, 64),
        });
        Self { content: id(0), link }
    }

    fn encode(&self) -> [u8; RECORD] {
        let bytes = |id: Option<ContentId>| id.map_or([0; 16], ContentId::to_bytes);
        let mut out = [0; RECORD];
        out[..16].copy_from_slice(&bytes(self.content));
        if let Some(link) = &self.link {
            out[16..32].copy_from_slice(&bytes(link.parent));
            out[32..48].copy_from_slice(&bytes(link.second));
            out[48..56].copy_from_slice(&link.size.to_be_bytes());
            out[56..64].copy_from_slice(&link.modified.to_be_bytes());
            out[64..72].copy_from_slice(&link.linked.to_be_bytes());
            out[72..76].copy_from_slice(&LINKED.to_be_bytes());
        }
        out
    }
}

impl Header {
    /// What the image says about its content and its parent.
    pub fn identity(&self) -> LayerIdentity {
        let Some(record) = self.record(&IDENTITY).map(Record::parse) else { return LayerIdentity::default() };
        let holds = self.autoclear & AUTOCLEAR_IDENTITY != 0;
        LayerIdentity {
            content: record.content.filter(|_| holds),
            lapsed: record.content.filter(|_| !holds),
            link: record.link,
        }
    }
}

/// A random id: another content of the same image, where that is known.
pub fn new_content_id(previous: Option<ContentId>) -> ContentId {
    let mut random = [0; 16];
    let mut filled = 0;
    while filled < random.len() {
        filled += rustix::rand::getrandom(&mut random[filled..], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    }
    match previous {
        Some(previous) => previous.successor(random[8..].try_into().expect("eight bytes")),
        None => ContentId::from_bytes(random).unwrap_or_else(|| new_content_id(None)),
    }
}

impl Image {
    /// Gives the content another id, and the image the link that waits for the first write. Due before that write. `true`:
    /// the image bears an id, and its bit may be set.
    ///
    /// Crash: the id changes within one sector and is durable before anything else changes: the old id and the old content,
    /// or the new id. While the bit is clear there is no id.
    pub(super) async fn announce_identity(&self) -> Result<bool> {
        if self.header.borrow().version < 3 {
            return Ok(false);
        }
        let present = self.header.borrow().identity();
        let id = match present.content.filter(|_| self.renewed.get()) {
            Some(given) => given,
            None => new_content_id(present.content.or(present.lapsed)),
        };
        let link = self.link_to_set.get().or(present.link);
        let record = Record { content: Some(id), link };
        let put = self.put_record(&IDENTITY, &record.encode()).await?;
        self.link_to_set.set(None);
        Ok(put)
    }

    /// Puts a link, an id, or both into the header; durable when it returns. An image that bears no id, or one that lapsed,
    /// gets a new one. `false`: there is no room, or version 2 has no autoclear features.
    ///
    /// Crash: as `announce_identity`; the bit is set last.
    ///
    /// # Errors
    /// `ReadOnly`, `Poisoned`, and those of the storage.
    pub(super) async fn put_identity(&self, change: impl FnOnce(&mut LayerIdentity)) -> Result<bool> {
        self.allocator()?;
        self.refuse_if_poisoned()?;
        // Not while the first write is announced, which changes the same record.
        let _one = self.begin_writing.lock().await;
        if self.header.borrow().version < 3 {
            return Ok(false);
        }
        let mut wanted = self.header.borrow().identity();
        change(&mut wanted);
        let id = wanted.content.unwrap_or_else(|| new_content_id(wanted.lapsed));
        let record = Record { content: Some(id), link: wanted.link };
        let put = self.put_record(&IDENTITY, &record.encode()).await;
        let put = self.poison_on_error(put)?;
        if put {
            let set = self.change_features(|header| header.autoclear |= AUTOCLEAR_IDENTITY).await;
            self.poison_on_error(set)?;
        }
        Ok(put)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> Option<ContentId> {
        ContentId::from_bytes([n; 16])
    }

    #[test]
    fn records_are_written_and_read() {
        let link = ParentLink { parent: id(2), second: id(3), size: u64::MAX, modified: -5, linked: 9 };
        for link in [None, Some(link), Some(ParentLink { parent: None, second: None, ..link })] {
            let record = Record { content: id(1), link };
            assert_eq!(Record::parse(&record.encode()), record);
        }
        assert_eq!(Record::parse(&[0; RECORD]), Record { content: None, link: None });
        let odd = Record::parse(&[0xff; RECORD]);
        assert_eq!(odd.link.map(|link| (link.size, link.modified)), Some((u64::MAX, -1)));
    }

    #[test]
    fn the_image_of_an_id_stays() {
        let first = new_content_id(None);
        let second = new_content_id(Some(first));
        assert!(first != second && first.same_image(second));
        assert!(!first.same_image(new_content_id(None)));
    }
}
