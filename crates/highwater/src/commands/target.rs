//! What a DISK argument means: a daemon's disk or a file; and the I/O threads for work on files.

use crate::args::{Global, HistoryArgs, HistoryOfArgs};
use crate::exit::Failure;
use anyhow::{Context, anyhow};
use api::{Client, socket_to_try};
use engine::history::HistorySource;
use engine::images::Workshop;
use engine::images::request::SourceSpec;
use engine::{Backend, HistorySpec, validate_name};
use std::path::{Path, PathBuf};

/// Where to look for the disk.
pub(crate) enum Target {
    /// A disk of the daemon.
    Disk(Client, String),
    /// A file.
    File(PathBuf),
}

/// A daemon's disk or a file: with `--api` the daemon is asked first and a file is the second choice;
/// without, a file that exists comes first and the daemon on the default socket is the second choice.
pub(crate) async fn find(global: &Global, argument: &Path) -> Result<Target, Failure> {
    let file = argument.to_owned();
    let Some(argument) = argument.to_str().filter(|name| validate_name(name).is_ok()) else {
        return Ok(Target::File(file));
    };
    match &global.api {
        Some(socket) => {
            let client = Client::new(socket)?;
            match client.disk(argument).await {
                Ok(_) => Ok(Target::Disk(client, argument.to_owned())),
                Err(e) if e.kind() == Some("not-found") && file.exists() => Ok(Target::File(file)),
                Err(e) => Err(e.into()),
            }
        }
        None if file.exists() => Ok(Target::File(file)),
        None => {
            let socket = socket_to_try();
            if !socket.exists() {
                return Err(anyhow!(
                    "{argument}: no such file, and no daemon is at {} to know a disk of that name",
                    socket.display()
                )
                .into());
            }
            let client = Client::new(&socket)?;
            client.disk(argument).await.with_context(|| format!("{argument}: no such file"))?;
            Ok(Target::Disk(client, argument.to_owned()))
        }
    }
}

/// Several disks that are asked for together.
pub(crate) enum Group {
    /// Disks, or virtual machines, of the daemon.
    Daemon(Client, Vec<String>),
    /// Files.
    Files(Vec<PathBuf>),
}

/// The same choice as [`find`] has, for several disks; a daemon's virtual machine stands for its disks.
pub(crate) async fn find_all(global: &Global, arguments: &[PathBuf]) -> Result<Group, Failure> {
    let socket = global.api.clone().unwrap_or_else(socket_to_try);
    let files_first = global.api.is_none();
    let all_files = arguments.iter().all(|argument| argument.exists());
    if files_first && all_files {
        return Ok(Group::Files(arguments.to_vec()));
    }
    if files_first && !socket.exists() {
        let missing = arguments.iter().find(|argument| !argument.exists()).unwrap_or(&arguments[0]);
        let (missing, socket) = (missing.display(), socket.display());
        return Err(anyhow!(
            "{missing}: no such file, and no daemon is at {socket} to know a disk or a virtual machine of that name"
        )
        .into());
    }
    let client = Client::new(&socket)?;
    let disks = client.disks().await?.disks;
    let known = |name: &str| disks.iter().any(|disk| disk.spec.name == name || disk.spec.vm.as_deref() == Some(name));
    let (mut names, mut files) = (Vec::new(), Vec::new());
    for argument in arguments {
        let is_file = argument.exists();
        match argument.to_str().filter(|name| known(name)) {
            Some(name) if !(files_first && is_file) => names.push(name.to_owned()),
            _ if is_file => files.push(argument.clone()),
            _ => {
                return Err(anyhow!(
                    "{}: no such file, and the daemon at {} has neither a disk nor a virtual machine of that name; \
                     `highwater disk list` shows all",
                    argument.display(),
                    socket.display()
                )
                .into());
            }
        }
    }
    match (names.first(), files.first()) {
        (Some(name), Some(file)) => Err(anyhow!(
            "{} is a file, and {name} belongs to the daemon: one call is of files or of the daemon's disks; add the \
             file with `highwater disk add`, or make two calls",
            file.display()
        )
        .into()),
        (Some(_), None) => Ok(Group::Daemon(client, names)),
        (None, _) => Ok(Group::Files(files)),
    }
}

/// A file with its history.
pub(crate) fn history_source(file: &Path, of: &HistoryOfArgs) -> Result<HistorySource, Failure> {
    let history_file = of.history_file.as_deref().map(absolute).transpose()?;
    Ok(HistorySource {
        file: file.to_owned(),
        format: of.format,
        history: HistorySpec { file: history_file, ..HistorySpec::default() },
    })
}

/// Files with their histories.
pub(crate) fn history_sources(files: &[PathBuf], of: &HistoryOfArgs) -> Result<Vec<HistorySource>, Failure> {
    if files.len() > 1 && of.history_file.is_some() {
        return Err(anyhow!("--history-file names the history of one file, but there are {}", files.len()).into());
    }
    files.iter().map(|file| history_source(file, of)).collect()
}

/// Options of a file's history, which a disk of the daemon has no use for.
pub(crate) fn history_options(of: &HistoryOfArgs) -> [(&'static str, bool); 2] {
    [("-f", of.format.is_some()), ("--history-file", of.history_file.is_some())]
}

/// The client of the daemon that `--api` names, or of the one on the default socket.
pub(crate) fn client(global: &Global) -> Result<Client, Failure> {
    Ok(Client::new(&global.api.clone().unwrap_or_else(socket_to_try))?)
}

/// Refuses options that say how a file is opened, for a disk that is open already.
pub(crate) fn refuse_file_options(disk: &str, options: &[(&str, bool)]) -> Result<(), Failure> {
    match options.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((option, _)) => {
            let text = "says how a file is opened, but a disk of the daemon is open already";
            Err(anyhow!("{disk}: {option} {text}; leave it out, or write ./{disk} for a file of that name").into())
        }
    }
}

/// An image to read: of a file, or of a disk together with the daemon that has it.
pub(crate) async fn source(
    global: &Global,
    argument: &Path,
    how: SourceSpec,
    options: &[(&str, bool)],
) -> Result<(Option<Client>, SourceSpec), Failure> {
    match find(global, argument).await? {
        Target::File(file) => Ok((None, SourceSpec { file, ..how })),
        Target::Disk(client, name) => {
            refuse_file_options(&name, options)?;
            Ok((Some(client), SourceSpec::of_disk(name)))
        }
    }
}

/// The same image for a daemon, which has its own working directory.
pub(crate) fn from_the_root(source: SourceSpec) -> Result<SourceSpec, Failure> {
    match source.disk {
        Some(_) => Ok(source),
        None => Ok(SourceSpec { file: absolute(&source.file)?, ..source }),
    }
}

/// A workshop for work on files, with a thread of its own.
pub(crate) fn workshop() -> Result<Workshop, Failure> {
    Ok(Workshop::start(Backend::Auto)?)
}

/// The path from the root; the file need not exist.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    Ok(std::path::absolute(path).with_context(|| format!("{}: not a path", path.display()))?)
}

/// A history's description from the command line.
pub(crate) fn history(args: &HistoryArgs) -> Result<HistorySpec, Failure> {
    Ok(HistorySpec {
        mode: args.history,
        file: args.history_file.as_deref().map(absolute).transpose()?,
        granule: args.history_granule,
        open_limit: args.history_open,
    })
}

/// Options from `-o K=V,…`; a comma in a value is written twice, as in qemu-img.
pub(crate) fn options(arguments: &[String]) -> Result<engine::images::request::Options, Failure> {
    let mut options = engine::images::request::Options::new();
    for argument in arguments {
        for pair in argument.replace(",,", "\0").split(',').filter(|pair| !pair.is_empty()) {
            let pair = pair.replace('\0', ",");
            let (name, value) = match pair.split_once('=') {
                Some((name, value)) => (name, value),
                None => (pair.as_str(), "on"),
            };
            options.insert(name.to_owned(), value.to_owned());
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_lists() {
        let given = ["cluster_size=64k,lazy_refcounts".to_owned(), "data_file=a,,b".to_owned()];
        let options = options(&given).unwrap();
        assert_eq!(options["cluster_size"], "64k");
        assert_eq!(options["lazy_refcounts"], "on");
        assert_eq!(options["data_file"], "a,b");
    }
}
