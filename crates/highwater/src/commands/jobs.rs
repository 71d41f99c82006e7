//! `highwater job …`.

use super::{Outcome, target};
use crate::args::{Global, JobVerb};
use crate::exit;
use crate::output;
use anyhow::Context;
use api::{JobKind, JobStatus};
use std::io::Read;
use std::path::Path;

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
        JobVerb::Cancel { id } => client.cancel_job(id).await?,
    }
    Ok(exit::OK)
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
    let word = |value: serde_json::Value, field: Option<&str>| {
        let value = field.map_or(&value, |field| &value[field]).clone();
        value.as_str().map_or_else(String::new, str::to_owned)
    };
    let mut rows = Vec::new();
    for job in jobs {
        rows.push(vec![
            job.id.to_string(),
            word(serde_json::to_value(&job.kind)?, Some("job")),
            word(serde_json::to_value(job.state)?, None),
            format!("{}%", job.percent),
            job.error.clone().unwrap_or_default(),
        ]);
    }
    output::table(&["id", "job", "state", "done", "error"], rows)
}
