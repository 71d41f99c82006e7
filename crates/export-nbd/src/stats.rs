//! Counters of an export: plain atomics that the connections raise and anybody reads.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Kinds of requests, as they are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// `NBD_CMD_READ`
    Read,
    /// `NBD_CMD_WRITE`
    Write,
    /// `NBD_CMD_FLUSH`
    Flush,
    /// `NBD_CMD_TRIM`
    Trim,
    /// `NBD_CMD_CACHE`
    Cache,
    /// `NBD_CMD_WRITE_ZEROES`
    WriteZeroes,
    /// `NBD_CMD_BLOCK_STATUS`
    BlockStatus,
    /// Commands that the server does not know.
    Unknown,
}

impl RequestKind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Trim,
        Self::Cache,
        Self::WriteZeroes,
        Self::BlockStatus,
        Self::Unknown,
    ];

    /// A label for metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::Cache => "cache",
            Self::WriteZeroes => "write_zeroes",
            Self::BlockStatus => "block_status",
            Self::Unknown => "unknown",
        }
    }
}

/// Latency buckets: bucket `n` counts requests that took less than 2^`n` µs and not less than half of that;
/// the last one counts everything longer.
pub const LATENCY_BUCKETS: usize = 25;

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
    micros: AtomicU64,
    latency: [AtomicU64; LATENCY_BUCKETS],
}

/// The counters of one export. They only grow, but for the number of connections.
#[derive(Debug, Default)]
pub struct ExportStats {
    kinds: [Counters; RequestKind::ALL.len()],
    connections: AtomicU64,
    connections_total: AtomicU64,
}

/// A reading of the counters of one kind of request. The fields were read one after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestStats {
    /// Requests answered, errors included.
    pub requests: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Bytes read, written, zeroed, … by requests that succeeded.
    pub bytes: u64,
    /// Sum of the times from a request's arrival to its reply being ready, in µs.
    pub micros: u64,
    /// See [`LATENCY_BUCKETS`].
    pub latency: [u64; LATENCY_BUCKETS],
}

impl ExportStats {
    /// Reads the counters of one kind.
    pub fn read(&self, kind: RequestKind) -> RequestStats {
        let counters = &self.kinds[kind as usize];
        RequestStats {
            requests: counters.requests.load(Relaxed),
            errors: counters.errors.load(Relaxed),
            bytes: counters.bytes.load(Relaxed),
            micros: counters.micros.load(Relaxed),
            latency: std::array::from_fn(|n| counters.latency[n].load(Relaxed)),
        }
    }

    /// Connections in transmission now.
    pub fn connections(&self) -> u64 {
        self.connections.load(Relaxed)
    }

    /// Connections that ever reached transmission.
    pub fn connections_total(&self) -> u64 {
        self.connections_total.load(Relaxed)
    }

    pub(crate) fn connected(&self) {
        self.connections.fetch_add(1, Relaxed);
        self.connections_total.fetch_add(1, Relaxed);
    }

    pub(crate) fn disconnected(&self) {
        self.connections.fetch_sub(1, Relaxed);
    }

    pub(crate) fn count(&self, kind: RequestKind, bytes: Option<u64>, took: Duration) {
        let counters = &self.kinds[kind as usize];
        counters.requests.fetch_add(1, Relaxed);
        match bytes {
            Some(bytes) => counters.bytes.fetch_add(bytes, Relaxed),
            None => counters.errors.fetch_add(1, Relaxed),
        };
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        counters.micros.fetch_add(micros, Relaxed);
        counters.latency[bucket(micros)].fetch_add(1, Relaxed);
    }
}

fn bucket(micros: u64) -> usize {
    ((u64::BITS - micros.leading_zeros()) as usize).min(LATENCY_BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_double() {
        assert_eq!([0, 1, 2, 3, 4, 1023, 1024].map(bucket), [0, 1, 2, 2, 3, 10, 11]);
        assert_eq!(bucket(u64::MAX), LATENCY_BUCKETS - 1);
    }

    #[test]
    fn counting() {
        let stats = ExportStats::default();
        stats.count(RequestKind::Read, Some(4096), Duration::from_micros(5));
        stats.count(RequestKind::Read, None, Duration::from_micros(5));
        let read = stats.read(RequestKind::Read);
        assert_eq!((read.requests, read.errors, read.bytes, read.micros, read.latency[3]), (2, 1, 4096, 10, 2));
        assert_eq!(stats.read(RequestKind::Write), RequestStats::default());
        for (n, kind) in RequestKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, n);
        }
    }
}
