//! `highwater convert`.

use super::{Outcome, target};
use crate::args::{ConvertArgs, Global};
use crate::exit;
use crate::output;
use crate::progress;
use anyhow::anyhow;
use engine::images::Progress;
use engine::images::request::{BackingSpec, ConvertSpec, SourceSpec};

pub(crate) async fn run(global: &Global, args: ConvertArgs) -> Outcome {
    let backing = match (args.backing, args.backing_format) {
        (None, None) => None,
        (Some(file), Some(format)) => Some(BackingSpec { file, format }),
        (Some(_), None) => return Err(anyhow!("-B needs the parent's format as well: give -F FORMAT").into()),
        (None, Some(_)) => return Err(anyhow!("-F names a parent's format, but no parent is given: give -B").into()),
    };
    let spec = ConvertSpec {
        source: SourceSpec {
            file: args.source,
            format: args.format,
            snapshot: args.snapshot,
            force_share: args.force_share,
            cache: args.source_cache.unwrap_or_default(),
        },
        target: args.target,
        format: args.output_format,
        options: target::options(&args.options)?,
        backing,
        compress: args.compress,
        no_create: args.no_create,
        target_is_zero: args.target_is_zero,
        sparse_size: args.sparse_size,
        cache: args.cache.unwrap_or_default(),
    };
    let workshop = target::workshop()?;
    let progress = Progress::new();
    let report = progress::watch(progress.clone(), global.quiet, workshop.convert(spec, progress.clone())).await?;
    if global.wants_json() {
        output::json(&report)?;
    }
    Ok(exit::OK)
}
