//! How fast work goes, smoothed.

use std::time::{Duration, Instant};

/// What is this old counts for a third of what is new.
const MEMORY: Duration = Duration::from_secs(5);
/// Looks that follow each other faster than this are one.
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);

/// An average in which what is longer ago weighs less. It is fed when somebody looks. Time in which the work is stopped does
/// not count.
#[derive(Debug)]
pub(super) struct RateMeter {
    /// When it was looked last, and how much was done then.
    at: Instant,
    done: u64,
    /// Sum of the rates seen, each times its weight, and of the weights.
    sum: f64,
    weight: f64,
    stopped: bool,
}

impl RateMeter {
    pub(super) fn new(now: Instant) -> Self {
        Self { at: now, done: 0, sum: 0.0, weight: 0.0, stopped: false }
    }

    /// How much is done in a second now; `None` while that is not known.
    pub(super) fn look(&mut self, done: u64, now: Instant) -> Option<f64> {
        if self.stopped {
            return Some(0.0);
        }
        if now.saturating_duration_since(self.at) >= BETWEEN_LOOKS {
            self.add(done, now);
        }
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }

    fn add(&mut self, done: u64, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        if passed > 0.0 {
            let rate = done.saturating_sub(self.done) as f64 / passed;
            let kept = (-passed / MEMORY.as_secs_f64()).exp();
            self.sum = self.sum * kept + rate * (1.0 - kept);
            self.weight = self.weight * kept + (1.0 - kept);
        }
        (self.at, self.done) = (now, done);
    }

    /// The work rests from now on.
    pub(super) fn stop(&mut self, done: u64, now: Instant) {
        if !self.stopped {
            self.add(done, now);
            self.stopped = true;
        }
    }

    /// The work goes on.
    pub(super) fn go_on(&mut self, done: u64, now: Instant) {
        if self.stopped {
            (self.at, self.done, self.stopped) = (now, done, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: Option<f64>, expected: f64) {
        let found = found.unwrap();
        assert!((found - expected).abs() <= expected * 0.02, "expected {expected}, found {found}");
    }

    #[test]
    fn an_even_rate_is_told_from_the_first_look_on() {
        let start = Instant::now();
        let mut meter = RateMeter::new(start);
        assert_eq!(meter.look(0, start), None);
        for n in 1..50u64 {
            near(meter.look(n * 1000, start + Duration::from_secs(n)), 1000.0);
        }
    }

    #[test]
    fn a_new_rate_is_followed_and_a_rest_is_left_out() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut meter = RateMeter::new(start);
        let mut done = 0;
        for n in 1..=20 {
            done += 1000;
            meter.look(done, at(n));
        }
        meter.stop(done, at(20));
        assert_eq!(meter.look(done, at(500)), Some(0.0));
        meter.go_on(done, at(1000));
        near(meter.look(done, at(1000)), 1000.0);
        done += 100;
        let soon = meter.look(done, at(1001)).unwrap();
        assert!((700.0..950.0).contains(&soon), "{soon}");
        for n in 2..=40 {
            done += 100;
            meter.look(done, at(1000 + n));
        }
        near(meter.look(done, at(1040)), 100.0);
    }
}
