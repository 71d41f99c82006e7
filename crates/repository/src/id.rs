//! Names: of leaves and nodes (by content), of packs, points and the other objects (by chance).

use crate::host::Host;
use std::fmt;

/// A keyed BLAKE3 hash: the name of a leaf's or a node's content. It tells nothing to who has not the repository's secret.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentId(pub [u8; 32]);

impl ContentId {
    /// Of what is all zero, and is not stored.
    pub const ZERO: ContentId = ContentId([0; 32]);
}

/// A random name. Those of points begin with their time, so that they sort by it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub [u8; 16]);

impl Id {
    pub(crate) fn random(host: &dyn Host) -> crate::error::Result<Id> {
        let mut bytes = [0; 16];
        if !host.random(&mut bytes) {
            return Err(crate::RepositoryError::Invalid(
                "this machine gives no randomness, so nothing can be named".to_owned(),
            ));
        }
        Ok(Id(bytes))
    }

    /// Random, behind 48 bits of time.
    pub(crate) fn timed(host: &dyn Host, ms: u64) -> crate::error::Result<Id> {
        let mut id = Id::random(host)?;
        id.0[..6].copy_from_slice(&ms.to_be_bytes()[2..]);
        Ok(id)
    }

    /// Reads the 32 hexadecimal digits that `Display` writes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Id> {
        let digits = text.as_bytes();
        if digits.len() != 32 {
            return None;
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let value = |d: u8| match d {
                b'0'..=b'9' => Some(d - b'0'),
                b'a'..=b'f' => Some(d - b'a' + 10),
                _ => None,
            };
            *byte = value(pair[0])? << 4 | value(pair[1])?;
        }
        Some(Id(bytes))
    }

    pub(crate) fn pack_name(self) -> String {
        format!("packs/{:02x}/{self}", self.0[0])
    }
}

fn hex(bytes: &[u8], out: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
}

impl fmt::Display for Id {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, out)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, out)
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, out)
    }
}

impl fmt::Debug for ContentId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, out)
    }
}
