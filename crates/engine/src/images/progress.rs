//! How far long work is, and the wish that it stop.

use crate::EngineError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Shared between who works, who shows the progress, and who may stop it.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Nothing done of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says how much there is to do, in bytes.
    pub fn set_total(&self, bytes: u64) {
        self.0.total.store(bytes, Ordering::Relaxed);
    }

    /// Says that so many bytes more are done.
    pub fn advance(&self, bytes: u64) {
        self.0.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes done, and bytes in all.
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
