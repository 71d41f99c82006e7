//! The small objects (points, leases, tombstones, …): sealed whole, under their own name.

use crate::error::{Damage, DamageReason, RepositoryError, Result};
use crate::host::Host;
use crate::id::Id;
use crate::secret::Secret;
use crate::store::{Store, StoreErrorKind};

const MAGIC: &[u8; 8] = b"HWROBJ01";
/// The most that a small object may hold. A tombstone of 500,000 packs has 8 MB.
pub(crate) const MAX_OBJECT: usize = 64 << 20;

/// Seals `plain` for the object `name`.
pub(crate) fn seal(secret: &Secret, host: &dyn Host, name: &str, mut plain: Vec<u8>) -> Result<Vec<u8>> {
    if plain.len() > MAX_OBJECT {
        return Err(RepositoryError::Invalid(format!(
            "{name}: {} bytes, at most {MAX_OBJECT} can be kept",
            plain.len()
        )));
    }
    let salt = Id::random(host)?.0;
    let mut out = Vec::with_capacity(plain.len() + 64);
    out.extend(MAGIC);
    out.extend(1_u32.to_le_bytes());
    out.extend([u8::from(secret.encrypted()), 0, 0, 0]);
    out.extend(salt);
    let tag = secret.object_cipher(name, &salt).seal(0, &out, &mut plain);
    out.extend(plain);
    out.extend(tag);
    Ok(out)
}

/// Opens what `seal` made for this name.
pub(crate) fn open(secret: &Secret, name: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    let parse = || {
        let (head, body) = bytes.split_at_checked(32).ok_or(DamageReason::Short)?;
        if &head[..8] != MAGIC {
            return Err(DamageReason::Magic);
        }
        if head[8..12] != 1_u32.to_le_bytes() {
            return Err(DamageReason::Version);
        }
        let mut salt = [0; 16];
        salt.copy_from_slice(&head[16..]);
        let mut plain = body.to_vec();
        secret.object_cipher(name, &salt).open(0, head, &mut plain)?;
        Ok(plain)
    };
    parse().map_err(|reason| Damage::new(name, 0, reason).into())
}

/// Reads and opens an object; `None` if there is none.
pub(crate) fn read(store: &dyn Store, secret: &Secret, name: &str) -> Result<Option<Vec<u8>>> {
    match store.read_all(name, MAX_OBJECT as u64 + 64) {
        Ok(bytes) => open(secret, name, &bytes).map(Some),
        Err(e) if e.kind == StoreErrorKind::Missing => Ok(None),
        Err(e) if e.kind == StoreErrorKind::TooLarge => Err(Damage::new(name, 0, DamageReason::Long).into()),
        Err(e) => Err(RepositoryError::store(name, "read")(e)),
    }
}

/// `put_new` of an object whose name nobody else chooses. If it is there already with this very content, an earlier attempt whose
/// answer was lost has put it (a store that repeats calls by itself does that).
pub(crate) fn put_own(store: &dyn Store, name: &str, content: &[u8]) -> Result<()> {
    match store.put_new(name, content) {
        Err(e) if e.kind == StoreErrorKind::Exists => match store.read_all(name, content.len() as u64) {
            Ok(there) if there == content => Ok(()),
            _ => Err(RepositoryError::store(name, "put")(e)),
        },
        other => other.map_err(RepositoryError::store(name, "put")),
    }
}
