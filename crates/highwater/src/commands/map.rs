//! `highwater map`.

use super::Outcome;
use super::target::{self, Target};
use crate::args::{Global, MapArgs};
use crate::exit;
use crate::output;
use anyhow::anyhow;
use api::{MapEntry, MapQuery};
use disk::ByteRange;
use engine::images::request::SourceSpec;

pub(crate) async fn run(global: &Global, args: MapArgs) -> Outcome {
    let start = args.start_offset.unwrap_or(0);
    let end = match args.max_length {
        None => u64::MAX,
        Some(length) => start.checked_add(length).ok_or_else(|| anyhow!("{length} bytes from {start} overflow"))?,
    };
    let entries = match target::find(global, &args.disk.disk).await? {
        Target::Disk(client, name) => {
            let of_files = [("-f", args.disk.format.is_some()), ("-U", args.disk.force_share)];
            target::refuse_file_options(&name, &of_files)?;
            let mut entries = Vec::new();
            let mut next = Some(start).filter(|_| start < end);
            while let Some(start) = next {
                let part = client.map(&name, &MapQuery { start, length: Some(end - start) }).await?;
                entries.extend(part.entries);
                next = part.next;
            }
            entries
        }
        Target::File(file) => {
            let source = SourceSpec { force_share: args.disk.force_share, ..SourceSpec::of(file, args.disk.format) };
            target::workshop()?.map(source, ByteRange::between(start, end)).await?
        }
    };
    if global.wants_json() {
        output::json(&entries)?;
    } else {
        let word = |entry: &MapEntry| match (entry.data, entry.zero, entry.compressed) {
            (_, _, true) => "compressed",
            (true, false, _) => "data",
            (true, true, _) => "zero, allocated",
            (false, _, _) if entry.present => "zero",
            (false, _, _) => "hole",
        };
        output::table(
            &["start", "length", "kind", "depth", "offset", "file"],
            entries.iter().map(|e| {
                vec![
                    format!("{:#x}", e.start),
                    format!("{:#x}", e.length),
                    word(e).to_owned(),
                    e.depth.to_string(),
                    e.offset.map_or_else(String::new, |o| format!("{o:#x}")),
                    e.filename.clone().unwrap_or_default(),
                ]
            }),
        )?;
    }
    Ok(exit::OK)
}
