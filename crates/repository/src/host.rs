//! What a repository needs of the machine it runs on, as parameters, so that tests run it in a simulation.

use ring::rand::{SecureRandom, SystemRandom};
use std::time::{SystemTime, UNIX_EPOCH};

/// A clock and a source of randomness.
pub trait Host: Send + Sync {
    /// Milliseconds since 1970. May jump; the format's safety does not rest on it.
    fn now_ms(&self) -> u64;
    /// Fills `bytes` with randomness that nobody can guess; `false` if there is none.
    fn random(&self, bytes: &mut [u8]) -> bool;
}

/// The machine's own.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemHost;

impl Host for SystemHost {
    fn now_ms(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
    }

    fn random(&self, bytes: &mut [u8]) -> bool {
        SystemRandom::new().fill(bytes).is_ok()
    }
}
