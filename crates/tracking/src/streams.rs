//! Sequential writers, for whom intents are written ahead.

/// Writers that are followed at the same time.
const STREAMS: usize = 8;

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// Where the next write is expected.
    next: u64,
    /// Granules to declare ahead.
    window: u64,
    /// When it was seen last.
    seen: u64,
}

/// Finds writers that go on where they ended.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    streams: [Stream; STREAMS],
    clock: u64,
}

impl Streams {
    /// A write needed intents for `start..end`: how many granules behind it will probably be written next. At most `most`.
    pub(crate) fn ahead_of(&mut self, start: u64, end: u64, most: u64) -> u64 {
        self.clock += 1;
        let clock = self.clock;
        let known = self.streams.iter_mut().find(|s| s.seen > 0 && (s.next == start || s.next == start + 1));
        if let Some(stream) = known {
            stream.window = (stream.window * 2).clamp(1, most.max(1));
            stream.seen = clock;
            let ahead = stream.window.min(most);
            stream.next = end + ahead;
            return ahead;
        }
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|s| s.seen) {
            *oldest = Stream { next: end, window: 0, seen: clock };
        }
        0
    }

    /// The window of the writer for whom everything up to `end` is declared.
    pub(crate) fn window_up_to(&self, end: u64) -> Option<u64> {
        self.streams.iter().find(|s| s.window > 0 && s.next == end).map(|s| s.window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_double_and_random_writes_have_none() {
        let mut streams = Streams::default();
        let mut at = 100;
        let mut windows = Vec::new();
        for _ in 0..6 {
            let ahead = streams.ahead_of(at, at + 1, 8);
            windows.push(ahead);
            at += 1 + ahead;
        }
        assert_eq!(windows, [0, 1, 2, 4, 8, 8]);
        let mut random = fastrand::Rng::with_seed(1);
        let hits = (0..1000).filter(|_| streams.ahead_of(random.u64(0..1 << 40), 1 << 41, 8) > 0).count();
        assert_eq!(hits, 0);
    }
}
