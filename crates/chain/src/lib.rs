//! A disk made of layers: copy-on-write, parents, and the gate through which they are opened.
//!
//! [`Chain`] is the [`disk::Disk`] that a guest sees: layers, top first. It asks each layer where the guest's
//! bytes are and moves them itself. [`StackSpec`] says as plain data which images make up a disk, and
//! [`open`] is the one entry point that opens it, through an [`OpenGate`] that decides what may be opened.
//!
//! Invariant: a guest writes to the top layer alone. Nothing here knows a format's insides, and nothing
//! guesses a format from an image's bytes.

mod background;
mod chain;
mod copy_pass;
mod coverage;
mod guest;
mod hold;
mod infill;
mod locks;
mod map;
mod mirror;
mod open;
mod parent_name;
mod read;
mod requests;
mod resize;
mod spec;
mod stack;
mod switch;
mod write;
mod zero;

pub use chain::{Chain, LayerInfo};
pub use copy_pass::{Control, CopyPass, CopyStats};
pub use hold::HeldWrites;
pub use infill::Infill;
pub use mirror::Mirror;
pub use open::{Access, MAX_DEPTH, OpenGate, Reference, ReferenceKind, open};
pub use spec::{ParentSpec, StackSpec};
