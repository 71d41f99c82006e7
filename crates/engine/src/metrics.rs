//! Counters in OpenMetrics' text format, read from where the data plane keeps them.

use crate::{DiskState, DiskStatus};
use export_nbd::{ExportStats, RequestKind};
use std::fmt::Write;
use std::sync::Arc;

/// One export's counters and whose they are.
pub(crate) struct ExportCounters {
    pub(crate) disk: String,
    pub(crate) export: String,
    pub(crate) stats: Arc<ExportStats>,
}

/// Everything as text.
pub(crate) fn text(disks: &[DiskStatus], exports: &[ExportCounters], jobs: usize) -> String {
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
    head(&mut text, "highwater_jobs_running", "gauge", "Jobs at work.");
    let _ = writeln!(text, "highwater_jobs_running {jobs}");

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
    type Field = fn(&export_nbd::RequestStats) -> f64;
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
    text.push_str("# EOF\n");
    text
}

/// A label's value with what it may not hold escaped.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_well_formed() {
        let counters =
            ExportCounters { disk: "a".into(), export: "quote\"\\\n".into(), stats: Arc::new(ExportStats::default()) };
        let text = text(&[], &[counters], 2);
        assert!(text.contains("highwater_jobs_running 2\n"));
        assert!(text.contains(r#"export="quote\"\\\n",request="read"} 0"#), "{text}");
        assert!(text.ends_with("# EOF\n"));
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let (_, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap();
        }
    }
}
