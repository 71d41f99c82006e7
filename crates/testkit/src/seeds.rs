//! Runs a test for many seeds, and names the one that failed.
//!
//! `HIGHWATER_SEED=n` replays one seed; `HIGHWATER_ROUNDS=n` multiplies the number of seeds.

use std::env;

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number, found {text:?}")))
}

/// Prints its seed when dropped by a panic.
struct Announce(u64);

impl Drop for Announce {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed with seed {0}; to replay: HIGHWATER_SEED={0}", self.0);
        }
    }
}

/// Calls `test` with `count` seeds, or with the one of `HIGHWATER_SEED`.
pub fn each(count: u64, mut test: impl FnMut(u64)) {
    if let Some(seed) = number("HIGHWATER_SEED") {
        return test(seed);
    }
    for seed in 0..count.saturating_mul(number("HIGHWATER_ROUNDS").unwrap_or(1)) {
        let _announce = Announce(seed);
        test(seed);
    }
}
