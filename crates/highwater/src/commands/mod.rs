//! One module per verb, or per family of verbs.

mod attach;
mod audit;
mod backup;
mod chain;
mod changes;
mod check;
mod compare;
mod convert;
mod create;
mod daemon;
mod disks;
mod freeze_guard;
mod info;
mod jobs;
mod map;
mod marks;
mod measure;
mod points;
mod relocate;
mod repo;
mod resize;
mod serve;
mod snapshots;
mod status;
mod target;
mod tree;
mod views;

use crate::args::{Cli, Verb};
use crate::exit::{self, Failure};
use clap::CommandFactory;

/// What a command ends with: an exit code, or an error to print.
pub(crate) type Outcome = Result<u8, Failure>;

pub(crate) fn run(cli: Cli) -> Outcome {
    let Cli { global, verb } = cli;
    if let Verb::Completions { shell } = verb {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "highwater", &mut script);
        crate::output::line(String::from_utf8_lossy(&script).trim_end())?;
        return Ok(exit::OK);
    }
    let serving = matches!(verb, Verb::Serve(_) | Verb::Daemon(_));
    let runtime = if serving {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?
    } else {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?
    };
    runtime.block_on(async {
        match verb {
            Verb::Create(args) => create::run(&global, args).await,
            Verb::Info(args) => info::run(&global, args).await,
            Verb::Tree(args) => tree::run(&global, args).await,
            Verb::Map(args) => map::run(&global, args).await,
            Verb::Check(args) => check::run(&global, args).await,
            Verb::Convert(args) => convert::run(&global, args).await,
            Verb::Compare(args) => compare::run(&global, args).await,
            Verb::Audit(args) => audit::run(&global, args).await,
            Verb::Resize(args) => resize::run(&global, args).await,
            Verb::Measure(args) => measure::run(&global, args).await,
            Verb::Serve(args) => serve::run(&global, args).await,
            Verb::Daemon(args) => daemon::run(&global, args).await,
            Verb::Mark(args) => marks::mark(&global, args).await,
            Verb::Marks(verb) => marks::run(&global, verb).await,
            Verb::Views(verb) => views::run(&global, verb).await,
            Verb::Backup(args) => backup::backup(&global, args).await,
            Verb::Restore(args) => backup::restore(&global, args).await,
            Verb::Export(args) => backup::export(&global, args).await,
            Verb::Promote(args) | Verb::Move(args) => relocate::promote(&global, args).await,
            Verb::Commit(args) => relocate::commit(&global, args).await,
            Verb::Snapshot(verb) => snapshots::run(&global, verb).await,
            Verb::Changes(args) => changes::run(&global, args).await,
            Verb::Chain(verb) => chain::run(&global, verb).await,
            Verb::Repo(verb) => repo::run(&global, verb).await,
            Verb::Points(args) => points::points(&global, args).await,
            Verb::Forget(args) => points::forget(&global, args).await,
            Verb::Diff(args) => points::diff(&global, args).await,
            Verb::Disk(verb) => disks::run(&global, verb).await,
            Verb::Jobs(verb) => jobs::run(&global, verb).await,
            Verb::Status => status::status(&global).await,
            Verb::Events => status::events(&global).await,
            Verb::Metrics => status::metrics(&global).await,
            Verb::FreezeGuard(args) => freeze_guard::run(&args),
            Verb::Attach(args) => attach::run(&global, args).await,
            Verb::Completions { .. } => Ok(exit::OK),
        }
    })
}
