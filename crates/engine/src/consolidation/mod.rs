//! Consolidation: one layer of a disk is merged into its neighbour, while the guest writes on.
//!
//! ```text
//!  top                 into the parent: what the layer holds goes down, and the parent takes its place
//!  layer  ┐
//!  parent ┘            into the child: what the layer below holds comes up, and the layer below is not needed any more
//! ```
//!
//! Either way as many bytes move as the layer holds that goes away, in one pass: writes of the guest to what was moved already
//! go to both sides. `docs/linkage.md` says how the images that stand on either are not alarmed.

mod into_child;
mod into_frozen_child;
mod into_parent;
mod offline;
mod plan;
mod reopened;
mod spec;

pub(crate) use plan::Consolidation;
pub use spec::{ConsolidateReport, ConsolidateSpec, Neighbour};
