//! Giving a disk another image that holds all of it, in another place or format if wished, while its guest writes on: a
//! linked clone becomes a full one, a disk moves.
//!
//! ```text
//! disk ─► [overlay, parent, …]          [overlay, parent, …] ─┐ mirror       [target]
//!                                │ copy pass ▼                │
//!                            target  ◄────────────────────────┘   one step: the disk is the target
//! ```
//!
//! One pass over the disk: what the guest writes where it was copied already goes to both, and elsewhere to the disk alone. Then
//! all is equal, whatever the guest's pace, and one step makes the target the disk.

mod offline;
mod pace;
mod run;
mod spec;

pub(crate) use offline::{note_at, take_history_along};
pub(crate) use pace::{JobControl, TRIES, microseconds};
pub(crate) use run::{Enter, Promotion};
pub use spec::{PromoteReport, PromoteSpec};
