//! `highwater jobs …`, and work that the daemon does for another verb.

use super::{Outcome, target};
use crate::args::{Global, JobsVerb};
use crate::exit::{self, Failure};
use crate::output;
use crate::progress::{Bar, Interrupts, Look, speed};
use crate::size::{RateArg, human, human_seconds};
use anyhow::{Context, anyhow};
use api::{CheckReport, Client, CompareReport, JobKind, JobQuery, JobRate, JobState, JobStatus};
use engine::EngineError;
use serde::de::DeserializeOwned;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

/// Between two questions how far a job is.
const LOOK: Duration = Duration::from_millis(200);

pub(crate) async fn run(global: &Global, verb: JobsVerb) -> Outcome {
    let client = target::client(global)?;
    match verb {
        JobsVerb::List => {
            let list = client.jobs().await?;
            if global.wants_json() {
                output::json(&list)?;
            } else {
                print(&list.jobs)?;
            }
        }
        JobsVerb::Show { id } => show(global, client.job(id).await?)?,
        JobsVerb::Start { file, rate } => {
            let kind: JobKind = serde_json::from_str(&read(&file)?)
                .with_context(|| format!("{}: not a job's description", file.display()))?;
            let how = JobQuery { bytes_per_second: rate.and_then(|RateArg(rate)| rate) };
            show(global, client.start_job(&kind, &how).await?)?;
        }
        JobsVerb::Wait { id } => {
            let mut interrupts = Interrupts::new();
            let job = tokio::select! {
                job = wait(global, &client, id) => job?,
                () = interrupts.next() => {
                    return Err(Failure::from(anyhow!("job {id} goes on: only the waiting was stopped"))
                        .with_code(exit::INTERRUPTED));
                }
            };
            let code = exit_code(&job);
            show(global, job)?;
            return Ok(code);
        }
        JobsVerb::Pause { id } => show_if_asked(global, client.pause_job(id).await?)?,
        JobsVerb::Resume { id } => show_if_asked(global, client.resume_job(id).await?)?,
        JobsVerb::SetRate { id, rate: RateArg(bytes_per_second) } => {
            show_if_asked(global, client.set_job_rate(id, &JobRate { bytes_per_second }).await?)?;
        }
        JobsVerb::Cancel { id } => client.cancel_job(id).await?,
        JobsVerb::Forget { id } => client.forget_job(id).await?,
    }
    Ok(exit::OK)
}

/// What the command of the same name would have ended with.
fn exit_code(job: &JobStatus) -> u8 {
    match (job.state, &job.kind) {
        (JobState::Done, kind) => {
            let result = job.result.clone().unwrap_or_default();
            match kind {
                JobKind::Compare(_) => match serde_json::from_value(result) {
                    Ok(CompareReport { identical: true, .. }) => exit::OK,
                    Ok(_) => exit::DIFFERENT,
                    Err(_) => exit::COMPARE_FAILED,
                },
                JobKind::Check(_) => {
                    serde_json::from_value(result).map_or(exit::FAILED, |report: CheckReport| report.exit_code())
                }
                JobKind::Audit(_) if result["proved"] != true => exit::DIFFERENT,
                _ => exit::OK,
            }
        }
        (JobState::Cancelled, _) => exit::INTERRUPTED,
        (_, JobKind::Compare(_)) => exit::COMPARE_FAILED,
        _ => exit::FAILED,
    }
}

/// Waits until a job has ended.
async fn wait(global: &Global, client: &Client, id: u64) -> Result<JobStatus, Failure> {
    let mut bar = Bar::new(global.quiet);
    loop {
        let job = client.job(id).await?;
        if job.state.has_ended() {
            bar.clear();
            return Ok(job);
        }
        bar.show(&Look {
            done: job.done,
            total: job.total,
            unit: job.unit,
            rate: job.rate,
            seconds_left: job.seconds_left,
            paused: job.state == JobState::Paused,
        });
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits for a job that was started for a verb. The first Ctrl-C stops the job, the second one the waiting.
async fn follow(global: &Global, client: &Client, id: u64) -> Result<JobStatus, Failure> {
    let mut interrupts = Interrupts::new();
    let waiting = wait(global, client, id);
    tokio::pin!(waiting);
    loop {
        tokio::select! {
            job = &mut waiting => return job,
            () = interrupts.next() => {
                // An error means that it has ended just now.
                let _ = client.cancel_job(id).await;
            }
        }
    }
}

/// Has the daemon do work at so many bytes a second, and waits for what comes out. The first Ctrl-C stops the job, the
/// second one the waiting.
pub(crate) async fn perform<T: DeserializeOwned>(
    global: &Global,
    client: &Client,
    kind: &JobKind,
    bytes_per_second: Option<u64>,
) -> Result<T, Failure> {
    let id = client.start_job(kind, &JobQuery { bytes_per_second }).await?.id;
    let job = follow(global, client, id).await?;
    // Nobody else has its number.
    if let Err(error) = client.forget_job(id).await {
        tracing::debug!(job = id, %error, "forgetting a job");
    }
    match (job.state, job.result) {
        (JobState::Done, Some(result)) => {
            Ok(serde_json::from_value(result).with_context(|| format!("job {id}: its result was not understood"))?)
        }
        (JobState::Cancelled, _) => Err(EngineError::Cancelled.into()),
        (state, _) => Err(anyhow!(job.error.unwrap_or_else(|| format!("job {id} is {}", state.word()))).into()),
    }
}

fn read(file: &Path) -> anyhow::Result<String> {
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().take(1 << 20).read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(file).with_context(|| format!("{}: cannot be read", file.display()))
}

fn show(global: &Global, job: JobStatus) -> anyhow::Result<()> {
    if global.wants_json() { output::json(&job) } else { print(&[job]) }
}

/// Says nothing where the request is its own answer.
fn show_if_asked(global: &Global, job: JobStatus) -> anyhow::Result<()> {
    if global.wants_json() { output::json(&job) } else { Ok(()) }
}

fn print(jobs: &[JobStatus]) -> anyhow::Result<()> {
    let rows = jobs.iter().map(|job| {
        vec![
            job.id.to_string(),
            job.kind.word().to_owned(),
            job.state.word().to_owned(),
            format!("{}%", job.percent),
            job.rate.map_or_else(String::new, |rate| speed(job.unit, rate)),
            job.seconds_left.map_or_else(String::new, human_seconds),
            job.rate_limit.map_or_else(String::new, |limit| format!("{}/s", human(limit))),
            job.error.clone().unwrap_or_default(),
        ]
    });
    output::table(&["id", "job", "state", "done", "rate", "left", "limit", "error"], rows)
}
