//! A disk that remembers what changed since any point, across any crash.
//!
//! ```text
//! Tracked<Disk>     decorator: marks granules before a write is issued; holds the guest for an instant
//!    │
//! History           the sidecar: counters, intents, points, and whether the image is still the one they speak of
//!    ├── journal    what may change from now on, durable before the write
//!    ├── table      per granule: the epoch of its last change, and of which kind
//!    └── points     named epochs
//! ```
//!
//! Time is counted in **epochs**. A point ends one: it remembers the number, and the next epoch begins. Each **granule**
//! (64 KiB unless chosen otherwise) has one counter, the epoch of its last change. "Changed since the point" is
//! "counter above the point's epoch", so any number of consumers share one log, and each remembers one number.
//!
//! What is on disk, and why it is right after a power cut between any two steps, is in `docs/history.md`.
//!
//! Invariant (never a miss): a write is issued to the image only when the change of its granules in the present epoch is
//! durable in the sidecar. A point is durable only when the image's content at its instant is.
//!
//! Invariant: nothing here knows files, formats, a clock or an executor. The sidecar is a `Storage`, the disk a `Disk`,
//! and the rest comes through [`Host`].

mod changes;
mod checkpoint;
mod damage;
mod epoch_marks;
mod fields;
mod heir;
mod history;
mod host;
mod id;
mod index;
mod intents;
mod journal_block;
mod kind;
mod layout;
mod others;
mod page_set;
mod points;
mod run_map;
mod session;
mod streams;
mod superblock;
mod table;
mod tracked;
mod trust;

pub use changes::{Change, ChangesQuery, Span};
pub use damage::{Damage, HistoryError};
pub use history::{CreateOptions, History, HistoryInfo};
pub use host::{Boot, Host, ImageFacts, ImageMark, OTHERS_CHANGE};
pub use id::Id;
pub use kind::ChangeKind;
pub use points::{Consistency, MAX_NAME, PendingRun, Point, Refusal};
pub use tracked::{Held, NewPoint, ParkingLot, Pause, Spawn, Still, Tracked, UncommittedPoint, View};
pub use trust::Distrust;
