//! What goes wrong in a repository, told so that a person can act on it.

use crate::store::StoreError;
use std::fmt;

/// Why an operation on a repository failed.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// The store refused or failed a call.
    #[error("{object}: the store failed to {verb} it; see whether the store can be reached and written, and repeat")]
    Store {
        /// Name of the object in the store.
        object: String,
        /// What was tried: "read", "put" and so on.
        verb: &'static str,
        /// What the store said.
        source: StoreError,
    },
    /// An object is there, and is not what was written.
    #[error("{0}")]
    Damaged(#[from] Damage),
    /// No key of the repository opens with what was given.
    #[error("none of the repository's {count} keys opens with this {what}; look which keys there are, and use another")]
    WrongKey {
        /// "key file" or "passphrase".
        what: &'static str,
        /// How many keys were tried.
        count: usize,
    },
    /// There is a repository already where one was to be made.
    #[error("{object} exists already, so there is a repository here; open it, or choose another place")]
    Exists {
        /// The object that was found.
        object: String,
    },
    /// There is no repository where one was to be opened.
    #[error("no repository here: {object} does not exist; check the place, or make a repository first")]
    NoRepository {
        /// The object that was missed.
        object: String,
    },
    /// No restore point answers to the name.
    #[error("no restore point {name}; list the points, and name one of them")]
    NoPoint {
        /// What was asked for.
        name: String,
    },
    /// The lease of a backup ended while it worked, so what it relied upon may be gone.
    #[error(
        "lease {lease} ended before the backup did (renewed too late, or a clock jumped), so no point was made; \
         start the backup again, what it stored is reused"
    )]
    LeaseLost {
        /// Name of the lease.
        lease: String,
    },
    /// Another prune works in the repository.
    #[error(
        "another prune has been working since {since_ms} ms (object {object}); wait for its end, or for its lease's"
    )]
    Busy {
        /// The other's lease.
        object: String,
        /// When it last renewed it, in milliseconds since 1970.
        since_ms: u64,
    },
    /// The caller asked for what cannot be.
    #[error("{0}")]
    Invalid(String),
    /// An earlier call of the session failed, so that its state is not known.
    #[error("this backup has failed already; start another, what was stored is reused")]
    Poisoned,
    /// The directory for the index cannot be used.
    #[error("index cache {path}: {source}; remove the directory or name another, it is rebuilt from the packs")]
    Cache {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl RepositoryError {
    pub(crate) fn store(object: &str, verb: &'static str) -> impl FnOnce(StoreError) -> RepositoryError {
        let object = object.to_owned();
        move |source| RepositoryError::Store { object, verb, source }
    }

    /// The damage, if that is what it is.
    #[must_use]
    pub fn damage(&self) -> Option<&Damage> {
        match self {
            RepositoryError::Damaged(damage) => Some(damage),
            _ => None,
        }
    }
}

/// An object that is not as it was written, or is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Name of the object.
    pub object: String,
    /// Where in it: a byte offset; 0 if the whole is meant.
    pub offset: u64,
    /// Which check failed.
    pub reason: DamageReason,
}

impl Damage {
    pub(crate) fn new(object: impl Into<String>, offset: u64, reason: DamageReason) -> Damage {
        Damage { object: object.into(), offset, reason }
    }
}

impl std::error::Error for Damage {}

impl fmt::Display for Damage {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.object)?;
        if self.offset > 0 {
            write!(out, " at byte {}", self.offset)?;
        }
        write!(out, ": {}; run verify to learn which points are hit, and restore others", self.reason.text())
    }
}

/// Which check found the damage. One for each check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DamageReason {
    /// The object does not exist.
    Missing,
    /// It ends before its last field.
    Short,
    /// It has bytes behind its last field.
    Long,
    /// It does not begin with the letters of its kind.
    Magic,
    /// Its version is not known here.
    Version,
    /// A checksum without a key does not fit.
    Checksum,
    /// The authentication tag does not fit: changed, or another repository's.
    Tag,
    /// It is authentic, and its content does not have the name by which it was asked for.
    Identity,
    /// A field has a value that cannot be.
    Field,
    /// A compressed frame does not decompress to what it must.
    Compression,
    /// The end of a pack is not a trailer: truncated.
    Trailer,
    /// A reference leads outside of its pack.
    Reference,
}

impl DamageReason {
    /// Every reason, for tests.
    pub const ALL: [DamageReason; 12] = [
        DamageReason::Missing,
        DamageReason::Short,
        DamageReason::Long,
        DamageReason::Magic,
        DamageReason::Version,
        DamageReason::Checksum,
        DamageReason::Tag,
        DamageReason::Identity,
        DamageReason::Field,
        DamageReason::Compression,
        DamageReason::Trailer,
        DamageReason::Reference,
    ];

    fn text(self) -> &'static str {
        match self {
            DamageReason::Missing => "expected an object, found none",
            DamageReason::Short => "expected more bytes, found its end",
            DamageReason::Long => "expected its end, found more bytes",
            DamageReason::Magic => "expected the letters of its kind at its beginning, found others",
            DamageReason::Version => "expected version 1, found another",
            DamageReason::Checksum => "expected a fitting checksum, found another",
            DamageReason::Tag => "expected a fitting authentication tag, found another",
            DamageReason::Identity => "expected the content that its name stands for, found another",
            DamageReason::Field => "expected a possible value, found an impossible one",
            DamageReason::Compression => "expected a frame that decompresses, found one that does not",
            DamageReason::Trailer => "expected the trailer of a pack at its end, found none (truncated?)",
            DamageReason::Reference => "expected a frame within the pack, found a reference outside of it",
        }
    }
}

pub(crate) type Result<T, E = RepositoryError> = std::result::Result<T, E>;
