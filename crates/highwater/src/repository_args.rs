//! The grammar of the verbs for repositories, and what opens a repository.

use crate::exit::Failure;
use crate::size::parse_size;
use anyhow::{Context, anyhow};
use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Args, Subcommand};
use engine::backup::{FirstKey, KeepSpec, NewKey, RepositorySpec};
use std::path::{Path, PathBuf};

/// A key file's path, when no option names one.
const KEY_FILE: &str = "HIGHWATER_KEY_FILE";
/// A passphrase file's path, when no option names one.
const PASSPHRASE_FILE: &str = "HIGHWATER_PASSPHRASE_FILE";

/// A repository, and what opens it.
#[derive(Clone, Debug, Args)]
pub(crate) struct RepositoryOfArgs {
    /// The repository's directory
    #[arg(value_name = "REPO")]
    pub(crate) repository: PathBuf,
    #[command(flatten)]
    pub(crate) key: KeyOfArgs,
}

impl RepositoryOfArgs {
    /// What the engine is told.
    pub(crate) fn spec(&self) -> Result<RepositorySpec, Failure> {
        self.key.spec(&self.repository)
    }
}

/// What opens a repository.
#[derive(Clone, Debug, Args)]
pub(crate) struct KeyOfArgs {
    /// The file with its key [default: $HIGHWATER_KEY_FILE, or where `repo init` has put it]
    #[arg(long, value_name = "FILE", conflicts_with = "passphrase_file")]
    pub(crate) key_file: Option<PathBuf>,
    /// The file whose first line is its passphrase [default: $HIGHWATER_PASSPHRASE_FILE]
    #[arg(long, value_name = "FILE")]
    pub(crate) passphrase_file: Option<PathBuf>,
}

impl KeyOfArgs {
    /// What the engine is told of the repository in this place.
    pub(crate) fn spec(&self, repository: &Path) -> Result<RepositorySpec, Failure> {
        let (key_file, passphrase_file) = given(self.key_file.as_deref(), self.passphrase_file.as_deref())?;
        Ok(RepositorySpec { directory: directory(repository)?, key_file, passphrase_file })
    }
}

/// The absolute path of a repository's directory.
fn directory(repository: &Path) -> Result<PathBuf, Failure> {
    if repository.as_os_str().as_encoded_bytes().starts_with(b"s3://") {
        let text = "repositories in S3 are not there yet; name a directory";
        return Err(anyhow!("{}: {text}", repository.display()).into());
    }
    absolute(repository)
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    Ok(std::path::absolute(path).with_context(|| format!("{}: not a path", path.display()))?)
}

/// The absolute paths of a key file and a passphrase file: by option, or by environment where there is neither option.
fn given(
    key_file: Option<&Path>,
    passphrase_file: Option<&Path>,
) -> Result<(Option<PathBuf>, Option<PathBuf>), Failure> {
    let absolute = |file: Option<&Path>| file.map(absolute).transpose();
    if key_file.is_some() || passphrase_file.is_some() {
        return Ok((absolute(key_file)?, absolute(passphrase_file)?));
    }
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match (set(KEY_FILE), set(PASSPHRASE_FILE)) {
        (Some(_), Some(_)) => {
            Err(anyhow!("{KEY_FILE} and {PASSPHRASE_FILE} are both set; unset one, or give --key-file").into())
        }
        (key_file, passphrase_file) => Ok((absolute(key_file.as_deref())?, absolute(passphrase_file.as_deref())?)),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum RepoVerb {
    /// Make a repository; it is encrypted with a new key unless something else is said
    Init(InitArgs),
    /// Work with a repository's keys
    #[command(subcommand)]
    Key(RepoKeyVerb),
    /// Check whether all that points need is there, without reading the data
    Check {
        #[command(flatten)]
        of: RepositoryOfArgs,
    },
    /// Read the data of all points, and prove it
    Verify {
        #[command(flatten)]
        of: RepositoryOfArgs,
        /// Read about so many percent of it alone, others each time
        #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
        sample: Option<u8>,
        /// Threads that read [default: one for each processor]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
        threads: Option<u16>,
    },
    /// Show how much is in a repository
    Stats {
        #[command(flatten)]
        of: RepositoryOfArgs,
    },
    /// Delete what no point needs any more; backups may go on meanwhile
    Prune {
        #[command(flatten)]
        of: RepositoryOfArgs,
        /// How long what nothing needs stays before it is deleted, with a suffix s, min, h or d [default: 1d]
        #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
        grace: Option<u64>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// The repository's directory, which must be empty or not exist
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
    #[command(flatten)]
    pub(crate) key: FirstKeyArgs,
    /// Bytes that are stored and recognised as one, a power of two, 16k to 1M [default: 64k]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) leaf_size: Option<u64>,
    /// Bytes of the files in which they are stored, 16M to 64M [default: 32M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) pack_size: Option<u64>,
}

/// What will open a new repository.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub(crate) struct FirstKeyArgs {
    /// Write the new key into this file, which must not exist [default: $HIGHWATER_KEY_FILE, or a file in
    /// ~/.config/highwater/keys]
    #[arg(long, value_name = "FILE")]
    pub(crate) key_file: Option<PathBuf>,
    /// Use the first line of this file as a passphrase instead of a key [default: $HIGHWATER_PASSPHRASE_FILE]
    #[arg(long, value_name = "FILE")]
    pub(crate) passphrase_file: Option<PathBuf>,
    /// Do not encrypt: who can read the repository can read the disks
    #[arg(long)]
    pub(crate) no_encryption: bool,
}

impl InitArgs {
    /// The directory, and what will open the repository.
    pub(crate) fn place(&self) -> Result<(PathBuf, FirstKey), Failure> {
        let FirstKeyArgs { key_file, passphrase_file, no_encryption } = &self.key;
        let directory = directory(&self.directory)?;
        if *no_encryption {
            return Ok((directory, FirstKey::Open));
        }
        let key = match given(key_file.as_deref(), passphrase_file.as_deref())? {
            (Some(file), _) => FirstKey::KeyFile(file),
            (_, Some(file)) => FirstKey::Passphrase(file),
            _ => FirstKey::Generated,
        };
        Ok((directory, key))
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum RepoKeyVerb {
    /// Show all keys; none of their secrets
    List {
        #[command(flatten)]
        of: RepositoryOfArgs,
    },
    /// Add a key beside the others
    Add {
        #[command(flatten)]
        of: RepositoryOfArgs,
        #[command(flatten)]
        new: NewKeyArgs,
        /// What people call it
        #[arg(long, value_name = "TEXT", default_value = "")]
        label: String,
    },
    /// Put a new key in the place of another
    Rotate {
        #[command(flatten)]
        of: RepositoryOfArgs,
        /// The key that goes: its id, or the first digits of it
        #[arg(value_name = "OLD-ID", value_parser = NonEmptyStringValueParser::new())]
        old: String,
        #[command(flatten)]
        new: NewKeyArgs,
        /// What people call the new one [default: as the old one]
        #[arg(long, value_name = "TEXT")]
        label: Option<String>,
    },
    /// Remove a key, but not the last one
    Revoke {
        #[command(flatten)]
        of: RepositoryOfArgs,
        /// The key: its id, or the first digits of it
        #[arg(value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
        id: String,
    },
}

/// A new key of a repository.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct NewKeyArgs {
    /// Generate a key, and write it into this file, which must not exist
    #[arg(long, value_name = "FILE")]
    pub(crate) new_key_file: Option<PathBuf>,
    /// Use the first line of this file as a passphrase
    #[arg(long, value_name = "FILE")]
    pub(crate) new_passphrase_file: Option<PathBuf>,
}

impl NewKeyArgs {
    /// What the engine is told.
    pub(crate) fn spec(&self) -> Result<NewKey, Failure> {
        match (&self.new_key_file, &self.new_passphrase_file) {
            (Some(file), _) => Ok(NewKey::KeyFile(absolute(file)?)),
            (_, Some(file)) => Ok(NewKey::Passphrase(absolute(file)?)),
            // The grammar does not let this happen.
            (None, None) => Err(anyhow!("give --new-key-file or --new-passphrase-file").into()),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct PointsArgs {
    #[command(flatten)]
    pub(crate) of: RepositoryOfArgs,
}

#[derive(Debug, Args)]
#[command(override_usage = "highwater forget [OPTIONS] <REPO> <POINT>...\n       \
                             highwater forget [OPTIONS] <REPO> --keep-last <N> …")]
#[command(group(ArgGroup::new("what").args(["points", "keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly"]).required(true).multiple(true)))]
pub(crate) struct ForgetArgs {
    #[command(flatten)]
    pub(crate) of: RepositoryOfArgs,
    /// Points: their ids, the first digits of those, or latest
    #[arg(value_name = "POINT", value_parser = NonEmptyStringValueParser::new(), conflicts_with = "KeepArgs")]
    pub(crate) points: Vec<String>,
    #[command(flatten)]
    pub(crate) keep: KeepArgs,
    /// Judge the points of this machine alone
    #[arg(long, value_name = "NAME", requires = "KeepArgs")]
    pub(crate) vm: Option<String>,
    /// Show what would be forgotten, and forget nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Which points of each machine are kept.
#[derive(Debug, Args)]
pub(crate) struct KeepArgs {
    /// Keep the newest N of each machine
    #[arg(long, value_name = "N")]
    pub(crate) keep_last: Option<u32>,
    /// Keep the newest of each hour, for the latest N hours that have any
    #[arg(long, value_name = "N")]
    pub(crate) keep_hourly: Option<u32>,
    /// The same for days, which begin at 0:00 UTC
    #[arg(long, value_name = "N")]
    pub(crate) keep_daily: Option<u32>,
    /// The same for weeks, which begin on Monday
    #[arg(long, value_name = "N")]
    pub(crate) keep_weekly: Option<u32>,
    /// The same for months
    #[arg(long, value_name = "N")]
    pub(crate) keep_monthly: Option<u32>,
    /// The same for years
    #[arg(long, value_name = "N")]
    pub(crate) keep_yearly: Option<u32>,
}

impl From<&KeepArgs> for KeepSpec {
    fn from(args: &KeepArgs) -> Self {
        let number = Option::unwrap_or_default;
        Self {
            last: number(args.keep_last),
            hourly: number(args.keep_hourly),
            daily: number(args.keep_daily),
            weekly: number(args.keep_weekly),
            monthly: number(args.keep_monthly),
            yearly: number(args.keep_yearly),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    #[command(flatten)]
    pub(crate) of: RepositoryOfArgs,
    /// A point: its id, the first digits of it, or latest
    #[arg(value_name = "A", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) old: String,
    /// Another one
    #[arg(value_name = "B", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) new: String,
    /// Compare this disk alone
    #[arg(long, value_name = "NAME")]
    pub(crate) disk: Option<String>,
}

/// Milliseconds from a whole number with one of the suffixes `s`, `min`, `h` and `d`; 0 needs none.
fn parse_duration(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is not a duration: expected a whole number with one of the suffixes s min h d");
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let seconds = match suffix {
        "s" => 1,
        "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        "" if number == 0 => 0,
        _ => return Err(bad()),
    };
    number.checked_mul(seconds * 1000).ok_or_else(|| format!("{text:?} is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;
    use clap::Parser;

    #[test]
    fn durations() {
        for (text, ms) in
            [("0", 0), ("0s", 0), ("90s", 90_000), ("5min", 300_000), ("2h", 7_200_000), ("1d", 86_400_000)]
        {
            assert_eq!(parse_duration(text), Ok(ms), "{text}");
        }
        for text in ["", "1", "d", "1.5h", "-1d", "1m", "1 d", "99999999999999999d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_goes_together() {
        let parse = |line: &str| Cli::try_parse_from(std::iter::once("highwater").chain(line.split(' ')));
        for line in [
            "repo init /r",
            "repo init /r --key-file /k --leaf-size 128k --pack-size 16M",
            "repo init /r --no-encryption",
            "repo key list /r --passphrase-file /p",
            "repo key add /r --new-key-file /k --label Anna",
            "repo key rotate /r 12ab --new-passphrase-file /p --key-file /k",
            "repo key revoke /r 12ab",
            "repo check /r --json",
            "repo verify /r --sample 10 --threads 4",
            "repo stats /r",
            "repo prune /r --grace 1h",
            "points /r",
            "forget /r 12ab latest --dry-run",
            "forget /r --keep-last 3 --keep-yearly 1 --vm a",
            "diff /r 12ab latest --disk a",
        ] {
            parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
        for line in [
            "repo init",
            "repo init /r --key-file /k --no-encryption",
            "repo init /r --key-file /k --passphrase-file /p",
            "repo key list /r --key-file /k --passphrase-file /p",
            "repo key add /r",
            "repo key add /r --new-key-file /k --new-passphrase-file /p",
            "repo key rotate /r --new-key-file /k",
            "repo verify /r --sample 0",
            "repo prune /r --grace 1",
            "forget /r",
            "forget /r --vm a",
            "forget /r 12ab --vm a",
            "forget /r 12ab --keep-last 1",
            "diff /r latest",
        ] {
            assert!(parse(line).is_err(), "{line} was understood");
        }
    }
}
