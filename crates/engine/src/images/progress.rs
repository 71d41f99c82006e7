//! How far long work is, and the wish that it stop.

use crate::EngineError;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use utoipa::ToSchema;

/// What progress is counted in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProgressUnit {
    /// Bytes.
    #[default]
    Bytes,
    /// Tables of an image's metadata.
    Tables,
}

/// Shared between who works, who shows the progress, and who may stop it.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    done: AtomicU64,
    total: AtomicU64,
    tables: AtomicBool,
    cancelled: AtomicBool,
}

impl Progress {
    /// Nothing done of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says what is counted; bytes unless this is called.
    pub fn set_unit(&self, unit: ProgressUnit) {
        self.0.tables.store(unit == ProgressUnit::Tables, Ordering::Relaxed);
    }

    /// What is counted.
    pub fn unit(&self) -> ProgressUnit {
        if self.0.tables.load(Ordering::Relaxed) { ProgressUnit::Tables } else { ProgressUnit::Bytes }
    }

    /// Says how much there is to do.
    pub fn set_total(&self, total: u64) {
        self.0.total.store(total, Ordering::Relaxed);
    }

    /// Says that so much more is done.
    pub fn advance(&self, done: u64) {
        self.0.done.fetch_add(done, Ordering::Relaxed);
    }

    /// How much is done, and how much there is to do in all; 0 when that is not known.
    pub fn now(&self) -> (u64, u64) {
        let total = self.0.total.load(Ordering::Relaxed);
        (self.0.done.load(Ordering::Relaxed).min(total), total)
    }

    /// Part done, 0 to 100.
    pub fn percent(&self) -> u8 {
        match self.now() {
            (_, 0) => 0,
            (done, total) => (u128::from(done) * 100 / u128::from(total)) as u8,
        }
    }

    /// Asks the work to stop soon.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    /// For the work to call between two steps.
    ///
    /// # Errors
    /// [`EngineError::Cancelled`] when it was asked to stop.
    pub fn check(&self) -> Result<(), EngineError> {
        if self.is_cancelled() { Err(EngineError::Cancelled) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_is_bounded() {
        let progress = Progress::new();
        assert_eq!(progress.percent(), 0);
        progress.set_total(u64::MAX);
        progress.advance(u64::MAX / 2 + 1);
        assert_eq!(progress.percent(), 50);
        progress.advance(u64::MAX / 2);
        assert_eq!(progress.percent(), 100);
        assert!(progress.check().is_ok());
        progress.clone().cancel();
        assert!(matches!(progress.check(), Err(EngineError::Cancelled)));
    }
}
