//! `highwater changes`.

use super::target::{self, Target};
use super::{Outcome, marks};
use crate::args::{ChangesArgs, Global};
use crate::change_picture::chart::{Chart, chart, colour_wanted, terminal_size};
use crate::change_picture::{Change, ChangeKind, png_file};
use crate::exit::{self, Failure};
use crate::output;
use crate::size::human;
use anyhow::{Context, anyhow};
use api::{ChangedRange, ChangesQuery, ChangesReport, Client, KindOfChange};
use disk::ByteRange;
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::Path;

/// Bytes by the kind of their change.
#[derive(Debug, Serialize)]
struct Summary {
    data: u64,
    zero: u64,
    discarded: u64,
    changed: u64,
}

impl Summary {
    fn of(report: &ChangesReport) -> Self {
        let [data, zero, discarded] =
            [KindOfChange::Data, KindOfChange::Zero, KindOfChange::Discarded].map(|kind| report.bytes(kind));
        Self { data, zero, discarded, changed: data + zero + discarded }
    }
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Printed<'a> {
    disk: &'a str,
    since: &'a api::MarkReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    until: Option<&'a api::MarkReport>,
    lineage: &'a str,
    size: u64,
    granule: u64,
    summary: Summary,
    #[serde(skip_serializing_if = "Option::is_none")]
    ranges: Option<&'a [ChangedRange]>,
}

pub(crate) async fn run(global: &Global, args: ChangesArgs) -> Outcome {
    let report = match target::find(global, &args.disk).await? {
        Target::Disk(client, name) => {
            target::refuse_file_options(&name, &target::history_options(&args.of))?;
            of_daemon(&client, &name, &args.since, args.until.as_deref()).await?
        }
        Target::File(file) => {
            let source = target::history_source(&file, &args.of)?;
            target::workshop()?.changes(source, args.since.clone(), args.until.clone()).await?
        }
    };
    if let Some(picture) = &args.picture {
        draw(picture, &report)?;
    }
    if global.wants_json() {
        output::json(&Printed {
            disk: &report.disk,
            since: &report.since,
            until: report.until.as_ref(),
            lineage: &report.lineage,
            size: report.size,
            granule: report.granule,
            summary: Summary::of(&report),
            ranges: (!args.summary).then_some(&*report.ranges),
        })?;
    } else if args.chart {
        let (width, height) = terminal_size();
        let colour = colour_wanted(std::io::stdout().is_terminal(), std::env::var_os("NO_COLOR").as_deref());
        let text = chart(report.size, &changes(&report), Chart { width, height, colour });
        output::line(text.trim_end())?;
    } else if args.summary {
        output::line(summary(&report).trim_end())?;
    } else if let Some(picture) = &args.picture {
        if !global.quiet {
            output::line(&format!("{}: where {} changed since {}", picture.display(), report.disk, report.since.name))?;
        }
    } else {
        output::table(
            &["start", "length", "kind"],
            report.ranges.iter().map(|range| {
                vec![format!("{:#x}", range.start), format!("{:#x}", range.length), range.kind.word().to_owned()]
            }),
        )?;
    }
    Ok(exit::OK)
}

/// All of what changed on a daemon's disk, which tells it in parts.
async fn of_daemon(client: &Client, disk: &str, since: &str, until: Option<&str>) -> Result<ChangesReport, Failure> {
    let mut query =
        ChangesQuery { since: since.to_owned(), until: until.map(str::to_owned), ..ChangesQuery::default() };
    let mut whole = client.changes(disk, &query).await?;
    while let Some(start) = whole.next {
        query.start = start;
        let part = client.changes(disk, &query).await?;
        let same = |a: &api::MarkReport, b: &api::MarkReport| a.id == b.id;
        let same_until = match (&whole.until, &part.until) {
            (Some(a), Some(b)) => same(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        if whole.lineage != part.lineage || !same(&whole.since, &part.since) || !same_until {
            return Err(anyhow!("{disk}: a mark was replaced by another of its name meanwhile; ask again").into());
        }
        whole.size = part.size;
        whole.next = part.next;
        for range in part.ranges {
            match whole.ranges.last_mut() {
                Some(last) if last.kind == range.kind && last.start + last.length == range.start => {
                    last.length += range.length;
                }
                _ => whole.ranges.push(range),
            }
        }
    }
    Ok(whole)
}

fn changes(report: &ChangesReport) -> Vec<Change> {
    let of = |range: &ChangedRange| Change {
        range: ByteRange::new(range.start, range.length),
        kind: ChangeKind::of(range.kind),
    };
    report.ranges.iter().map(of).collect()
}

fn draw(path: &Path, report: &ChangesReport) -> Result<(), Failure> {
    let named = || format!("{}: the picture cannot be written", path.display());
    let mut out = BufWriter::new(File::create(path).with_context(named)?);
    png_file::write_png(&mut out, report.size, &changes(report)).with_context(named)?;
    out.flush().with_context(named)?;
    Ok(())
}

fn summary(report: &ChangesReport) -> String {
    let Summary { data, zero, discarded, changed } = Summary::of(report);
    let until = report.until.as_ref().map_or_else(String::new, |until| format!(" until {}", until.name));
    let mut text =
        format!("{} since {} ({}){until}\n", report.disk, report.since.name, marks::date_of(report.since.time));
    for (word, bytes) in [("data", data), ("zero", zero), ("discarded", discarded), ("changed", changed)] {
        text.push_str(&format!("{word:>10}  {bytes} bytes ({})\n", human(bytes)));
    }
    text.push_str(&format!("{:>10}  {} bytes ({})\n", "of", report.size, human(report.size)));
    text
}
