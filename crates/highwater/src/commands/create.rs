//! `highwater create`.

use super::{Outcome, target};
use crate::args::{CreateArgs, Global};
use crate::exit;
use crate::output;
use crate::progress;
use crate::size::human;
use anyhow::anyhow;
use engine::ErrorClass;
use engine::format_policy;
use engine::images::Progress;
use engine::images::request::{BackingSpec, CreateSpec};

pub(crate) async fn run(global: &Global, args: CreateArgs) -> Outcome {
    let backing = match (args.backing, args.backing_format) {
        (None, None) => None,
        (Some(file), Some(format)) => Some(BackingSpec { file, format }),
        (Some(_), None) => return Err(anyhow!("-b needs the parent's format as well: give -F FORMAT").into()),
        (None, Some(_)) => return Err(anyhow!("-F names a parent's format, but no parent is given: give -b").into()),
    };
    let format = args.format.unwrap_or_else(|| format_policy::of_new(&args.file));
    let spec = CreateSpec {
        file: args.file,
        format,
        size: args.size,
        options: target::options(&args.options)?,
        backing,
        unsafe_backing: args.unsafe_backing,
    };
    let workshop = target::workshop()?;
    let progress = Progress::new();
    let file = spec.file.clone();
    let work = workshop.create(spec, progress.clone());
    let info = progress::watch(progress, global.quiet, work).await.map_err(|error| {
        // What was there before is empty now; what was not there is not there again.
        let incomplete = error.class() == ErrorClass::Cancelled && file.exists();
        let error = anyhow::Error::from(error);
        match incomplete {
            true => error.context(format!("{} is incomplete; make it again or remove it", file.display())),
            false => error,
        }
    })?;
    if global.wants_json() {
        output::json(&info)?;
    } else if !global.quiet {
        output::line(&format!(
            "{}: {} image of {} ({} bytes)",
            info.filename,
            info.format,
            human(info.virtual_size),
            info.virtual_size
        ))?;
    }
    Ok(exit::OK)
}
