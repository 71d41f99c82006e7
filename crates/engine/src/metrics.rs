//! Counters in OpenMetrics' text format, read from where the data plane keeps them.

use crate::history::report::HistoryReport;
use crate::{DiskState, DiskStatus};
use export_nbd::{ExportStats, LATENCY_BUCKETS, RequestKind, RequestStats};
use std::fmt::Write;
use std::sync::Arc;

/// One export's counters and whose they are.
pub(crate) struct ExportCounters {
    pub(crate) disk: String,
    pub(crate) export: String,
    pub(crate) stats: Arc<ExportStats>,
}

/// Everything as text.
pub(crate) fn text(disks: &[DiskStatus], exports: &[ExportCounters], jobs: usize, io_threads: usize) -> String {
    let mut text = String::new();
    let head = |text: &mut String, name: &str, kind: &str, help: &str| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    };
    head(&mut text, "highwater_disks", "gauge", "Disks by state.");
    for state in [DiskState::Opening, DiskState::Open, DiskState::Failed, DiskState::Closing] {
        let count = disks.iter().filter(|d| d.state == state).count();
        let _ = writeln!(text, "highwater_disks{{state=\"{}\"}} {count}", state.word());
    }
    head(&mut text, "highwater_disk_size_bytes", "gauge", "Size of the guest's disk.");
    for disk in disks {
        if let Some(size) = disk.virtual_size {
            let _ = writeln!(text, "highwater_disk_size_bytes{{disk=\"{}\"}} {size}", disk.spec.name);
        }
    }
    type Figure = fn(&HistoryReport) -> u64;
    let figures: [(&str, &str, Figure); 3] = [
        ("highwater_disk_history_kept", "Whether the disk's history is kept.", |h| h.kept.into()),
        ("highwater_disk_marks", "Marks of the disk.", |h| h.marks as u64),
        ("highwater_disk_history_open_bytes", "Bytes that a crash would report beyond what was written.", |h| {
            h.open_bytes
        }),
    ];
    for (name, help, figure) in figures {
        head(&mut text, name, "gauge", help);
        for disk in disks {
            if let Some(history) = &disk.history {
                let _ = writeln!(text, "{name}{{disk=\"{}\"}} {}", disk.spec.name, figure(history));
            }
        }
    }
    head(&mut text, "highwater_jobs_running", "gauge", "Jobs that have not ended, paused ones among them.");
    let _ = writeln!(text, "highwater_jobs_running {jobs}");

    head(&mut text, "highwater_io_threads", "gauge", "I/O threads.");
    let _ = writeln!(text, "highwater_io_threads {io_threads}");
    if let Some((resident, threads)) = process() {
        head(&mut text, "process_resident_memory_bytes", "gauge", "Memory of the process.");
        let _ = writeln!(text, "process_resident_memory_bytes {resident}");
        head(&mut text, "process_threads", "gauge", "Threads of the process.");
        let _ = writeln!(text, "process_threads {threads}");
    }

    let labels = |e: &ExportCounters| format!("disk=\"{}\",export=\"{}\"", e.disk, escape(&e.export));
    head(&mut text, "highwater_nbd_connections", "gauge", "Connections in transmission.");
    for export in exports {
        let _ = writeln!(text, "highwater_nbd_connections{{{}}} {}", labels(export), export.stats.connections());
    }
    head(&mut text, "highwater_nbd_connections_opened", "counter", "Connections that reached transmission.");
    for export in exports {
        let count = export.stats.connections_total();
        let _ = writeln!(text, "highwater_nbd_connections_opened_total{{{}}} {count}", labels(export));
    }
    type Field = fn(&RequestStats) -> f64;
    let fields: [(&str, &str, Field); 4] = [
        ("highwater_nbd_requests", "Requests answered.", |s| s.requests as f64),
        ("highwater_nbd_errors", "Requests answered with an error.", |s| s.errors as f64),
        ("highwater_nbd_bytes", "Bytes of requests that succeeded.", |s| s.bytes as f64),
        ("highwater_nbd_seconds", "Time from a request's arrival to its reply.", |s| s.micros as f64 / 1e6),
    ];
    for (name, help, field) in fields {
        head(&mut text, name, "counter", help);
        for export in exports {
            for kind in RequestKind::ALL {
                let value = field(&export.stats.read(kind));
                let _ = writeln!(text, "{name}_total{{{},request=\"{}\"}} {value}", labels(export), kind.label());
            }
        }
    }
    const LATENCY: &str = "highwater_nbd_latency_seconds";
    head(&mut text, LATENCY, "histogram", "Time from a request's arrival to its reply, of kinds that have occurred.");
    for export in exports {
        for kind in RequestKind::ALL {
            let stats = export.stats.read(kind);
            if stats.requests > 0 {
                let labels = format!("{},request=\"{}\"", labels(export), kind.label());
                histogram(&mut text, LATENCY, &labels, &stats);
            }
        }
    }
    text.push_str("# EOF\n");
    text
}

/// One histogram: each bucket counts what the ones before it count as well.
fn histogram(text: &mut String, name: &str, labels: &str, stats: &RequestStats) {
    let mut count = 0;
    for (n, requests) in stats.latency.iter().enumerate() {
        count += requests;
        let bound = match n + 1 == LATENCY_BUCKETS {
            true => "+Inf".to_owned(),
            false => format!("{}", (1u64 << n) as f64 / 1e6),
        };
        let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {count}");
    }
    let _ = writeln!(text, "{name}_count{{{labels}}} {count}");
    let _ = writeln!(text, "{name}_sum{{{labels}}} {}", stats.micros as f64 / 1e6);
}

/// Bytes in memory and threads of this process.
fn process() -> Option<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let number = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    Some((number("VmRSS:")? * 1024, number("Threads:")?))
}

/// A label's value with what it may not hold escaped.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_add_up() {
        let mut stats = RequestStats { requests: 6, micros: 2_500_000, ..RequestStats::default() };
        stats.latency[0] = 1;
        stats.latency[10] = 2;
        stats.latency[LATENCY_BUCKETS - 1] = 3;
        let mut text = String::new();
        histogram(&mut text, "x", "a=\"b\"", &stats);
        for line in [
            "x_bucket{a=\"b\",le=\"0.000001\"} 1",
            "x_bucket{a=\"b\",le=\"0.000512\"} 1",
            "x_bucket{a=\"b\",le=\"0.001024\"} 3",
            "x_bucket{a=\"b\",le=\"+Inf\"} 6",
            "x_count{a=\"b\"} 6",
            "x_sum{a=\"b\"} 2.5",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
        }
        assert_eq!(text.lines().count(), LATENCY_BUCKETS + 2);
    }

    #[test]
    fn the_text_is_well_formed() {
        let counters =
            ExportCounters { disk: "a".into(), export: "quote\"\\\n".into(), stats: Arc::new(ExportStats::default()) };
        let text = text(&[], &[counters], 2, 4);
        assert!(text.contains("highwater_jobs_running 2\n"));
        assert!(text.contains(r#"export="quote\"\\\n",request="read"} 0"#), "{text}");
        assert!(text.ends_with("# EOF\n"));
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let (_, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap();
        }
    }
}
