//! The backup repository: restore points of virtual disks, for ever incremental, in any place that keeps objects.
//!
//! ```text
//! Backup ──► leaves ─► packs ◄── nodes of trees ◄── points          DiskReader, differences
//!              │         ▲                            │
//!            Index       └── Store: a directory, S3 ──┘              check, verify, forget, prune
//! ```
//! A **leaf** is a block of a disk, named by the keyed hash of its content. Leaves stand as frames in **packs**, which are never changed. A
//! **point** names, for each disk, the root of a tree of nodes with 256 children; a point shares all that has not changed with its predecessor, so every
//! point is a full one and costs its changes.
//!
//! The format, why every update survives a crash, and why a prune takes nothing that is needed although it stops nobody: `docs/repository.md`.
//!
//! Invariant: what makes a point exist is one `put_new`, after everything that it names is durable.
//!
//! Invariant: nothing here knows disks, formats, an executor or a network. Calls block; whoever has an executor calls from a thread of its own. The
//! store, the clock and the randomness are parameters ([`Store`], [`Host`]).
//!
//! Invariant: bytes from a store are proven before they are used, and whatever they are, nothing panics or takes memory without a bound.

mod backup;
mod care;
mod error;
mod fields;
mod forget;
mod host;
mod id;
mod index;
mod keys;
mod lease;
mod local_store;
mod node;
mod pack;
mod packer;
mod point;
mod prune;
mod reader;
mod records;
mod repository;
mod sealed;
mod secret;
mod store;
mod tree;
mod tree_builder;
pub use backup::{Backup, BackupOptions, DiskPlan, PointFacts};
pub use care::{Finding, Report, Stats, VerifyOptions};
pub use error::{Damage, DamageReason, RepositoryError};
pub use forget::{Kept, Policy, keep};
pub use host::{Host, SystemHost};
pub use id::{ContentId, Id};
pub use keys::{KeyInfo, KeyKind, Stretch, Unlock, new_key_file};
pub use local_store::LocalStore;
pub use packer::Counts;
pub use point::{Consistency, MAX_DISK, Made, Point, PointDisk};
pub use prune::{PruneOptions, Pruned};
pub use reader::{DiskReader, Extent};
pub use repository::{Repository, Settings};
pub use store::{Object, Store, StoreError, StoreErrorKind, check_name};
