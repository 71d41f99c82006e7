//! Messages that clients can cause, and so must not be able to cause without bound.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Least time between two messages of one kind.
const PAUSE: Duration = Duration::from_secs(1);

/// When a message was last said, and how often it was left out since.
#[derive(Debug, Default)]
pub(crate) struct Occasional(Mutex<(Option<Instant>, u64)>);

impl Occasional {
    /// How many were left out, if it is time to say one; else this one is left out as well.
    pub(crate) fn due(&self) -> Option<u64> {
        let mut state = self.0.lock().expect("no panic while the lock is held");
        let (last, unsaid) = &mut *state;
        let now = Instant::now();
        if last.is_some_and(|last| now.duration_since(last) < PAUSE) {
            *unsaid += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_the_first_and_counts_the_others() {
        let messages = Occasional::default();
        assert_eq!(messages.due(), Some(0));
        assert_eq!((messages.due(), messages.due()), (None, None));
        messages.0.lock().unwrap().0 = Instant::now().checked_sub(PAUSE);
        assert_eq!(messages.due(), Some(2));
    }
}
