//! The catalogue of disks, their open stacks, their exports, and work on image files.
//!
//! ```text
//! Engine ── catalogue (JSON file)      what to open when the daemon starts
//!    │
//!    ├── disks ── home I/O thread ── Stack: Chain of layers
//!    ├── exports ── NBD servers by address
//!    └── jobs ── Workshop: create, convert, compare, check, measure, resize
//! ```
//!
//! Everything that touches an image runs on an I/O thread; the methods here may be awaited on any executor.
//!
//! Invariant: tokio does not appear here.

pub mod backup;
mod catalogue;
pub mod consolidation;
mod durable_file;
mod engine;
mod error;
mod exports;
pub mod format_policy;
pub mod guest_agent;
pub mod history;
mod home;
pub mod images;
mod job_handle;
mod job_kind;
mod job_position;
mod job_records;
mod job_status;
mod jobs;
pub mod linkage;
mod metrics;
pub mod promotion;
pub mod snapshots;
mod socket_access;
mod spec;
mod status;
mod utc;

pub use catalogue::Catalogue;
pub use engine::{Engine, EngineConfig};
pub use error::{EngineError, ErrorClass, FileKind, chain_text};
pub use history::{HistoryMode, HistorySpec};
pub use job_handle::JobHandle;
pub use job_kind::JobKind;
pub use job_status::{JobState, JobStatus};
pub use jobs::{JobWork, Jobs};
pub use socket_access::SocketAccess;
pub use spec::{CacheMode, DiskSpec, ExportSpec, Format, ImageSpec, TlsSpec, name_of_file, validate_name};
pub use status::{DiskState, DiskStatus, Event, ExportStatus};
pub use utc::utc_text;

/// What I/O threads run on.
pub use dataplane::Backend;
