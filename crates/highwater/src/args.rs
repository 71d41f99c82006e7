//! The grammar of the command line. Verbs and options follow qemu-img's habits where it has the verb.

mod backup;

pub(crate) use self::backup::{BackupArgs, ExportPointArgs, RestoreArgs};
use crate::choices;
use crate::repository_args::{DiffArgs, ForgetArgs, KeyOfArgs, PointsArgs, RepoVerb};
use crate::size::{RateArg, parse_new_size, parse_rate, parse_size};
use clap::{Args, Parser, Subcommand, ValueEnum};
use engine::images::request::{NewSize, PreallocationMode, RepairMode};
use engine::{CacheMode, Format, HistoryMode};
use std::path::PathBuf;

/// Virtual disks: make, convert, check and serve them.
#[derive(Debug, Parser)]
#[command(name = "highwater", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// The daemon's API socket [default: $HIGHWATER_API, or api.sock in $XDG_RUNTIME_DIR/highwater or in
    /// /run/highwater]
    #[arg(long, global = true, value_name = "SOCKET")]
    pub(crate) api: Option<PathBuf>,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// As qemu-img has it: `json` is the same as --json
    #[arg(long, global = true, value_enum, value_name = "KIND", hide = true)]
    pub(crate) output: Option<OutputKind>,
    /// Print nothing but errors
    #[arg(long, short = 'q', global = true)]
    pub(crate) quiet: bool,
}

impl Global {
    pub(crate) fn wants_json(&self) -> bool {
        self.json || self.output == Some(OutputKind::Json)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputKind {
    Human,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Make a new image
    Create(CreateArgs),
    /// Show an image's facts
    Info(InfoArgs),
    /// Show which images depend on which, as a picture
    Tree(TreeArgs),
    /// Show which ranges of a disk hold data
    Map(MapArgs),
    /// Check an image's metadata, and mend it with --repair
    Check(CheckArgs),
    /// Copy an image, perhaps into another format
    Convert(ConvertArgs),
    /// Compare what two images show
    Compare(CompareArgs),
    /// Change the size of a disk
    Resize(ResizeArgs),
    /// Show how much space a conversion would take
    Measure(MeasureArgs),
    /// Serve one image over NBD, in the foreground
    Serve(ServeArgs),
    /// Serve the disks of the catalogue, and the API
    Daemon(DaemonArgs),
    /// Name an instant of disks, to ask later what changed since: disks of the daemon, or files that nobody serves
    #[command(override_usage = "highwater mark [OPTIONS] <DISK>... <NAME>")]
    Mark(MarkArgs),
    /// Work with the marks of a disk
    #[command(subcommand)]
    Marks(MarksVerb),
    /// Prove what the history calls unchanged since a mark, against a copy that was made at the mark
    Audit(AuditArgs),
    /// Work with views: disks as they were at a mark, while their guests write on
    #[command(subcommand)]
    Views(ViewsVerb),
    /// Show what changed on a disk since a mark
    Changes(ChangesArgs),
    /// Work with the chain of images that a disk is made of
    #[command(subcommand)]
    Chain(ChainVerb),
    /// Give a disk a new image that holds all of it, while its guest writes on: a linked clone becomes a full one
    Promote(PromoteArgs),
    /// Makes a restore point of disks in a repository
    Backup(BackupArgs),
    /// Makes an image of a restore point
    Restore(RestoreArgs),
    /// Makes an image for others of a restore point: full, or over an earlier one's
    Export(ExportPointArgs),
    /// Bring a disk to another place, or into another format, while its guest writes on
    Move(PromoteArgs),
    /// Merge a disk's top layer into its parent, which becomes the disk, while its guest writes on
    Commit(CommitArgs),
    /// Freeze the states of disks under names, go back to them, and make clones of them
    #[command(subcommand)]
    Snapshot(SnapshotVerb),
    /// Make repositories of backups, and look after them
    #[command(subcommand)]
    Repo(RepoVerb),
    /// Show the restore points of a repository
    Points(PointsArgs),
    /// Forget restore points: those that are named, or all that a policy does not keep
    Forget(ForgetArgs),
    /// Show how two restore points differ
    Diff(DiffArgs),
    /// Work with the daemon's disks
    #[command(subcommand)]
    Disk(DiskVerb),
    /// Work with the daemon's jobs
    #[command(subcommand, alias = "job")]
    Jobs(JobsVerb),
    /// Show which daemon answers, and how many disks and jobs it has
    Status,
    /// Print what happens in the daemon, as it happens
    Events,
    /// Print the daemon's counters in OpenMetrics' text format
    Metrics,
    /// Print how QEMU and libvirt attach a disk's export
    Attach(AttachArgs),
    /// Freeze a guest, and thaw it whatever happens; what freezes runs this
    #[command(hide = true)]
    FreezeGuard(FreezeGuardArgs),
    /// Print a shell's completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Which image a DISK argument means.
#[derive(Clone, Debug, Args)]
pub(crate) struct DiskArg {
    /// A file, or the name of a disk of the daemon
    #[arg(value_name = "DISK")]
    pub(crate) disk: PathBuf,
    /// The file's format; by its extension when absent
    #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) format: Option<Format>,
    /// Read the file though somebody writes to it
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The new image's format; by its extension when absent, and raw when that says nothing
    #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) format: Option<Format>,
    /// Format options, K=V,…; `help` lists them
    #[arg(short = 'o', long = "options", value_name = "K=V,…")]
    pub(crate) options: Vec<String>,
    /// What shows through where the new image holds nothing
    #[arg(short = 'b', long = "backing", value_name = "PARENT")]
    pub(crate) backing: Option<String>,
    /// The parent's format
    #[arg(short = 'F', long = "backing-format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) backing_format: Option<Format>,
    /// Do not open the parent
    #[arg(short = 'u', long = "unsafe")]
    pub(crate) unsafe_backing: bool,
    /// The new image; an image that stands there is replaced, unless it is in use
    pub(crate) file: PathBuf,
    /// Bytes, with suffixes k M G T P E; the parent's size when absent
    #[arg(value_parser = parse_size)]
    pub(crate) size: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    #[command(flatten)]
    pub(crate) disk: DiskArg,
    /// Show the images below as well
    #[arg(long)]
    pub(crate) backing_chain: bool,
    /// The file of the image's history [default: beside the image, with .history behind its name]
    #[arg(long, value_name = "FILE")]
    pub(crate) history_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct TreeArgs {
    /// Files, or names of disks of the daemon; all of the daemon's disks when absent
    #[arg(value_name = "DISK")]
    pub(crate) disks: Vec<PathBuf>,
    /// The files' format; by their extension when absent
    #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) format: Option<Format>,
    /// Read the files though somebody writes to them
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// Write the picture into a file
    #[arg(short = 'o', long, value_name = "FILE.svg|FILE.png")]
    pub(crate) picture: Option<PathBuf>,
    /// Draw with ASCII alone, as is done where the locale is not UTF-8
    #[arg(long)]
    pub(crate) ascii: bool,
}

#[derive(Debug, Args)]
pub(crate) struct MapArgs {
    #[command(flatten)]
    pub(crate) disk: DiskArg,
    /// First byte
    #[arg(short = 's', long, value_parser = parse_size, value_name = "OFFSET")]
    pub(crate) start_offset: Option<u64>,
    /// Bytes
    #[arg(short = 'l', long, value_parser = parse_size, value_name = "LENGTH")]
    pub(crate) max_length: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// A file, or the name of a read-only disk of the daemon
    #[arg(value_name = "DISK")]
    pub(crate) disk: PathBuf,
    /// Its format; by its extension when absent
    #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) format: Option<Format>,
    /// What to mend
    #[arg(short = 'r', long, value_name = "WHAT", value_parser = choices::repair())]
    pub(crate) repair: Option<RepairMode>,
    /// The file of the image's history [default: beside the image, with .history behind its name]
    #[arg(long, value_name = "FILE")]
    pub(crate) history_file: Option<PathBuf>,
    /// Check though somebody writes to it
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// The source's format; by its extension when absent
    #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) format: Option<Format>,
    /// The target's format; by its extension when absent, and raw when that says nothing
    #[arg(short = 'O', long = "output-format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) output_format: Option<Format>,
    /// Options of the target's format, K=V,…; `help` lists them
    #[arg(short = 'o', long = "options", value_name = "K=V,…")]
    pub(crate) options: Vec<String>,
    /// Store clusters compressed
    #[arg(short = 'c', long)]
    pub(crate) compress: bool,
    /// The target's backing file; what it holds already is not copied
    #[arg(short = 'B', short_alias = 'b', long = "backing", value_name = "PARENT")]
    pub(crate) backing: Option<String>,
    /// The backing file's format
    #[arg(short = 'F', long = "backing-format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) backing_format: Option<Format>,
    /// An internal snapshot instead of the present state, by name or id
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub(crate) snapshot: Option<String>,
    /// The target is there already
    #[arg(short = 'n', long)]
    pub(crate) no_create: bool,
    /// The target reads as zero everywhere
    #[arg(long, requires = "no_create")]
    pub(crate) target_is_zero: bool,
    /// Let the kernel copy plain data, or share it where the file system can, without a search for zeroes
    #[arg(short = 'C', long, conflicts_with_all = ["compress", "sparse_size"])]
    pub(crate) copy_range: bool,
    /// Bytes of zeroes in a row that become a hole; 0 allocates everything
    #[arg(short = 'S', long, value_parser = parse_size, value_name = "SIZE")]
    pub(crate) sparse_size: Option<u64>,
    /// How the host's cache is used for the target
    #[arg(short = 't', long, value_name = "MODE", value_parser = choices::cache())]
    pub(crate) cache: Option<CacheMode>,
    /// How the host's cache is used for the source
    #[arg(short = 'T', long, value_name = "MODE", value_parser = choices::cache())]
    pub(crate) source_cache: Option<CacheMode>,
    /// Read the source though somebody writes to it
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// Bytes a second that may be copied, with suffixes k M G; qemu-img's name for it is -r
    #[arg(short = 'r', long, value_parser = parse_rate, value_name = "RATE")]
    pub(crate) rate: Option<RateArg>,
    /// Copy though a parent of the source is not what its child was bound to
    #[arg(long)]
    pub(crate) despite_fault: bool,
    /// Accepted for qemu-img's sake: progress is shown on a terminal anyway
    #[arg(short = 'p', long, hide = true)]
    pub(crate) progress: bool,
    /// What to copy: a file, or the name of a disk of the daemon
    pub(crate) source: PathBuf,
    /// Where to; an image that stands there is replaced, unless it is in use
    pub(crate) target: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// The first image's format; by its extension when absent
    #[arg(short = 'f', long = "first-format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) first_format: Option<Format>,
    /// The second image's format
    #[arg(short = 'F', long = "second-format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) second_format: Option<Format>,
    /// Different sizes or different allocation are a difference
    #[arg(short = 's', long)]
    pub(crate) strict: bool,
    /// How the host's cache is used
    #[arg(short = 'T', long, value_name = "MODE", value_parser = choices::cache())]
    pub(crate) cache: Option<CacheMode>,
    /// Read though somebody writes
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// Compare though a parent is not what its child was bound to
    #[arg(long)]
    pub(crate) despite_fault: bool,
    /// Accepted for qemu-img's sake: progress is shown on a terminal anyway
    #[arg(short = 'p', long, hide = true)]
    pub(crate) progress: bool,
    /// One image: a file, or the name of a disk of the daemon
    pub(crate) first: PathBuf,
    /// The other
    pub(crate) second: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ResizeArgs {
    /// A file, or the name of a disk of the daemon
    pub(crate) disk: PathBuf,
    /// The file's format; by its extension when absent
    #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) format: Option<Format>,
    /// The file of the image's history [default: beside the image, with .history behind its name]
    #[arg(long, value_name = "FILE")]
    pub(crate) history_file: Option<PathBuf>,
    /// The disk may lose bytes at its end
    #[arg(long)]
    pub(crate) shrink: bool,
    /// How much to set aside
    #[arg(long, default_value = "off", value_name = "MODE", value_parser = choices::preallocation())]
    pub(crate) preallocation: PreallocationMode,
    /// Bytes, with suffixes k M G T P E; `+` or `-` before it is relative
    #[arg(value_parser = parse_new_size, allow_hyphen_values = true)]
    pub(crate) size: NewSize,
}

#[derive(Debug, Args)]
pub(crate) struct MeasureArgs {
    /// The source's format; by its extension when absent
    #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) format: Option<Format>,
    /// The target's format
    #[arg(short = 'O', long = "output-format", default_value = "raw", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) output_format: Format,
    /// Options of the target's format, K=V,…; `help` lists them
    #[arg(short = 'o', long = "options", value_name = "K=V,…")]
    pub(crate) options: Vec<String>,
    /// Measure for an empty disk of this size
    #[arg(long, value_parser = parse_size, conflicts_with = "file", required_unless_present = "file")]
    pub(crate) size: Option<u64>,
    /// An internal snapshot instead of the present state, by name or id
    #[arg(short = 'l', long, value_name = "SNAPSHOT", requires = "file")]
    pub(crate) snapshot: Option<String>,
    /// Read though somebody writes
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// The image that would be converted: a file, or the name of a disk of the daemon
    #[arg(value_name = "DISK")]
    pub(crate) file: Option<PathBuf>,
}

/// How an export is reached.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ExportArgs {
    /// Unix socket to listen on
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// The unix socket's mode, in octal digits [default: 0660]
    #[arg(long, value_name = "MODE", requires = "socket")]
    pub(crate) socket_mode: Option<String>,
    /// The unix socket's group, by name or number [default: this process's]
    #[arg(long, value_name = "GROUP", requires = "socket")]
    pub(crate) socket_group: Option<String>,
    /// TCP address to listen on
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: Option<String>,
    /// Directory with server-cert.pem, server-key.pem and ca-cert.pem
    #[arg(long, value_name = "DIR")]
    pub(crate) tls: Option<PathBuf>,
    /// Allow plain connections beside encrypted ones
    #[arg(long, requires = "tls")]
    pub(crate) tls_optional: bool,
    /// Refuse plain connections (this is the default)
    #[arg(long, requires = "tls", conflicts_with = "tls_optional")]
    pub(crate) tls_required: bool,
    /// Demand a client certificate that ca-cert.pem signed
    #[arg(long, requires = "tls")]
    pub(crate) tls_verify: bool,
}

/// Whether and how a disk's history is kept: which of its bytes changed when.
#[derive(Clone, Debug, Args)]
pub(crate) struct HistoryArgs {
    /// Whether the disk's history is kept
    #[arg(long, default_value = "auto", value_name = "MODE", value_parser = choices::history())]
    pub(crate) history: HistoryMode,
    /// The history's file [default: beside the image, with .history behind its name]
    #[arg(long, value_name = "FILE")]
    pub(crate) history_file: Option<PathBuf>,
    /// Bytes that changes are told apart by, in a new history: a power of two, 4k to 1M [default: 64k]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) history_granule: Option<u64>,
    /// The most that a crash may report beyond what was written [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) history_open: Option<u64>,
}

/// Which file's history a verb means.
#[derive(Clone, Debug, Args)]
pub(crate) struct HistoryOfArgs {
    /// The file's format; by its extension when absent
    #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) format: Option<Format>,
    /// The file of the image's history [default: beside the image, with .history behind its name]
    #[arg(long, value_name = "FILE")]
    pub(crate) history_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct MarkArgs {
    /// Disks of the daemon, its virtual machines (all of their disks), or files; and the mark's name
    #[arg(required = true, value_name = "DISK… NAME")]
    pub(crate) disks_and_name: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) of: HistoryOfArgs,
    /// Freeze the guest's file systems at the instant, through its agent's unix socket
    #[arg(long, value_name = "SOCKET")]
    pub(crate) freeze: Option<PathBuf>,
    /// Milliseconds that the guest may be frozen [default: 10000]
    #[arg(long, value_name = "MS", requires = "freeze")]
    pub(crate) freeze_limit: Option<u64>,
    /// Export the disks as they are at this instant, read-only, until `views close`
    #[arg(long)]
    pub(crate) view: bool,
    /// The most that a view's old content may take; when the guest changes more, the view ends [default: a tenth of
    /// the disk]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "view")]
    pub(crate) view_limit: Option<u64>,
    /// Where the old content goes [default: beside the image]
    #[arg(long, value_name = "DIR", requires = "view")]
    pub(crate) view_directory: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    /// A file, or the name of a disk of the daemon
    pub(crate) disk: PathBuf,
    #[command(flatten)]
    pub(crate) of: HistoryOfArgs,
    /// The mark; a restore point has its own
    #[arg(long, value_name = "NAME", required_unless_present = "repository", conflicts_with = "repository")]
    pub(crate) since: Option<String>,
    /// A copy of the disk that was made at the mark
    #[arg(long, value_name = "FILE", required_unless_present = "repository", conflicts_with = "repository")]
    pub(crate) against: Option<PathBuf>,
    /// A repository with a restore point that was made at the mark
    #[arg(long, value_name = "REPO")]
    pub(crate) repository: Option<PathBuf>,
    /// The point: its id, the first digits of it, or `latest`
    #[arg(long, value_name = "POINT", default_value = "latest", requires = "repository")]
    pub(crate) point: String,
    /// Of which machine, when `latest` could be of several
    #[arg(long, value_name = "NAME", requires = "repository")]
    pub(crate) vm: Option<String>,
    /// Which disk of the point, if it has several
    #[arg(long, value_name = "NAME", requires = "repository")]
    pub(crate) point_disk: Option<String>,
    #[command(flatten)]
    pub(crate) key: KeyOfArgs,
    /// The copy's format; by its extension when absent
    #[arg(short = 'F', long = "against-format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) against_format: Option<Format>,
    /// Look at so many percent of it alone, chosen at random
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) sample: Option<u8>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ViewsVerb {
    /// Show all views
    List,
    /// Close a view and forget what it has saved; its mark stays
    Close {
        /// The view: the disk's and the mark's names with @ between
        view: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct PromoteArgs {
    /// A file, or the name of a disk of the daemon
    pub(crate) disk: PathBuf,
    /// The disk's new image
    pub(crate) target: PathBuf,
    /// Its format; by its extension when absent, and raw when that says nothing
    #[arg(short = 'O', long = "output-format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) output_format: Option<Format>,
    /// Format options, K=V,…; `help` lists them
    #[arg(short = 'o', long = "options", value_name = "K=V,…")]
    pub(crate) options: Vec<String>,
    #[command(flatten)]
    pub(crate) of: HistoryOfArgs,
    /// Remove the old image (not what is below it) when the new one has taken its place
    #[arg(long)]
    pub(crate) remove_source: bool,
    /// Bytes a second that may move at most, with suffixes k M G T P E
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) rate: Option<RateArg>,
}

#[derive(Debug, Args)]
pub(crate) struct CommitArgs {
    /// A file, or the name of a disk of the daemon
    pub(crate) disk: PathBuf,
    #[command(flatten)]
    pub(crate) of: HistoryOfArgs,
    /// Bytes a second that may move at most, with suffixes k M G T P E
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) rate: Option<RateArg>,
}

/// Which neighbour takes up a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum IntoArg {
    /// The layer below
    Parent,
    /// The layer above
    Child,
}

impl From<IntoArg> for engine::consolidation::Neighbour {
    fn from(into: IntoArg) -> Self {
        match into {
            IntoArg::Parent => Self::Parent,
            IntoArg::Child => Self::Child,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotVerb {
    /// Freeze what disks hold now, at one instant, while their guests run
    #[command(override_usage = "highwater snapshot create [OPTIONS] <DISK>... <NAME>")]
    Create {
        /// Disks of the daemon, its virtual machines (all of their disks), or files; and the snapshot's name
        #[arg(required = true, value_name = "DISK… NAME")]
        disks_and_name: Vec<PathBuf>,
        #[command(flatten)]
        of: HistoryOfArgs,
        /// Freeze the guest's file systems at the instant, through its agent's unix socket
        #[arg(long, value_name = "SOCKET")]
        freeze: Option<PathBuf>,
        /// Milliseconds that the guest may be frozen [default: 10000]
        #[arg(long, value_name = "MS", requires = "freeze")]
        freeze_limit: Option<u64>,
    },
    /// Show the snapshots of a disk
    List {
        /// A file, or the name of a disk of the daemon
        disk: PathBuf,
        /// The file's format; by its extension when absent
        #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
        format: Option<Format>,
    },
    /// Go back to a snapshot; what the disk holds now, and no snapshot holds, is lost
    Revert {
        /// A file, or the name of a disk of the daemon that nobody is connected to
        disk: PathBuf,
        /// The snapshot
        name: String,
        #[command(flatten)]
        of: HistoryOfArgs,
    },
    /// Forget a snapshot: its layer is merged into its neighbour while the guest writes on; the disk's content stays
    Delete {
        /// A file, or the name of a disk of the daemon
        disk: PathBuf,
        /// The snapshot
        name: String,
        /// Which way the bytes go [default: the one that moves fewer]
        #[arg(long, value_enum, value_name = "SIDE")]
        into: Option<IntoArg>,
        #[command(flatten)]
        of: HistoryOfArgs,
        /// Bytes a second that may move at most, with suffixes k M G T P E
        #[arg(long, value_name = "RATE", value_parser = parse_rate)]
        rate: Option<RateArg>,
    },
    /// Make a new disk that begins as a snapshot and shares its bytes
    Clone {
        /// A file, or the name of a disk of the daemon
        disk: PathBuf,
        /// The snapshot
        name: String,
        /// The new disk, a qcow2 image
        target: PathBuf,
        /// The file's format; by its extension when absent
        #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
        format: Option<Format>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum MarksVerb {
    /// Show all marks of a disk
    List {
        /// A file, or the name of a disk of the daemon
        disk: PathBuf,
        #[command(flatten)]
        of: HistoryOfArgs,
        /// Show the history as well
        #[arg(short = 'v', long)]
        verbose: bool,
    },
    /// Show one mark
    Show {
        /// A file, or the name of a disk of the daemon
        disk: PathBuf,
        /// The mark
        name: String,
        #[command(flatten)]
        of: HistoryOfArgs,
    },
    /// Forget a mark; no data goes with it
    Delete {
        /// A file, or the name of a disk of the daemon
        disk: PathBuf,
        /// The mark
        name: String,
        #[command(flatten)]
        of: HistoryOfArgs,
    },
    /// Take a mark since which everything has changed that a persistent bitmap of QEMU's calls dirty
    Import {
        /// A qcow2 file that nobody uses
        file: PathBuf,
        /// The bitmap
        bitmap: String,
        /// The mark's name; the bitmap's when absent
        #[arg(long = "as", value_name = "NAME")]
        mark: Option<String>,
        #[command(flatten)]
        of: HistoryOfArgs,
    },
    /// Store what changed since a mark as a persistent bitmap of QEMU's
    Export {
        /// A qcow2 file that nobody uses
        file: PathBuf,
        /// The mark
        name: String,
        /// The bitmap's name; the mark's when absent
        #[arg(long = "as", value_name = "BITMAP")]
        bitmap: Option<String>,
        #[command(flatten)]
        of: HistoryOfArgs,
    },
    /// Accept, on your word, that nobody has changed the image unseen: refused marks can be used again
    Trust {
        /// A file, or the name of a disk of the daemon
        disk: PathBuf,
        #[command(flatten)]
        of: HistoryOfArgs,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ChainVerb {
    /// Show the images of a chain, how they fit, and which others depend on them
    Show {
        #[command(flatten)]
        disk: DiskArg,
    },
    /// Verify that every parent is what its child was bound to
    Verify {
        #[command(flatten)]
        disk: DiskArg,
        /// Hash what the parents show as well: compare it with what was recorded, or record it
        #[arg(long)]
        hash: bool,
    },
    /// Bind the images of a chain to their parents as they are now: on your word that they are right
    Accept {
        /// The file of the disk; nobody uses it
        file: PathBuf,
        /// The file's format; by its extension when absent
        #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
        format: Option<Format>,
    },
    /// Name another parent, and copy into the image what would show differently over it
    Rebase {
        /// The file of the disk; nobody uses it
        file: PathBuf,
        /// The file's format; by its extension when absent
        #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
        format: Option<Format>,
        /// The parent's name, seen from the image's directory; an empty one for no parent
        #[arg(short = 'b', long = "backing", value_name = "PARENT")]
        parent: String,
        /// The parent's format
        #[arg(short = 'F', long = "backing-format", value_name = "FORMAT", value_parser = choices::format())]
        parent_format: Option<Format>,
        /// Change the name alone, whatever shows through then
        #[arg(short = 'u', long = "unsafe")]
        name_only: bool,
    },
    /// Prove faulty links sound by recorded hashes, and bind the images again
    Repair {
        /// The file of the disk; nobody uses it
        file: PathBuf,
        /// The file's format; by its extension when absent
        #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
        format: Option<Format>,
    },
    /// Forget that an image was made over another, so that the parent can be written to
    Forget {
        /// The parent's file
        parent: PathBuf,
        /// The child's file
        child: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ChangesArgs {
    /// A file, or the name of a disk of the daemon
    pub(crate) disk: PathBuf,
    #[command(flatten)]
    pub(crate) of: HistoryOfArgs,
    /// After this mark
    #[arg(long, value_name = "NAME")]
    pub(crate) since: String,
    /// Up to this mark; up to now when absent
    #[arg(long, value_name = "NAME")]
    pub(crate) until: Option<String>,
    /// Show how many bytes changed in which way, and no ranges
    #[arg(long)]
    pub(crate) summary: bool,
    /// Show where on the disk, as a chart
    #[arg(long, conflicts_with = "summary")]
    pub(crate) chart: bool,
    /// Write a picture of where on the disk
    #[arg(long, value_name = "FILE.png")]
    pub(crate) picture: Option<PathBuf>,
}

/// How I/O threads are run.
#[derive(Clone, Debug, Args)]
pub(crate) struct ThreadArgs {
    /// I/O threads; as many as there are processors when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) threads: Option<u16>,
    /// What I/O threads run on
    #[arg(long, value_enum, default_value = "auto", value_name = "BACKEND")]
    pub(crate) io_backend: BackendArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendArg {
    /// io_uring where the kernel allows it
    Auto,
    /// io_uring
    Uring,
    /// A thread pool
    Threads,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The image
    pub(crate) file: PathBuf,
    /// Its format; by its extension when absent
    #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) format: Option<Format>,
    /// The export's name; the file's stem when absent
    #[arg(long = "name", value_name = "EXPORT")]
    pub(crate) export_name: Option<String>,
    #[command(flatten)]
    pub(crate) export: ExportArgs,
    /// Refuse writes
    #[arg(short = 'r', long)]
    pub(crate) read_only: bool,
    /// How the host's cache is used
    #[arg(long, default_value = "writeback", value_name = "MODE", value_parser = choices::cache())]
    pub(crate) cache: CacheMode,
    /// Serve an internal snapshot, by name or id; refuses writes
    #[arg(long)]
    pub(crate) snapshot: Option<String>,
    /// With --read-only: serve though a parent is not what its child was bound to
    #[arg(long)]
    pub(crate) despite_fault: bool,
    #[command(flatten)]
    pub(crate) history: HistoryArgs,
    #[command(flatten)]
    pub(crate) threads: ThreadArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// Directory of the catalogue [default: $XDG_STATE_HOME/highwater, or /var/lib/highwater for root]
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// NBD socket of exports that name no address [default: nbd.sock beside the API socket]
    #[arg(long, value_name = "PATH")]
    pub(crate) nbd_socket: Option<PathBuf>,
    /// That socket's mode, in octal digits [default: 0660]
    #[arg(long, value_name = "MODE")]
    pub(crate) socket_mode: Option<String>,
    /// That socket's group, by name or number [default: the daemon's]
    #[arg(long, value_name = "GROUP")]
    pub(crate) socket_group: Option<String>,
    #[command(flatten)]
    pub(crate) threads: ThreadArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DiskVerb {
    /// Open an image as a disk and export it
    Add(DiskAddArgs),
    /// Show all disks
    List,
    /// Show one disk
    Show {
        /// The disk's name
        name: String,
    },
    /// Try again to open a disk, or its exports, that could not be opened
    Open {
        /// The disk's name
        name: String,
    },
    /// Close a disk and forget it; its image is left
    Remove {
        /// The disk's name
        name: String,
    },
    /// Open one more export
    Export {
        /// The disk's name
        disk: String,
        /// The export's name; the disk's name when absent
        #[arg(long = "name", value_name = "EXPORT")]
        export_name: Option<String>,
        #[command(flatten)]
        export: ExportArgs,
        /// Refuse writes
        #[arg(short = 'r', long)]
        read_only: bool,
    },
    /// Close an export
    Unexport {
        /// The disk's name
        disk: String,
        /// The export's name
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        export: Option<String>,
        /// Close all exports of the disk
        #[arg(long)]
        all: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DiskAddArgs {
    /// The image
    pub(crate) file: PathBuf,
    /// The disk's name; the file's stem when absent
    #[arg(long = "name", value_name = "DISK")]
    pub(crate) disk: Option<String>,
    /// The export's name; the disk's name when absent
    #[arg(long = "export-name", value_name = "EXPORT")]
    pub(crate) export_name: Option<String>,
    /// The image's format; by its extension when absent
    #[arg(short = 'f', long = "format", value_name = "FORMAT", value_parser = choices::format())]
    pub(crate) format: Option<Format>,
    #[command(flatten)]
    pub(crate) export: ExportArgs,
    /// Refuse writes
    #[arg(short = 'r', long)]
    pub(crate) read_only: bool,
    /// How the host's cache is used
    #[arg(long, default_value = "writeback", value_name = "MODE", value_parser = choices::cache())]
    pub(crate) cache: CacheMode,
    /// Show an internal snapshot, by name or id
    #[arg(long)]
    pub(crate) snapshot: Option<String>,
    /// With --read-only: open it though a parent is not what its child was bound to
    #[arg(long)]
    pub(crate) despite_fault: bool,
    /// The virtual machine that it belongs to: marks may be taken of all disks of one
    #[arg(long, value_name = "VM")]
    pub(crate) vm: Option<String>,
    #[command(flatten)]
    pub(crate) history: HistoryArgs,
    /// Open no export
    #[arg(long, conflicts_with_all = ["export_name", "socket", "listen", "tls"])]
    pub(crate) no_export: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum JobsVerb {
    /// Show all jobs
    List,
    /// Show one job
    Show {
        /// The job's number
        id: u64,
    },
    /// Start a job from a JSON description (see /openapi.json, JobKind); `-` reads standard input
    Start {
        /// File with the description
        file: PathBuf,
        /// Bytes a second that it may move, with suffixes k M G; or none
        #[arg(long, value_parser = parse_rate, value_name = "RATE")]
        rate: Option<RateArg>,
    },
    /// Wait until a job has ended, show what came out, and end with the job's exit code; Ctrl-C ends the waiting, not the
    /// job
    Wait {
        /// The job's number
        id: u64,
    },
    /// Hold a job up before its next piece of work
    Pause {
        /// The job's number
        id: u64,
    },
    /// Let a paused job go on, or one that the end of the daemon has interrupted and that can
    Resume {
        /// The job's number
        id: u64,
    },
    /// Say how many bytes a second a job may move, from now on
    SetRate {
        /// The job's number
        id: u64,
        /// Bytes a second, with suffixes k M G; or none
        #[arg(value_parser = parse_rate)]
        rate: RateArg,
    },
    /// Stop a job, paused or not
    Cancel {
        /// The job's number
        id: u64,
    },
    /// Forget a job that has ended, and its result
    Forget {
        /// The job's number
        id: u64,
    },
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// The disk's name
    pub(crate) disk: String,
    /// The export's name; the first one when absent
    #[arg(long = "name", value_name = "EXPORT")]
    pub(crate) export: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct FreezeGuardArgs {
    /// The unix socket of the guest's agent
    pub(crate) socket: PathBuf,
    /// Milliseconds that the guest may be frozen
    #[arg(long, value_name = "MS", default_value_t = 10_000)]
    pub(crate) limit: u32,
    /// Milliseconds to reach the agent
    #[arg(long, value_name = "MS", default_value_t = 5_000)]
    pub(crate) connect_limit: u32,
    /// Milliseconds that freezing may take
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    pub(crate) freeze_limit: u32,
}

#[cfg(test)]
mod tests;
