//! Which content an image holds, and which content of its parent it was made over.

use std::fmt;

/// Names an image's content: it changes with the first write of every opening.
///
/// The first half names the image and stays; the second half changes with the content. So of two ids that differ it can
/// be told whether they are states of one image (or of copies of it), or of two images. Never all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ContentId([u8; 16]);

impl ContentId {
    /// The id of these bytes; `None` when all are zero, which says "no id" where ids are stored.
    pub fn from_bytes(bytes: [u8; 16]) -> Option<Self> {
        (bytes != [0; 16]).then_some(Self(bytes))
    }

    /// The bytes, as they are stored.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// The id in 32 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != 32 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        let mut bytes = [0; 16];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Self::from_bytes(bytes)
    }

    /// Another content of the same image; `random` decides which.
    pub fn successor(self, random: [u8; 8]) -> Self {
        let mut bytes = self.0;
        bytes[8..].copy_from_slice(&random);
        // Differs whatever was drawn, and is not zero as a whole.
        let mut next = Self(bytes);
        while next == self || next.0 == [0; 16] {
            next.0[15] = next.0[15].wrapping_add(1);
        }
        next
    }

    /// Whether both are contents of one image, or of copies of it.
    pub fn same_image(self, other: Self) -> bool {
        self.0[..8] == other.0[..8]
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a child remembers of its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParentLink {
    /// The parent's content; `None` where it bore no id. Then size and time are all that names it.
    pub parent: Option<ContentId>,
    /// A second content that is right as well: that of a parent into which this child's own bytes are being brought. Size
    /// and time do not count while the parent bears it.
    pub second: Option<ContentId>,
    /// Bytes of the parent's file.
    pub size: u64,
    /// When the parent's file was modified last, in nanoseconds since 1970; 0 where there is no such time.
    pub modified: i64,
    /// When this was written, in milliseconds since 1970.
    pub linked: u64,
}

/// What an image says about itself and its parent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerIdentity {
    /// Its content; `None`: it bears no id, or an id that has no meaning any more.
    pub content: Option<ContentId>,
    /// The id that it bore before a program that does not know of ids opened it for writing.
    pub lapsed: Option<ContentId>,
    /// Its parent, as it was when it was bound.
    pub link: Option<ParentLink>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_written_and_read() {
        let id = ContentId::from_bytes([0xa5; 16]).expect("an id");
        assert_eq!(id.to_string(), "a5".repeat(16));
        assert_eq!(ContentId::parse(&id.to_string()), Some(id));
        for bad in ["", "a5", &"0".repeat(32), &"g".repeat(32), &"ä".repeat(16), &"+1".repeat(16)] {
            assert_eq!(ContentId::parse(bad), None, "{bad:?}");
        }
        assert_eq!(ContentId::from_bytes([0; 16]), None);
    }

    #[test]
    fn a_successor_is_another_content_of_the_same_image() {
        let id = ContentId::from_bytes([7; 16]).expect("an id");
        for random in [[1; 8], [7; 8], [0; 8]] {
            let next = id.successor(random);
            assert!(next != id && next.same_image(id), "{random:?}");
        }
        let other = ContentId::from_bytes([8; 16]).expect("an id");
        assert!(!other.same_image(id));
        let mut half = [0; 16];
        half[15] = 1;
        let half = ContentId::from_bytes(half).expect("an id");
        let next = half.successor([0; 8]);
        assert!(next != half && next.to_bytes() != [0; 16]);
    }
}
