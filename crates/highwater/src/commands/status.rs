//! `highwater status`, `highwater events` and `highwater metrics`: the daemon itself.

use super::{Outcome, target};
use crate::args::Global;
use crate::exit;
use crate::output;
use serde_json::json;

/// Which daemon answers, and how much it has to do.
pub(crate) async fn status(global: &Global) -> Outcome {
    let client = target::client(global)?;
    let version = client.version().await?;
    let disks = client.disks().await?.disks;
    let jobs = client.jobs().await?.jobs;
    let count = |state| jobs.iter().filter(|job| job.state == state).count();
    let (running, paused) = (count(api::JobState::Running), count(api::JobState::Paused));
    let open = disks.iter().filter(|disk| disk.state == api::DiskState::Open).count();
    if global.wants_json() {
        output::json(&json!({
            "daemon": version,
            "api": client.socket(),
            "disks": { "open": open, "not-open": disks.len() - open },
            "jobs": { "running": running, "paused": paused },
        }))?;
    } else {
        output::line(&format!(
            "highwater {} (process {}) on {}, {} I/O threads on {}",
            version.version,
            version.pid,
            client.socket().display(),
            version.io_threads,
            version.io_backend
        ))?;
        output::line(&format!("disks: {open} open, {} not open", disks.len() - open))?;
        let paused = if paused > 0 { format!(", {paused} paused") } else { String::new() };
        output::line(&format!("jobs: {running} running{paused}"))?;
    }
    Ok(exit::OK)
}

/// Prints each event as one line of JSON, until the daemon ends.
pub(crate) async fn events(global: &Global) -> Outcome {
    let mut events = target::client(global)?.events().await?;
    while let Some(event) = events.next().await? {
        output::json_line(&event)?;
    }
    Ok(exit::OK)
}

/// Prints the counters as they are.
pub(crate) async fn metrics(global: &Global) -> Outcome {
    let text = target::client(global)?.metrics().await?;
    if global.wants_json() {
        output::json(&json!({ "openmetrics": text }))?;
    } else {
        output::line(text.trim_end())?;
    }
    Ok(exit::OK)
}
