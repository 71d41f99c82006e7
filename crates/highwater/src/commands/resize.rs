//! `highwater resize`.

use super::Outcome;
use super::target::{self, Target};
use crate::args::{Global, ResizeArgs};
use crate::exit;
use crate::output;
use crate::progress;
use crate::size::human;
use anyhow::anyhow;
use api::ResizeRequest;
use engine::images::Progress;
use engine::images::request::ResizeSpec;

pub(crate) async fn run(global: &Global, args: ResizeArgs) -> Outcome {
    let size = match target::find(global, &args.disk).await? {
        Target::Disk(client, name) => {
            target::refuse_file_options(
                &name,
                &[("-f", args.format.is_some()), ("--history-file", args.history_file.is_some())],
            )?;
            let present = client.disk(&name).await?.virtual_size.unwrap_or(0);
            let size = args.size.from_present(present).ok_or_else(|| {
                anyhow!("disk {name:?}: the new size would be below 0 or too large; the present size is {present}")
            })?;
            let request = ResizeRequest { size, shrink: args.shrink, preallocation: args.preallocation };
            let status = client.resize(&name, &request).await?;
            if global.wants_json() {
                output::json(&status)?;
            }
            status.virtual_size.unwrap_or(size)
        }
        Target::File(file) => {
            let spec = ResizeSpec {
                file,
                format: args.format,
                size: args.size,
                shrink: args.shrink,
                preallocation: args.preallocation,
                history_file: args.history_file.as_deref().map(target::absolute).transpose()?,
            };
            let workshop = target::workshop()?;
            let progress = Progress::new();
            let info = progress::watch(progress.clone(), global.quiet, workshop.resize(spec, progress.clone())).await?;
            if global.wants_json() {
                output::json(&info)?;
            }
            info.virtual_size
        }
    };
    if !global.wants_json() && !global.quiet {
        output::line(&format!("{}: resized to {} ({size} bytes)", args.disk.display(), human(size)))?;
    }
    Ok(exit::OK)
}
