//! The master secret and what is derived from it: names of content, ciphers of packs and objects.

use crate::error::DamageReason;
use crate::id::{ContentId, Id};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// Bytes of the tag behind everything sealed.
pub(crate) const TAG: usize = 16;

/// What the repository's 32 random bytes give. Never leaves the process but wrapped (`keys.rs`).
pub(crate) struct Secret {
    master: [u8; 32],
    leaf: [u8; 32],
    node: [u8; 32],
    pack: [u8; 32],
    object: [u8; 32],
    encrypted: bool,
}

impl Secret {
    pub(crate) fn new(master: [u8; 32], encrypted: bool) -> Secret {
        let derive = |context: &str| blake3::derive_key(context, &master);
        Secret {
            leaf: derive("highwater repository v1 leaf id"),
            node: derive("highwater repository v1 node id"),
            pack: derive("highwater repository v1 pack key"),
            object: derive("highwater repository v1 object key"),
            master,
            encrypted,
        }
    }

    pub(crate) fn master(&self) -> &[u8; 32] {
        &self.master
    }

    pub(crate) fn encrypted(&self) -> bool {
        self.encrypted
    }

    pub(crate) fn leaf_id(&self, leaf: &[u8]) -> ContentId {
        ContentId(*blake3::keyed_hash(&self.leaf, leaf).as_bytes())
    }

    /// The hash of level and children, wherever they stand: equal content, equal id.
    pub(crate) fn node_id(&self, level: u8, children: impl Iterator<Item = ContentId>) -> ContentId {
        let mut hasher = blake3::Hasher::new_keyed(&self.node);
        hasher.update(&[level]);
        let mut all = Vec::with_capacity(256 * 32);
        children.for_each(|id| all.extend(id.0));
        hasher.update(&all);
        ContentId(*hasher.finalize().as_bytes())
    }

    pub(crate) fn pack_cipher(&self, pack: Id) -> Cipher {
        self.cipher(blake3::keyed_hash(&self.pack, &pack.0).as_bytes())
    }

    /// Of one version of one small object: `salt` is drawn anew for each, so that the key seals once.
    pub(crate) fn object_cipher(&self, name: &str, salt: &[u8; 16]) -> Cipher {
        let mut hasher = blake3::Hasher::new_keyed(&self.object);
        hasher.update(salt).update(name.as_bytes());
        self.cipher(hasher.finalize().as_bytes())
    }

    fn cipher(&self, key: &[u8; 32]) -> Cipher {
        if self.encrypted { Cipher::aes(key) } else { Cipher::Tag(*key) }
    }
}

/// Seals with AES-256-GCM, or, in a repository that is not encrypted, with a tag alone.
pub(crate) enum Cipher {
    Aes(Box<LessSafeKey>),
    Tag([u8; 32]),
}

impl Cipher {
    pub(crate) fn aes(key: &[u8; 32]) -> Cipher {
        // The one thing that can be wrong with a key is its length.
        let key = UnboundKey::new(&AES_256_GCM, key).expect("32 bytes are a key of AES-256");
        Cipher::Aes(Box::new(LessSafeKey::new(key)))
    }

    /// Encrypts in place and gives the tag. `nonce` must not repeat under one key.
    pub(crate) fn seal(&self, nonce: u64, about: &[u8], bytes: &mut [u8]) -> [u8; TAG] {
        match self {
            Cipher::Aes(key) => {
                let tag = key.seal_in_place_separate_tag(nonce_of(nonce), Aad::from(about), bytes);
                let mut out = [0; TAG];
                out.copy_from_slice(tag.expect("a frame is far below AES-GCM's 64 GiB").as_ref());
                out
            }
            Cipher::Tag(key) => tag_of(key, nonce, about, bytes),
        }
    }

    /// Decrypts what `seal` made, with the tag behind it, and cuts the tag off.
    pub(crate) fn open(&self, nonce: u64, about: &[u8], bytes: &mut Vec<u8>) -> Result<(), DamageReason> {
        let length = bytes.len().checked_sub(TAG).ok_or(DamageReason::Short)?;
        match self {
            Cipher::Aes(key) => {
                key.open_in_place(nonce_of(nonce), Aad::from(about), bytes).map_err(|_| DamageReason::Tag)?;
            }
            Cipher::Tag(key) => {
                if tag_of(key, nonce, about, &bytes[..length]) != bytes[length..] {
                    return Err(DamageReason::Tag);
                }
            }
        }
        bytes.truncate(length);
        Ok(())
    }
}

fn nonce_of(number: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn tag_of(key: &[u8; 32], nonce: u64, about: &[u8], bytes: &[u8]) -> [u8; TAG] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&nonce.to_le_bytes()).update(&(about.len() as u64).to_le_bytes()).update(about).update(bytes);
    let mut out = [0; TAG];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..TAG]);
    out
}
