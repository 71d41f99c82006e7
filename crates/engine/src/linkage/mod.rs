//! Which content every image of a chain was made over, and whether it is still there.
//!
//! ```text
//! Stack::open ─► verify (link of each child against its parent, on the files that are open) ─► LinkFault, or go on
//!                  │                                                                              │
//!             fingerprint (size, time)   qcow2 header (content ids, link)                    chain verify | accept | rebase | repair
//!
//! IMAGE.identity (identity_file): the children of an image ─► an image with children is not opened for writing
//! ```
//!
//! `docs/linkage.md` has the formats, the table of what is judged how, and the crash arguments.

mod accept;
mod children;
mod content_hash;
mod fault;
mod fingerprint;
mod identity_file;
mod merging;
mod rebase;
mod report;
mod restamp;
mod show;
mod verify;

pub(crate) use accept::{bind_new_child, bind_opened, link_report};
pub(crate) use children::refuse_parent;
pub use children::{children, forget_child, register_child};
pub use fault::{FaultKind, LinkFault};
pub(crate) use fingerprint::now;
pub use identity_file::{
    ChildEntry, ContentHash, IdentityFile, IdentityRead, SnapshotConsistency, SnapshotFacts, identity_file_of, read,
    set_moved_to,
};
pub(crate) use identity_file::{change, change_blocking, remove_of_replaced};
pub use merging::{Absorbing, KnownContent, SameAs};
pub(crate) use merging::{
    absorbed_top, known_now, link_to_layer, note_absorbing, refuse_half_merged, shows_the_same, takes_place, took_place,
};
pub use rebase::RebaseSpec;
pub use report::{ChainReport, ChildReport, ChildState, HashReport, LayerReport, LinkReport, LinkState};
pub(crate) use show::report_of_stack;
pub(crate) use verify::{refuse_faults, verify_stack};

/// What is made of the linkage when an image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum LinkageUse {
    /// A faulty chain is refused, and so is writing to an image with children.
    #[default]
    Enforced,
    /// Faults are found and told; writing to an image with children is refused.
    Told,
    /// Neither: by who changes chains and knows what becomes of the children.
    Ignored,
}
