//! `highwater repo …`: repositories of backups, their keys, and their care.

use super::{Outcome, marks};
use crate::args::Global;
use crate::exit::{self, Failure};
use crate::output;
use crate::progress::Interrupts;
use crate::repository_args::{InitArgs, RepoKeyVerb, RepoVerb};
use crate::size::human;
use engine::EngineError;
use engine::backup::{
    self, CareReport, FindingReport, InitReport, InitSpec, KeyChangeReport, KeyReport, PruneReport, StatsReport,
};
use serde_json::json;

pub(crate) async fn run(global: &Global, verb: RepoVerb) -> Outcome {
    match verb {
        RepoVerb::Init(args) => init(global, &args).await,
        RepoVerb::Key(verb) => key(global, verb).await,
        RepoVerb::Check { of } => {
            let spec = of.spec()?;
            let report = blocking(move || backup::check(&spec)).await?;
            told(
                global,
                &report,
                &format!("whole: {}, {}", count(report.points, "point"), count(report.frames, "node")),
            )
        }
        RepoVerb::Verify { of, sample, threads } => {
            let spec = of.spec()?;
            let report = blocking(move || backup::verify(&spec, sample, threads.map(usize::from))).await?;
            told(global, &report, &verified(&report))
        }
        RepoVerb::Stats { of } => {
            let spec = of.spec()?;
            let report = blocking(move || backup::stats(&spec)).await?;
            if global.wants_json() {
                output::json(&report)?;
            } else {
                output::line(stats(&report).trim_end())?;
            }
            Ok(exit::OK)
        }
        RepoVerb::Prune { of, grace } => {
            let spec = of.spec()?;
            let report = to_its_end(blocking(move || backup::prune(&spec, grace))).await?;
            if global.wants_json() {
                output::json(&report)?;
            } else if !global.quiet {
                output::line(pruned(&report).trim_end())?;
            }
            Ok(exit::OK)
        }
    }
}

/// Does work of the engine that blocks, on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, Failure> {
    Ok(tokio::task::spawn_blocking(work).await??)
}

/// Waits for the end of a prune whatever happens: one that is ended in between keeps others out until its lease is given up, which takes days.
async fn to_its_end<T>(work: impl Future<Output = T>) -> T {
    let mut interrupts = Interrupts::new();
    tokio::pin!(work);
    loop {
        tokio::select! {
            result = &mut work => return result,
            () = interrupts.next() => eprintln!(
                "highwater: the prune goes on to its end; interrupted again it ends at once, which does no harm, but no other \
                 can begin within three days"
            ),
        }
    }
}

async fn init(global: &Global, args: &InitArgs) -> Outcome {
    let (directory, key) = args.place()?;
    let spec = InitSpec { directory, key, leaf_size: args.leaf_size, pack_size: args.pack_size };
    let report = blocking(move || backup::init(&spec)).await?;
    if global.wants_json() {
        output::json(&report)?;
    } else if !global.quiet {
        output::line(made(&report).trim_end())?;
    }
    Ok(exit::OK)
}

fn made(report: &InitReport) -> String {
    let mut text = format!("{}: repository {} is made\n", report.directory.display(), report.id);
    match &report.key_file {
        Some(file) => text.push_str(&format!(
            "its key is in {}\nsave it somewhere else, too: who loses it loses everything in the repository\n",
            file.display()
        )),
        None if report.encrypted => {
            text.push_str("it is opened by the passphrase: who loses that loses everything in the repository\n");
        }
        None => text.push_str("it is not encrypted: who can read its files can read the disks\n"),
    }
    text
}

async fn key(global: &Global, verb: RepoKeyVerb) -> Outcome {
    let report = match verb {
        RepoKeyVerb::List { of } => {
            let spec = of.spec()?;
            let keys = blocking(move || backup::keys(&spec)).await?;
            if global.wants_json() {
                output::json(&json!({ "keys": keys }))?;
            } else {
                output::table(&["id", "opened by", "made", "label"], keys.iter().map(key_row))?;
            }
            return Ok(exit::OK);
        }
        RepoKeyVerb::Add { of, new, label } => {
            let (spec, new) = (of.spec()?, new.spec()?);
            blocking(move || backup::add_key(&spec, &new, &label)).await?
        }
        RepoKeyVerb::Rotate { of, old, new, label } => {
            let (spec, new) = (of.spec()?, new.spec()?);
            blocking(move || backup::rotate_key(&spec, &old, &new, label.as_deref())).await?
        }
        RepoKeyVerb::Revoke { of, id } => {
            let spec = of.spec()?;
            blocking(move || backup::revoke_key(&spec, &id)).await?
        }
    };
    if global.wants_json() {
        output::json(&report)?;
    } else if !global.quiet {
        output::line(key_change(&report).trim_end())?;
    }
    Ok(exit::OK)
}

fn key_row(key: &KeyReport) -> Vec<String> {
    let opened_by = match (&key.damaged, key.opened_by) {
        (Some(reason), _) => format!("damaged: {reason}"),
        (None, opened_by) => opened_by.map_or_else(String::new, |kind| kind.word().to_owned()),
    };
    vec![key.id.clone(), opened_by, key.time.map_or_else(String::new, marks::date_of), key.label.clone()]
}

fn key_change(report: &KeyChangeReport) -> String {
    let mut text = String::new();
    if let Some(added) = &report.added {
        let word = added.opened_by.map_or("key", backup::KeyOpenedBy::word);
        text.push_str(&format!("key {} is added, a {word}\n", added.id));
    }
    if let Some(file) = &report.key_file {
        text.push_str(&format!("it is in {}; save it somewhere else, too\n", file.display()));
    }
    if let Some(id) = &report.revoked {
        text.push_str(&format!(
            "key {id} is revoked; who has opened the repository with it may have kept what is behind all keys\n"
        ));
    }
    if let Some(file) = &report.lapsed_file {
        text.push_str(&format!(
            "{} opens the repository no longer; give --key-file or --passphrase-file from now on, or put a key file in its place\n",
            file.display()
        ));
    }
    text
}

/// Prints what was found, and gives the exit code for it.
fn told(global: &Global, report: &CareReport, sound: &str) -> Outcome {
    if global.wants_json() {
        output::json(report)?;
    } else if !report.sound {
        output::table(&["point", "disk", "start", "length", "reason"], report.findings.iter().map(finding_row))?;
        let more = match report.more_findings {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        output::line(&format!(
            "{}{more}: what is not listed can be restored; restore what is from another copy, or back up anew with --full",
            count(report.findings.len() as u64, "finding")
        ))?;
    } else if !global.quiet {
        output::line(sound)?;
    }
    Ok(if report.sound { exit::OK } else { exit::DAMAGED })
}

fn finding_row(finding: &FindingReport) -> Vec<String> {
    let dash = || "-".to_owned();
    let (start, length) = match finding.length {
        0 => (dash(), dash()),
        length => (format!("{:#x}", finding.start), format!("{length:#x}")),
    };
    let point = finding.point.clone().unwrap_or_else(dash);
    vec![point, finding.disk.clone().unwrap_or_else(dash), start, length, finding.reason.clone()]
}

fn verified(report: &CareReport) -> String {
    let part = match report.one_in {
        None | Some(1) => String::new(),
        Some(n) => format!(" (one in {n})"),
    };
    format!("proven: {}, {} in {} leaves{part}", count(report.points, "point"), human(report.bytes), report.frames)
}

/// A number of things.
fn count(n: u64, one: &str) -> String {
    format!("{n} {one}{}", if n == 1 { "" } else { "s" })
}

fn stats(report: &StatsReport) -> String {
    let encrypted = if report.encrypted { "yes" } else { "no" };
    let mut lines = vec![
        ("repository", report.id.clone()),
        ("encrypted", encrypted.to_owned()),
        ("leaf size", human(report.leaf_size)),
        ("pack size", human(report.pack_size)),
        ("points", report.points.to_string()),
        ("disks in them", format!("{} ({} bytes)", human(report.disk_bytes), report.disk_bytes)),
        (
            "stored",
            format!("{} ({} bytes) in {}", human(report.pack_bytes), report.pack_bytes, count(report.packs, "pack")),
        ),
    ];
    if report.pack_bytes > 0 && report.disk_bytes > 0 {
        lines.push(("ratio", format!("{:.1}", report.disk_bytes as f64 / report.pack_bytes as f64)));
    }
    lines.push(("packs to be deleted", report.tombstoned_packs.to_string()));
    lines.push(("sessions at work", report.sessions.to_string()));
    lines.into_iter().map(|(name, value)| format!("{name}: {value}\n")).collect()
}

fn pruned(report: &PruneReport) -> String {
    let mut text = format!("deleted: {}, {}\n", count(report.points, "forgotten point"), count(report.packs, "pack"));
    if report.tombstoned > 0 {
        text.push_str(&format!(
            "no longer needed: {}, deleted by a prune when the grace is over\n",
            count(report.tombstoned, "pack")
        ));
    }
    if report.repacked > 0 {
        text.push_str(&format!("packed anew, as little was needed of it: {}\n", count(report.repacked, "pack")));
    }
    for session in &report.expired_sessions {
        text.push_str(&format!("session {session} did not go on for days, and is taken for dead\n"));
    }
    for session in &report.waiting_for {
        text.push_str(&format!("session {session} is at work, and packs wait for its end\n"));
    }
    text
}
