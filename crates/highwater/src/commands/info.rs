//! `highwater info`.

use super::Outcome;
use super::target::{self, Target};
use crate::args::{DiskArg, Global, InfoArgs};
use crate::exit;
use crate::output;
use crate::size::human;
use api::{FormatSpecific, HistoryReport, ImageInfo};
use engine::images::request::SourceSpec;
use std::fmt::Write;

pub(crate) async fn run(global: &Global, args: InfoArgs) -> Outcome {
    let history_file = args.history_file.as_deref().map(target::absolute).transpose()?;
    let chain = match target::find(global, &args.disk.disk).await? {
        Target::Disk(client, name) => {
            let DiskArg { format, force_share, .. } = &args.disk;
            target::refuse_file_options(
                &name,
                &[("-f", format.is_some()), ("-U", *force_share), ("--history-file", history_file.is_some())],
            )?;
            if args.backing_chain { client.chain(&name).await? } else { vec![client.info(&name).await?] }
        }
        Target::File(file) => {
            let source = SourceSpec { force_share: args.disk.force_share, ..SourceSpec::of(file, args.disk.format) };
            let workshop = target::workshop()?;
            let mut chain = workshop.info(source.clone(), args.backing_chain).await?;
            if let Some(top) = chain.first_mut() {
                top.history = workshop.history_of(source, history_file).await?;
            }
            chain
        }
    };
    if global.wants_json() {
        if args.backing_chain {
            output::json(&chain)?;
        } else {
            output::json(&chain[0])?;
        }
        return Ok(exit::OK);
    }
    let texts: Vec<String> = chain.iter().map(text).collect();
    output::line(texts.join("\n").trim_end())?;
    Ok(exit::OK)
}

fn text(info: &ImageInfo) -> String {
    let mut text = String::new();
    let mut say = |name: &str, value: String| {
        let _ = writeln!(text, "{name}: {value}");
    };
    say("image", info.filename.clone());
    say("file format", info.format.to_string());
    say("virtual size", format!("{} ({} bytes)", human(info.virtual_size), info.virtual_size));
    say("disk size", human(info.actual_size));
    if let Some(size) = info.cluster_size {
        say("cluster_size", size.to_string());
    }
    if info.dirty_flag {
        say("cleanly shut down", "no".to_owned());
    }
    if info.encrypted {
        say("encrypted", "yes".to_owned());
    }
    if let Some(name) = &info.backing_filename {
        let full = info.full_backing_filename.as_ref().filter(|full| *full != name);
        say("backing file", full.map_or_else(|| name.clone(), |full| format!("{name} (actual path: {full})")));
    }
    if let Some(format) = &info.backing_filename_format {
        say("backing file format", format.clone());
    }
    if let Some(id) = &info.content {
        say("content id", id.clone());
    }
    if let Some(link) = &info.link {
        let word = super::chain::state_word(link).to_owned();
        say("link to its parent", link.text.as_ref().map_or(word.clone(), |text| format!("{word}: {text}")));
    }
    if !info.snapshots.is_empty() {
        say("snapshots", String::new());
        for snapshot in &info.snapshots {
            say(
                "    id",
                format!(
                    "{}, name {:?}, made at {}, machine state {}",
                    snapshot.id,
                    snapshot.name,
                    engine::utc_text(snapshot.date_sec),
                    human(snapshot.vm_state_size)
                ),
            );
        }
    }
    if let Some(FormatSpecific::Qcow2(own)) = &info.format_specific {
        say("format specific information", String::new());
        say("    compat", own.compat.clone());
        say("    compression type", own.compression_type.clone());
        let mut flag = |name: &str, value: Option<bool>| {
            if let Some(value) = value {
                say(name, value.to_string());
            }
        };
        flag("    lazy refcounts", own.lazy_refcounts);
        flag("    corrupt", own.corrupt);
        flag("    extended l2", own.extended_l2);
        flag("    data file raw", own.data_file_raw);
        say("    refcount bits", own.refcount_bits.to_string());
        if let Some(file) = &own.data_file {
            say("    data file", file.clone());
        }
        for bitmap in &own.bitmaps {
            say(
                "    bitmap",
                format!(
                    "{:?}, granularity {}, flags {}",
                    bitmap.name,
                    human(bitmap.granularity),
                    bitmap.flags.join(", ")
                ),
            );
        }
    }
    if let Some(history) = &info.history {
        text.push_str(&history_text(history));
    }
    text
}

/// A history's facts.
pub(super) fn history_text(history: &HistoryReport) -> String {
    let mut text = String::from("history:");
    let mut say = |name: &str, value: String| {
        let _ = write!(text, "\n    {name}: {value}");
    };
    say("kept", if history.kept { "yes" } else { "no" }.to_owned());
    if let Some(reason) = &history.reason {
        let what = match (history.kept, history.refused) {
            (false, _) => "reason",
            (true, 0) => "begun anew",
            (true, _) => "marks are refused",
        };
        say(what, reason.clone());
    }
    if let Some(file) = &history.file {
        say("file", file.clone());
    }
    if let Some(lineage) = &history.lineage {
        say("lineage", lineage.clone());
        say("granule", human(history.granule.unwrap_or(0)));
        say("marks", format!("{}, {} of them refused", history.marks, history.refused));
        say(
            "a crash would over-report",
            format!("{} now, {} at most", human(history.open_bytes), human(history.open_limit)),
        );
    }
    text.push('\n');
    text
}
