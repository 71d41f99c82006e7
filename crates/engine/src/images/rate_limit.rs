//! A limit of bytes a second, as a token bucket.

use std::time::{Duration, Instant};

/// How much of a second's bytes may go at once after a rest.
const BURST: f64 = 0.1;
/// A shorter wait is not worth a timer.
const SHORTEST: Duration = Duration::from_millis(1);

/// Tokens are bytes. Whoever finds any takes all that it needs, also more than there are: the bucket is in debt then, and
/// nobody goes on until that is paid. So pieces of any size keep to the rate, and small ones are not put together.
///
/// The clock is the caller's.
#[derive(Debug)]
pub(super) struct RateLimit {
    /// Bytes a second; `None`: as fast as it goes.
    rate: Option<u64>,
    /// Bytes that may go now; below zero: debt.
    tokens: f64,
    /// When `tokens` was true.
    at: Instant,
}

impl RateLimit {
    /// No limit.
    pub(super) fn none(now: Instant) -> Self {
        Self { rate: None, tokens: 0.0, at: now }
    }

    /// Bytes a second.
    pub(super) fn rate(&self) -> Option<u64> {
        self.rate
    }

    /// Another limit from now on. Debt is kept, and is paid at the new rate. 0 is taken for 1.
    pub(super) fn set_rate(&mut self, rate: Option<u64>, now: Instant) {
        self.refill(now);
        let fresh = self.rate.is_none();
        self.rate = rate.map(|rate| rate.max(1));
        let burst = self.burst();
        self.tokens = if fresh { burst } else { self.tokens.min(burst) };
        self.at = now;
    }

    fn burst(&self) -> f64 {
        self.rate.map_or(0.0, |rate| (rate as f64 * BURST).max(1.0))
    }

    fn refill(&mut self, now: Instant) {
        let Some(rate) = self.rate else { return };
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * rate as f64).min(self.burst());
        self.at = self.at.max(now);
    }

    /// Takes the bytes and returns `None`, or takes nothing and says how long to wait, at this rate, before asking again.
    /// No bytes need no waiting.
    pub(super) fn take(&mut self, bytes: u64, now: Instant) -> Option<Duration> {
        let rate = self.rate?;
        if bytes == 0 {
            return None;
        }
        self.refill(now);
        if self.tokens > 0.0 {
            self.tokens -= bytes as f64;
            return None;
        }
        // A second's bytes are a lower bound of 1, so this is a number that a duration can hold.
        Some(Duration::from_secs_f64((-self.tokens / rate as f64).min(1e9)).max(SHORTEST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Moves pieces for `seconds` from `start` on, and returns the bytes.
    fn moved(limit: &mut RateLimit, start: Instant, seconds: u64, pieces: &[u64]) -> u64 {
        let (mut now, mut moved) = (start, 0);
        let end = start + Duration::from_secs(seconds);
        for piece in pieces.iter().cycle() {
            while let Some(wait) = limit.take(*piece, now) {
                now += wait;
                if now >= end {
                    return moved;
                }
            }
            moved += piece;
            now += Duration::from_micros(20);
            if now >= end {
                return moved;
            }
        }
        moved
    }

    #[test]
    fn pieces_of_any_size_keep_to_the_rate() {
        for (rate, pieces) in [
            (1u64 << 20, &[4096u64][..]),
            (1 << 20, &[2 << 20]),
            (60 << 20, &[1, 64 << 10, 2 << 20, 512]),
            (1 << 30, &[1 << 20]),
            (1000, &[4096, 512]),
        ] {
            let start = Instant::now();
            let mut limit = RateLimit::none(start);
            limit.set_rate(Some(rate), start);
            let all = moved(&mut limit, start, 100, pieces);
            let (least, most) = (rate * 98, rate * 101 + pieces.iter().max().unwrap());
            assert!((least..=most).contains(&all), "{all} bytes in 100 s at {rate} a second");
        }
    }

    #[test]
    fn a_rest_is_worth_a_tenth_of_a_second() {
        let start = Instant::now();
        let mut limit = RateLimit::none(start);
        limit.set_rate(Some(1_000_000), start);
        let later = start + Duration::from_secs(3600);
        let mut at_once = 0;
        while limit.take(1000, later).is_none() {
            at_once += 1000;
        }
        assert_eq!(at_once, 100_000);
        assert_eq!(limit.take(1, later), Some(SHORTEST));
    }

    #[test]
    fn another_rate_counts_at_once() {
        let start = Instant::now();
        let mut limit = RateLimit::none(start);
        assert_eq!(limit.take(u64::MAX, start), None, "no limit");
        limit.set_rate(Some(1000), start);
        assert_eq!(limit.take(10_000, start), None, "what is larger than the burst goes, too");
        let wait = limit.take(1, start).unwrap();
        assert!((9.8..10.1).contains(&wait.as_secs_f64()), "{wait:?}");
        assert_eq!(limit.take(0, start), None, "nothing need not wait");
        limit.set_rate(Some(100_000), start);
        let wait = limit.take(1, start).unwrap();
        assert!((0.09..0.11).contains(&wait.as_secs_f64()), "{wait:?}");
        limit.set_rate(None, start);
        assert_eq!(limit.take(u64::MAX, start), None);
        // A clock that went back, a rate of nothing, a debt beyond all measure.
        limit.set_rate(Some(0), start);
        assert_eq!(limit.take(u64::MAX, start), None);
        assert!(limit.take(1, start - Duration::from_secs(1)).unwrap() > Duration::from_secs(3600));
    }
}
