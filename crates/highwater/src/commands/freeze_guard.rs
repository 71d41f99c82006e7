//! `highwater freeze-guard`: the process that thaws a guest whatever becomes of its parent (`engine::guest_agent`).

use super::Outcome;
use crate::args::FreezeGuardArgs;
use crate::exit;
use engine::guest_agent::{FreezeLimits, run_guard};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Works without waiting for anything of tokio's: it is the only task.
pub(crate) fn run(args: &FreezeGuardArgs) -> Outcome {
    // A session of its own: Ctrl-C and the end of a terminal are for others. Fails for the leader of a group, which
    // the deafness below protects all the same.
    let _ = rustix::process::setsid();
    // A signal with a listener ends no process, though nobody looks what the listener hears.
    let _deaf = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
        SignalKind::alarm(),
        SignalKind::pipe(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
    ]
    .map(signal)
    .into_iter()
    .collect::<Result<Vec<_>, _>>()?;
    let millis = |limit: u32| Duration::from_millis(limit.into());
    let limits = FreezeLimits {
        connect: millis(args.connect_limit),
        freeze: millis(args.freeze_limit),
        frozen: millis(args.limit),
    };
    match run_guard(&args.socket, limits, std::io::stdin(), std::io::stdout()) {
        true => Ok(exit::OK),
        false => Ok(exit::FAILED),
    }
}
