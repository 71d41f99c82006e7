//! The histories of disks: sidecar files, and what is asked of them.
//!
//! ```text
//! HistorySpec ─► sidecar (which file, made or opened, damaged ones put aside) ─► tracking::History
//!                                                                                   │
//! FileHost (clock, times and marks of the image's files) ───────────────────────────┘
//! switching (another image takes the place of the top one)
//! marking (several disks at one instant, guests frozen) · contexts (NBD) · offline (files that nobody serves)
//! ```

pub(crate) mod audit;
mod bitmaps;
pub(crate) mod contexts;
pub(crate) mod host;
mod lot;
pub(crate) mod marking;
pub(crate) mod offline;
mod parked;
pub(crate) mod questions;
pub mod report;
mod sidecar;
mod spec;
mod switching;
pub(crate) mod views;

pub(crate) use audit::PointContent;
pub use audit::{AuditReport, AuditSpec};
pub use marking::{FreezeSpec, MarkSpec};
pub use offline::{HistorySource, refuse_freeze};
pub(crate) use parked::{forget_parked, may_be_parked, tell_of_parked};
pub use sidecar::sidecar_of;
pub(crate) use sidecar::{HistoryRequest, Kept, is_history, open};
pub use spec::{HistoryMode, HistorySpec};
pub(crate) use switching::PreparedTop;
pub use views::{ViewReport, ViewSpec};
