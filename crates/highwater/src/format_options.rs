//! `-o help`: which options a format has.

use engine::Format;
use std::ffi::OsStr;
use std::path::Path;

const RAW: &[(&str, &str)] = &[("preallocation=off|falloc|full", "how much to set aside (off)")];

const QCOW2: &[(&str, &str)] = &[
    ("compat=0.10|1.1", "version 2 or 3 (1.1)"),
    ("cluster_size=SIZE", "bytes of a cluster, a power of two from 512 to 2M (64k)"),
    ("preallocation=off|metadata|falloc|full", "how much to set aside (off)"),
    ("lazy_refcounts=on|off", "whether reference counts may be written late (off)"),
    ("refcount_bits=1|2|4|8|16|32|64", "width of a reference count (16)"),
    ("compression_type=zlib|zstd", "how clusters are compressed (zlib)"),
    ("extended_l2=on|off", "clusters with 32 subclusters (off)"),
    ("data_file=NAME", "another file that holds the guest's bytes"),
    ("data_file_raw=on|off", "whether that file is to be a raw image in its own right (off)"),
];

/// The list, when the arguments ask for it; nothing else need be right in them.
pub(crate) fn asked_for(args: &[std::ffi::OsString]) -> Option<String> {
    let words: Vec<&str> = args.iter().filter_map(|arg| arg.to_str()).collect();
    let verb = words.iter().find(|word| ["create", "convert", "measure"].contains(word))?;
    let asks = |value: &str| value == "help" || value == "?";
    let after = |options: &[&str], matches: &dyn Fn(&str) -> bool| {
        words.iter().enumerate().find_map(|(n, word)| {
            let value = options.iter().find_map(|option| {
                if word == option {
                    return words.get(n + 1).copied();
                }
                let rest = word.strip_prefix(option)?;
                let rest = if option.starts_with("--") { rest.strip_prefix('=')? } else { rest };
                (!rest.is_empty()).then_some(rest)
            });
            value.filter(|value| matches(value))
        })
    };
    after(&["-o", "--options"], &asks)?;
    let options: &[&str] = if *verb == "create" { &["-f", "--format"] } else { &["-O", "--output-format"] };
    let named = after(options, &|_| true).and_then(|word| word.parse::<Format>().ok());
    // Otherwise the last name is the new image's, as far as one can tell.
    let by_name = || words.iter().rev().find_map(|word| engine::format_policy::by_name(Path::new(OsStr::new(word))));
    Some(list(named.or_else(by_name).unwrap_or(Format::Raw)))
}

fn list(format: Format) -> String {
    let options = match format {
        Format::Raw => RAW,
        Format::Qcow2 => QCOW2,
    };
    let mut text = format!("options of {format}, given as -o NAME=VALUE,…:");
    for (option, what) in options {
        text.push_str(&format!("\n  {option:<40} {what}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(line: &str) -> Option<String> {
        asked_for(&line.split(' ').map(Into::into).collect::<Vec<_>>())
    }

    #[test]
    fn who_asks_gets_the_list() {
        for line in [
            "create -f qcow2 -o help",
            "convert -O qcow2 -o ?",
            "measure --output-format=qcow2 --options=help",
            "create -ohelp x.qcow2 1G",
        ] {
            assert!(asked(line).unwrap_or_default().contains("cluster_size"), "{line}");
        }
        assert!(asked("create -o help a.raw").unwrap().contains("options of raw"));
        for line in ["create -f qcow2 -o cluster_size=4k a 1G", "info help", "create help 1G"] {
            assert_eq!(asked(line), None, "{line}");
        }
    }

    #[test]
    fn every_listed_option_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let workshop = engine::images::Workshop::start(engine::Backend::Threads).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for (format, options) in [(Format::Raw, RAW), (Format::Qcow2, QCOW2)] {
            for (option, _) in options {
                let (name, values) = option.split_once('=').unwrap();
                let value = match values {
                    "SIZE" => "32k",
                    "NAME" => "data",
                    list => list.rsplit('|').next().unwrap(),
                };
                let mut spec = engine::images::request::CreateSpec {
                    file: dir.path().join(format!("{name}.img")),
                    format,
                    size: Some(1 << 20),
                    options: [(name.to_owned(), value.to_owned())].into(),
                    backing: None,
                    unsafe_backing: false,
                };
                if name == "data_file_raw" {
                    spec.options.insert("data_file".to_owned(), "raw-data".to_owned());
                }
                let made = runtime.block_on(workshop.create(spec, engine::images::Progress::new()));
                made.unwrap_or_else(|e| panic!("{option}: {e}"));
            }
        }
    }
}
