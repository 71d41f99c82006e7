//! Keys: objects that wrap the master secret, each opened by a key file's text or by a passphrase.
//!
//! Crash: a key is one object, put whole by `put_new`. Rotation puts the new one before the old one goes; a crash between
//! leaves both, and either opens. The last key is never removed.

use crate::error::{Damage, DamageReason, RepositoryError, Result};
use crate::fields::{Fields, put_bytes};
use crate::host::Host;
use crate::id::Id;
use crate::sealed::put_own;
use crate::secret::{Cipher, Secret};
use crate::store::Store;
use argon2::{Algorithm, Argon2, Params, Version};

const MAGIC: &[u8; 8] = b"HWRKEY01";
const FILE_TEXT: &str = "highwater-key-1:";
/// Bounds of what an object may make us spend on a passphrase: 1 GiB, 16 passes.
const MAX_MEMORY_KIB: u32 = 1 << 20;
const MAX_PASSES: u32 = 16;
const MAX_LABEL: usize = 200;

/// What a person opens a repository with.
#[derive(Clone)]
pub enum Unlock {
    /// The text of a key file: `highwater-key-1:` and 64 hexadecimal digits.
    KeyFile(String),
    /// A passphrase, as it was typed.
    Passphrase(String),
    /// Nothing: the repository is not encrypted.
    Open,
}

/// How a passphrase is stretched (argon2id).
#[derive(Debug, Clone, Copy)]
pub struct Stretch {
    /// Memory in KiB, 8 to 1,048,576.
    pub memory_kib: u32,
    /// Passes over it, 1 to 16.
    pub passes: u32,
}

impl Default for Stretch {
    /// 64 MiB, 3 passes: about a fifth of a second.
    fn default() -> Stretch {
        Stretch { memory_kib: 64 << 10, passes: 3 }
    }
}

/// What kind of thing opens a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// Nothing is needed: a repository without encryption.
    Open,
    /// A key file.
    KeyFile,
    /// A passphrase.
    Passphrase,
}

/// A key, as `key list` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyInfo {
    /// Its name.
    pub id: Id,
    /// What opens it.
    pub kind: KeyKind,
    /// What people call it.
    pub label: String,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
}

/// Draws the text of a new key file.
pub fn new_key_file(host: &dyn Host) -> Result<String> {
    let (a, b) = (Id::random(host)?, Id::random(host)?);
    Ok(format!("{FILE_TEXT}{a}{b}\n"))
}

struct Key {
    info: KeyInfo,
    stretch: Stretch,
    salt: [u8; 16],
    wrapped: Vec<u8>,
    /// Everything before the wrapped secret: sealed with it.
    head: Vec<u8>,
}

fn name_of(id: Id) -> String {
    format!("keys/{id}")
}

impl Unlock {
    fn kind(&self) -> KeyKind {
        match self {
            Unlock::KeyFile(_) => KeyKind::KeyFile,
            Unlock::Passphrase(_) => KeyKind::Passphrase,
            Unlock::Open => KeyKind::Open,
        }
    }

    /// The key that wraps, from what the person has.
    fn wrapping(&self, salt: &[u8; 16], stretch: Stretch) -> Result<[u8; 32]> {
        match self {
            Unlock::Open => Ok(blake3::derive_key("highwater repository v1 no encryption", salt)),
            Unlock::KeyFile(text) => {
                let digits = text.trim().strip_prefix(FILE_TEXT).filter(|d| d.len() == 64 && d.is_ascii());
                let halves = digits.and_then(|d| Some((Id::parse(&d[..32])?, Id::parse(&d[32..])?)));
                let (a, b) = halves.ok_or_else(|| {
                    RepositoryError::Invalid(format!(
                        "the key file does not hold {FILE_TEXT} and 64 hexadecimal digits; give the file that was saved when the key was made"
                    ))
                })?;
                let mut hasher = blake3::Hasher::new_derive_key("highwater repository v1 key file");
                hasher.update(&a.0).update(&b.0).update(salt);
                Ok(*hasher.finalize().as_bytes())
            }
            Unlock::Passphrase(text) => {
                let mut key = [0; 32];
                Params::new(stretch.memory_kib, stretch.passes, 1, Some(32))
                    .and_then(|params| {
                        Argon2::new(Algorithm::Argon2id, Version::V0x13, params).hash_password_into(
                            text.as_bytes(),
                            salt,
                            &mut key,
                        )
                    })
                    .map_err(|e| RepositoryError::Invalid(format!("the passphrase cannot be used: {e}")))?;
                Ok(key)
            }
        }
    }
}

fn parse(id: Id, bytes: &[u8]) -> Result<Key> {
    let parse = || {
        let (content, sum) = bytes.split_at_checked(bytes.len().saturating_sub(16)).ok_or(DamageReason::Short)?;
        if !content.starts_with(MAGIC) {
            return Err(DamageReason::Magic);
        }
        // First of all whether it is what was written, so that a wrong key can be told from damage.
        if sum != &blake3::hash(content).as_bytes()[..16] {
            return Err(DamageReason::Checksum);
        }
        let mut fields = Fields::of(content);
        fields.take(8)?;
        if fields.u32()? != 1 {
            return Err(DamageReason::Version);
        }
        let kind = match fields.u32()? {
            0 => KeyKind::Open,
            1 => KeyKind::KeyFile,
            2 => KeyKind::Passphrase,
            _ => return Err(DamageReason::Field),
        };
        if fields.array()? != id.0 {
            return Err(DamageReason::Identity);
        }
        let created_ms = fields.u64()?;
        let stretch = Stretch { memory_kib: fields.u32()?, passes: fields.u32()? };
        if stretch.memory_kib > MAX_MEMORY_KIB || stretch.passes > MAX_PASSES {
            return Err(DamageReason::Field);
        }
        let salt = fields.array()?;
        let label = fields.text(MAX_LABEL)?;
        let wrapped = fields.take(48)?.to_vec();
        fields.end()?;
        let head = content[..content.len() - 48].to_vec();
        Ok(Key { info: KeyInfo { id, kind, label, created_ms }, stretch, salt, wrapped, head })
    };
    parse().map_err(|reason| Damage::new(name_of(id), 0, reason).into())
}

fn read_all(store: &dyn Store) -> Result<Vec<Result<Key>>> {
    let mut ids = Vec::new();
    store
        .list("keys/", &mut |object| ids.extend(object.name.strip_prefix("keys/").and_then(Id::parse)))
        .map_err(RepositoryError::store("keys/", "list"))?;
    ids.sort();
    let read = |id: Id| {
        let name = name_of(id);
        parse(id, &store.read_all(&name, 4096).map_err(RepositoryError::store(&name, "read"))?)
    };
    Ok(ids.into_iter().map(read).collect())
}

/// Every key that can be read; damaged ones are errors beside them.
pub(crate) fn list(store: &dyn Store) -> Result<Vec<Result<KeyInfo>>> {
    Ok(read_all(store)?.into_iter().map(|key| key.map(|k| k.info)).collect())
}

/// Unwraps the master secret with the first key that opens, and whose secret is this repository's.
pub(crate) fn unlock(store: &dyn Store, with: &Unlock, is_ours: impl Fn(&[u8; 32]) -> bool) -> Result<[u8; 32]> {
    let (mut tried, mut damage) = (0, None);
    for key in read_all(store)? {
        let key = match key {
            Ok(key) => key,
            Err(e) => {
                damage.get_or_insert(e);
                continue;
            }
        };
        if key.info.kind != with.kind() {
            continue;
        }
        tried += 1;
        let mut wrapped = key.wrapped;
        if Cipher::aes(&with.wrapping(&key.salt, key.stretch)?).open(0, &key.head, &mut wrapped).is_ok() {
            let master = wrapped.try_into().map_err(|_| Damage::new(name_of(key.info.id), 0, DamageReason::Field))?;
            if is_ours(&master) {
                return Ok(master);
            }
            // A key of an `init` that did not get to its end; or `config` itself has been changed.
            damage.get_or_insert(Damage::new("config", 0, DamageReason::Tag).into());
        }
    }
    let what = match with.kind() {
        KeyKind::Open => "absence of a key (it is encrypted)",
        KeyKind::KeyFile => "key file",
        KeyKind::Passphrase => "passphrase",
    };
    Err(damage.unwrap_or(RepositoryError::WrongKey { what, count: tried }))
}

/// Wraps the master secret once more.
pub(crate) fn add(
    store: &dyn Store,
    host: &dyn Host,
    secret: &Secret,
    with: &Unlock,
    stretch: Stretch,
    label: &str,
) -> Result<KeyInfo> {
    if secret.encrypted() != (with.kind() != KeyKind::Open) {
        return Err(RepositoryError::Invalid(
            "whether a repository is encrypted is decided when it is made; make another one, and back up into it"
                .to_owned(),
        ));
    }
    if label.len() > MAX_LABEL {
        return Err(RepositoryError::Invalid(format!(
            "a key's label has at most {MAX_LABEL} bytes, found {}",
            label.len()
        )));
    }
    let (id, salt) = (Id::random(host)?, Id::random(host)?.0);
    let info = KeyInfo { id, kind: with.kind(), label: label.to_owned(), created_ms: host.now_ms() };
    let mut content = MAGIC.to_vec();
    content.extend(1_u32.to_le_bytes());
    content.extend((info.kind as u32).to_le_bytes());
    content.extend(id.0);
    content.extend(info.created_ms.to_le_bytes());
    content.extend(stretch.memory_kib.clamp(8, MAX_MEMORY_KIB).to_le_bytes());
    content.extend(stretch.passes.clamp(1, MAX_PASSES).to_le_bytes());
    content.extend(salt);
    put_bytes(&mut content, label.as_bytes());
    let stretch = Stretch {
        memory_kib: stretch.memory_kib.clamp(8, MAX_MEMORY_KIB),
        passes: stretch.passes.clamp(1, MAX_PASSES),
    };
    let mut wrapped = *secret.master();
    // The salt is new, so the wrapping key seals this once.
    let tag = Cipher::aes(&with.wrapping(&salt, stretch)?).seal(0, &content, &mut wrapped);
    content.extend(wrapped);
    content.extend(tag);
    let sum = blake3::hash(&content);
    content.extend(&sum.as_bytes()[..16]);
    put_own(store, &name_of(id), &content)?;
    Ok(info)
}

/// Removes a key; refused for the last one that is whole.
pub(crate) fn revoke(store: &dyn Store, id: Id) -> Result<()> {
    let whole: Vec<Id> = read_all(store)?.into_iter().filter_map(|key| key.ok().map(|k| k.info.id)).collect();
    if whole.iter().all(|other| *other == id) {
        return Err(RepositoryError::Invalid(format!(
            "key {id} is the last one that is whole; add another before it goes"
        )));
    }
    let name = name_of(id);
    store.delete(&name).map_err(RepositoryError::store(&name, "delete"))
}
