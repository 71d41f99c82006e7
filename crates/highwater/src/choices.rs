//! Words that an option knows: listed by `--help`, refused otherwise, and offered by completions.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use engine::images::request::{PreallocationMode, RepairMode};
use engine::{CacheMode, Format, HistoryMode};

fn words(known: impl IntoIterator<Item = (&'static str, &'static str)>) -> PossibleValuesParser {
    PossibleValuesParser::new(known.into_iter().map(|(word, help)| PossibleValue::new(word).help(help)))
}

/// Image formats.
pub(crate) fn format() -> impl TypedValueParser<Value = Format> {
    words([("raw", "the guest's bytes as they are"), ("qcow2", "QEMU's copy-on-write format")]).map(|word| {
        match word.as_str() {
            "qcow2" => Format::Qcow2,
            _ => Format::Raw,
        }
    })
}

/// Ways to use the host's cache.
pub(crate) fn cache() -> impl TypedValueParser<Value = CacheMode> {
    words([
        ("none", "direct I/O past the page cache"),
        ("writeback", "through the page cache; flushes reach the disk"),
        ("unsafe", "through the page cache; flushes are ignored"),
    ])
    .map(|word| match word.as_str() {
        "none" => CacheMode::None,
        "unsafe" => CacheMode::Unsafe,
        _ => CacheMode::Writeback,
    })
}

/// Whether a history is kept.
pub(crate) fn history() -> impl TypedValueParser<Value = HistoryMode> {
    words([
        ("auto", "kept where that is possible"),
        ("on", "kept, or the disk is not opened"),
        ("off", "not kept; a history that is there is lost with the first write"),
    ])
    .map(|word| match word.as_str() {
        "on" => HistoryMode::On,
        "off" => HistoryMode::Off,
        _ => HistoryMode::Auto,
    })
}

/// What a repair may change.
pub(crate) fn repair() -> impl TypedValueParser<Value = RepairMode> {
    words([("leaks", "give lost space back"), ("all", "mend everything that can be mended")]).map(|word| {
        match word.as_str() {
            "all" => RepairMode::All,
            _ => RepairMode::Leaks,
        }
    })
}

/// How much is set aside.
pub(crate) fn preallocation() -> impl TypedValueParser<Value = PreallocationMode> {
    words([
        ("off", "nothing"),
        ("metadata", "the format's tables"),
        ("falloc", "tables and file system space"),
        ("full", "tables, and zeroes written"),
    ])
    .map(|word| match word.as_str() {
        "metadata" => PreallocationMode::Metadata,
        "falloc" => PreallocationMode::Falloc,
        "full" => PreallocationMode::Full,
        _ => PreallocationMode::Off,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Command;

    /// That every word means what the engine means by it.
    fn agree<P>(parser: P, parse: impl Fn(&str) -> Result<P::Value, String>)
    where
        P: TypedValueParser,
        P::Value: PartialEq + std::fmt::Debug,
    {
        let command = Command::new("x");
        let words: Vec<PossibleValue> = parser.possible_values().unwrap().collect();
        assert!(!words.is_empty());
        for word in words {
            let word = word.get_name();
            let parsed = parser.parse_ref(&command, None, word.as_ref()).unwrap_or_else(|e: clap::Error| panic!("{e}"));
            assert_eq!(Ok(parsed), parse(word), "{word}");
        }
    }

    #[test]
    fn words_mean_what_the_engine_means() {
        agree(format(), |word| word.parse());
        agree(cache(), |word| word.parse());
        agree(repair(), |word| word.parse());
        agree(preallocation(), |word| word.parse());
    }
}
