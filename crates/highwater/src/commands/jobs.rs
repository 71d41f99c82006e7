//! `highwater job …`, and work that the daemon does for another verb.

use super::{Outcome, target};
use crate::args::{Global, JobVerb};
use crate::exit::{self, Failure};
use crate::output;
use crate::progress::{Bar, Interrupts};
use anyhow::{Context, anyhow};
use api::{Client, JobKind, JobState, JobStatus};
use engine::EngineError;
use serde::de::DeserializeOwned;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

/// Between two questions how far a job is.
const LOOK: Duration = Duration::from_millis(200);

pub(crate) async fn run(global: &Global, verb: JobVerb) -> Outcome {
    let client = target::client(global)?;
    match verb {
        JobVerb::List => {
            let list = client.jobs().await?;
            if global.wants_json() {
                output::json(&list)?;
            } else {
                print(&list.jobs)?;
            }
        }
        JobVerb::Show { id } => show(global, client.job(id).await?)?,
        JobVerb::Start { file } => {
            let kind: JobKind = serde_json::from_str(&read(&file)?)
                .with_context(|| format!("{}: not a job's description", file.display()))?;
            show(global, client.start_job(&kind).await?)?;
        }
        JobVerb::Wait { id } => {
            let mut interrupts = Interrupts::new();
            let job = tokio::select! {
                job = wait(global, &client, id) => job?,
                () = interrupts.next() => {
                    return Err(Failure::from(anyhow!("job {id} goes on: only the waiting was stopped"))
                        .with_code(exit::INTERRUPTED));
                }
            };
            let done = job.state == JobState::Done;
            show(global, job)?;
            return Ok(if done { exit::OK } else { exit::FAILED });
        }
        JobVerb::Cancel { id } => client.cancel_job(id).await?,
        JobVerb::Forget { id } => client.forget_job(id).await?,
    }
    Ok(exit::OK)
}

/// Waits until a job has ended.
async fn wait(global: &Global, client: &Client, id: u64) -> Result<JobStatus, Failure> {
    let mut bar = Bar::new(global.quiet);
    loop {
        let job = client.job(id).await?;
        if job.state != JobState::Running {
            bar.clear();
            return Ok(job);
        }
        bar.show(job.done, job.total, job.unit);
        tokio::time::sleep(LOOK).await;
    }
}

/// Has the daemon do work, and waits for what comes out. The first Ctrl-C stops the job, the second one the waiting.
pub(crate) async fn perform<T: DeserializeOwned>(
    global: &Global,
    client: &Client,
    kind: &JobKind,
) -> Result<T, Failure> {
    let id = client.start_job(kind).await?.id;
    let mut interrupts = Interrupts::new();
    let waiting = wait(global, client, id);
    tokio::pin!(waiting);
    let job = loop {
        tokio::select! {
            job = &mut waiting => break job?,
            () = interrupts.next() => {
                // An error means that it has ended just now.
                let _ = client.cancel_job(id).await;
            }
        }
    };
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

fn print(jobs: &[JobStatus]) -> anyhow::Result<()> {
    let rows = jobs.iter().map(|job| {
        vec![
            job.id.to_string(),
            job.kind.word().to_owned(),
            job.state.word().to_owned(),
            format!("{}%", job.percent),
            job.error.clone().unwrap_or_default(),
        ]
    });
    output::table(&["id", "job", "state", "done", "error"], rows)
}
