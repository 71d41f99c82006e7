//! Sizes as people write them.

use engine::images::request::NewSize;

/// Bytes from a number with one of the suffixes `b k M G T P E` (powers of 1,024), perhaps followed by `B` or `iB`; a
/// fraction is allowed with a suffix.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is not a size: expected a number with one of the suffixes k M G T P E");
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let unit = suffix.strip_suffix("iB").or_else(|| suffix.strip_suffix('B')).unwrap_or(suffix);
    let shift = match unit {
        "" | "b" => 0,
        "k" | "K" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "P" | "p" => 50,
        "E" | "e" => 60,
        _ => return Err(bad()),
    };
    let size = match number.split_once('.') {
        None => number.parse::<u64>().map_err(|_| bad())?.checked_mul(1 << shift),
        Some(_) if shift == 0 => return Err(bad()),
        Some((whole, part)) => {
            let whole: u64 = whole.parse().map_err(|_| bad())?;
            if part.is_empty() || part.len() > 18 {
                return Err(bad());
            }
            let digits: u128 = part.parse().map_err(|_| bad())?;
            let part = (digits << shift) / 10u128.pow(part.len() as u32);
            whole.checked_mul(1 << shift).and_then(|w| w.checked_add(part as u64))
        }
    };
    size.filter(|s| *s <= i64::MAX as u64).ok_or_else(|| format!("{text:?} is more than a file can hold"))
}

/// A size, or a change when a sign stands before it.
pub(crate) fn parse_new_size(text: &str) -> Result<NewSize, String> {
    if let Some(rest) = text.strip_prefix('+') {
        parse_size(rest).map(NewSize::Grow)
    } else if let Some(rest) = text.strip_prefix('-') {
        parse_size(rest).map(NewSize::Shrink)
    } else {
        parse_size(text).map(NewSize::To)
    }
}

/// Bytes a second; `None`: as many as it goes. (A type of its own, because the grammar takes an `Option` for an argument
/// that may be absent.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RateArg(pub(crate) Option<u64>);

/// Bytes a second as [`parse_size`] has them, or `none`.
pub(crate) fn parse_rate(text: &str) -> Result<RateArg, String> {
    match text {
        "none" => Ok(RateArg(None)),
        _ => match parse_size(text.strip_suffix("/s").unwrap_or(text)) {
            Ok(0) => Err("nothing would ever be done at a rate of 0; `highwater jobs pause` holds a job up".to_owned()),
            Ok(rate) => Ok(RateArg(Some(rate))),
            Err(error) => Err(error),
        },
    }
}

/// Seconds for people.
pub(crate) fn human_seconds(seconds: u64) -> String {
    match seconds {
        0..100 => format!("{seconds} s"),
        100..5940 => format!("{} min", seconds.div_ceil(60)),
        _ if seconds < 100 * 3600 => {
            let minutes = seconds.div_ceil(60);
            format!("{} h {} min", minutes / 60, minutes % 60)
        }
        _ => format!("{} days", seconds.div_ceil(86_400)),
    }
}

/// Bytes for people, as qemu-img writes them: three digits that matter and a unit.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let text = if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    };
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("1k", 1024), ("10G", 10 << 30), ("1.5M", 3 << 19), ("2MiB", 2 << 20), ("7b", 7)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "x", "1x", "1.5", "1.", "-1", "1 G", "9E", "99999999999999999999"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(parse_new_size("+1k"), Ok(NewSize::Grow(1024)));
        assert_eq!(parse_new_size("-1k"), Ok(NewSize::Shrink(1024)));
        assert_eq!(parse_new_size("1k"), Ok(NewSize::To(1024)));
    }

    #[test]
    fn for_people() {
        for (bytes, text) in
            [(0, "0 B"), (10 << 20, "10 MiB"), (216 << 10, "216 KiB"), (1 << 30, "1 GiB"), (3 << 29, "1.5 GiB")]
        {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn rates_and_times() {
        assert_eq!(parse_rate("60M"), Ok(RateArg(Some(60 << 20))));
        assert_eq!(parse_rate("1.5GiB/s"), Ok(RateArg(Some(3 << 29))));
        assert_eq!(parse_rate("none"), Ok(RateArg(None)));
        assert!(parse_rate("0").is_err() && parse_rate("/s").is_err() && parse_rate("fast").is_err());
        for (seconds, text) in [
            (0, "0 s"),
            (99, "99 s"),
            (100, "2 min"),
            (5939, "99 min"),
            (5940, "1 h 39 min"),
            (359_999, "100 h 0 min"),
            (360_000, "5 days"),
        ] {
            assert_eq!(human_seconds(seconds), text);
        }
    }
}
