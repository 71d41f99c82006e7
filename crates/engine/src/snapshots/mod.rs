//! Snapshots of disks: frozen layers with names.
//!
//! A disk keeps its file's name. What it held becomes a layer of its own, `disk@NAME.qcow2`, that nobody writes to any more,
//! and an empty overlay takes its place:
//!
//! ```text
//! disk.qcow2                     disk.qcow2  (overlay, written to)
//!                    create s1      │
//!                   ──────────►  disk@s1.qcow2  (frozen)
//! ```
//!
//! So whoever names the disk's file (a virtual machine's definition, a catalogue, a script) need not know of it. A raw disk
//! keeps its file, frozen under its own name, and goes on in `disk.qcow2` beside it: nothing else could tell a program
//! that the format is another one now.

mod clone;
pub(crate) mod exchange;
mod hold;
pub(crate) mod instant;
mod list;
mod overlay;
pub(crate) mod place;
pub(crate) mod rearranging;
pub(crate) mod revert;
mod spec;
pub(crate) mod take;

pub(crate) use clone::plan as plan_of_clone;
pub(crate) use list::named;
pub(crate) use overlay::{open_layer, parent_name};
pub(crate) use place::replace as replace_file;
pub use spec::{CloneSpec, SnapshotReport, SnapshotSpec};
pub(crate) use take::allocated;
