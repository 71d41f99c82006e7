//! `highwater resize`.

use super::Outcome;
use super::target::{self, Target};
use crate::args::{Global, ResizeArgs};
use crate::exit;
use crate::output;
use crate::size::human;
use anyhow::anyhow;
use api::ResizeRequest;
use engine::images::request::{PreallocationMode, ResizeSpec};

pub(crate) async fn run(global: &Global, args: ResizeArgs) -> Outcome {
    let size = match target::find(global, &args.disk).await? {
        Target::Disk(client, name) => {
            if args.preallocation != PreallocationMode::Off {
                return Err(anyhow!("--preallocation works on files only: {name} is a disk of the daemon").into());
            }
            let present = client.disk(&name).await?.virtual_size.unwrap_or(0);
            let size = args.size.from_present(present).ok_or_else(|| anyhow!("the size would be below 0"))?;
            let status = client.resize(&name, &ResizeRequest { size, shrink: args.shrink }).await?;
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
            };
            let info = target::workshop()?.resize(spec).await?;
            if global.wants_json() {
                output::json(&info)?;
            }
            info.virtual_size
        }
    };
    if !global.wants_json() && !global.quiet {
        output::line(&format!("{}: resized to {} ({size} bytes)", args.disk, human(size)))?;
    }
    Ok(exit::OK)
}
