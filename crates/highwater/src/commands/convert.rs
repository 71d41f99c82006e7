//! `highwater convert`.

use super::{Outcome, jobs, target};
use crate::args::{ConvertArgs, Global};
use crate::exit;
use crate::output;
use crate::progress;
use crate::size::RateArg;
use anyhow::anyhow;
use api::{ConvertReport, JobKind};
use engine::format_policy;
use engine::images::Progress;
use engine::images::request::{BackingSpec, ConvertSpec, SourceSpec};

pub(crate) async fn run(global: &Global, args: ConvertArgs) -> Outcome {
    let backing = match (args.backing, args.backing_format) {
        (None, None) => None,
        (Some(file), Some(format)) => Some(BackingSpec { file, format }),
        (Some(_), None) => return Err(anyhow!("-B needs the parent's format as well: give -F FORMAT").into()),
        (None, Some(_)) => return Err(anyhow!("-F names a parent's format, but no parent is given: give -B").into()),
    };
    if args.no_create && !args.options.is_empty() {
        return Err(anyhow!("-o says how the target is made, but with -n it is there already: leave one out").into());
    }
    let how = SourceSpec {
        snapshot: args.snapshot.clone(),
        force_share: args.force_share,
        despite_fault: args.despite_fault,
        cache: args.source_cache.unwrap_or_default(),
        ..SourceSpec::of("", args.format)
    };
    let of_files = [
        ("-f", args.format.is_some()),
        ("-l", args.snapshot.is_some()),
        ("-T", args.source_cache.is_some()),
        ("-U", args.force_share),
        ("--despite-fault", args.despite_fault),
    ];
    let (daemon, source) = target::source(global, &args.source, how, &of_files).await?;
    let rate = args.rate.and_then(|RateArg(rate)| rate);
    let format = args.output_format.unwrap_or_else(|| format_policy::of_new(&args.target));
    let spec = ConvertSpec {
        source,
        target: args.target,
        format,
        options: target::options(&args.options)?,
        backing,
        compress: args.compress,
        no_create: args.no_create,
        target_is_zero: args.target_is_zero,
        copy_range: args.copy_range,
        sparse_size: args.sparse_size,
        cache: args.cache.unwrap_or_default(),
    };
    let report: ConvertReport = match daemon {
        Some(client) => {
            let target = target::absolute(&spec.target)?;
            jobs::perform(global, &client, &JobKind::Convert(ConvertSpec { target, ..spec }), rate).await?
        }
        None => {
            let workshop = target::workshop()?;
            let progress = Progress::new();
            progress.set_rate_limit(rate);
            progress::watch(progress.clone(), global.quiet, workshop.convert(spec, progress.clone())).await?
        }
    };
    if global.wants_json() {
        output::json(&report)?;
    }
    Ok(exit::OK)
}
