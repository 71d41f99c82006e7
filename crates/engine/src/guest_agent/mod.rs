//! Freezing a guest's file systems through the QEMU guest agent, so that a point in time of its disks is consistent
//! for applications.
//!
//! ```text
//! GuestAgent::freeze ─► guard process ─► unix socket of QEMU ─► agent in the guest
//!    Frozen ── pipe ──►    │  (`guard`)      (`conversation`)
//!                          └─ thaws when it is asked to, when the pipe closes, or when the limit strikes
//! ```
//!
//! A guest that stays frozen is worse than any backup that fails, and whoever freezes may die at any moment. So a
//! process of its own does it, which has nothing else to do: it thaws whatever becomes of its parent, and is deaf to
//! all signals that a process can be deaf to. When it is killed, its parent thaws. Only SIGKILL to both, or the end of
//! the host, prevents it.
//!
//! Invariant: no wait is without a bound. Only one client reaches the agent at a time, and one that is not the first
//! connects without ever being answered.

mod bounded;
mod conversation;
mod guard;
mod guarded;
mod report;

pub use guard::run_guard;
pub use guarded::{Frozen, GuestAgent, Thawed};

use std::time::Duration;

/// Bounds of a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreezeLimits {
    /// To reach the agent and have a first answer.
    pub connect: Duration,
    /// For the agent to freeze all file systems, which writes out what they hold in memory. Then they are thawed.
    pub freeze: Duration,
    /// For the guest to be frozen, counted from the agent's answer. Then it is thawed, done or not.
    pub frozen: Duration,
}

impl Default for FreezeLimits {
    fn default() -> Self {
        Self { connect: Duration::from_secs(5), freeze: Duration::from_secs(30), frozen: Duration::from_secs(10) }
    }
}
