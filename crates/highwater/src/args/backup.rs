//! `backup`, `restore`, `export`.

use super::HistoryOfArgs;
use crate::choices;
use crate::exit::Failure;
use crate::repository_args::KeyOfArgs;
use crate::size::{RateArg, parse_rate};
use clap::Args;
use engine::Format;
use engine::backup::PointSpec;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    /// Disks of the daemon, its virtual machines (all of their disks), or files; and the repository's directory
    #[arg(required = true, num_args = 2.., value_name = "DISK… REPO")]
    pub(crate) disks_and_repository: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) key: KeyOfArgs,
    #[command(flatten)]
    pub(crate) of: HistoryOfArgs,
    /// The machine's name in the repository [default: the virtual machine's, or the first disk's]
    #[arg(long, value_name = "NAME")]
    pub(crate) vm: Option<String>,
    /// Freeze the guest's file systems for the instant, through the guest agent's socket
    #[arg(long, value_name = "SOCKET")]
    pub(crate) freeze: Option<PathBuf>,
    /// Longest time that the guest may be frozen, in milliseconds
    #[arg(long, value_name = "MS", requires = "freeze")]
    pub(crate) freeze_limit: Option<u64>,
    /// Read all of the disks and store it anew, whatever the repository has
    #[arg(long, conflicts_with = "compare")]
    pub(crate) full: bool,
    /// Read all of the disks and compare, though their histories say what has changed
    #[arg(long)]
    pub(crate) compare: bool,
    /// A file to keep with the disks, such as the machine's configuration
    #[arg(long, value_name = "FILE")]
    pub(crate) attach: Vec<PathBuf>,
    /// Free text
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) note: String,
    /// Bytes a second that are read at most, with suffixes k M G T P E
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) rate: Option<RateArg>,
}

/// A disk of a restore point.
#[derive(Debug, Args)]
pub(crate) struct PointOfArgs {
    /// The repository's directory
    pub(crate) repository: PathBuf,
    /// The point: its id, the first digits of it, or `latest`
    pub(crate) point: String,
    #[command(flatten)]
    pub(crate) key: KeyOfArgs,
    /// Of which machine, when `latest` could be of several
    #[arg(long, value_name = "NAME")]
    pub(crate) vm: Option<String>,
    /// Which disk of the point, if it has several
    #[arg(long, value_name = "NAME")]
    pub(crate) disk: Option<String>,
}

impl PointOfArgs {
    /// What the engine is told.
    pub(crate) fn spec(self) -> Result<PointSpec, Failure> {
        let Self { repository, point, key, vm: machine, disk } = self;
        Ok(PointSpec { repository: key.spec(&repository)?, point, machine, disk })
    }
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    pub(crate) of: PointOfArgs,
    /// The image or block device
    pub(crate) target: PathBuf,
    /// The target's format; by its extension when absent, and raw when that says nothing
    #[arg(short = 'O', long = "output-format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) output_format: Option<Format>,
    /// Format options, K=V,…; `help` lists them
    #[arg(short = 'o', long = "options", value_name = "K=V,…", conflicts_with = "in_place")]
    pub(crate) options: Vec<String>,
    /// The target is there; overwrite what differs in it
    #[arg(long)]
    pub(crate) in_place: bool,
    /// Bytes a second that may move at most, with suffixes k M G T P E
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) rate: Option<RateArg>,
}

#[derive(Debug, Args)]
pub(crate) struct ExportPointArgs {
    #[command(flatten)]
    pub(crate) of: PointOfArgs,
    /// The image; `-` for raw bytes to standard output
    pub(crate) target: PathBuf,
    /// The image's format; by its extension when absent, and qcow2 when that says nothing
    #[arg(short = 'O', long = "output-format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) output_format: Option<Format>,
    /// Only what differs from this point, over the image that it was exported to
    #[arg(long, value_name = "POINT", requires = "backing")]
    pub(crate) since: Option<String>,
    /// That image, as the new one is to name it
    #[arg(short = 'b', long, value_name = "FILE", requires = "since")]
    pub(crate) backing: Option<String>,
    /// Its format [default: qcow2]
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = choices::format(), requires = "backing")]
    pub(crate) backing_format: Option<Format>,
}
