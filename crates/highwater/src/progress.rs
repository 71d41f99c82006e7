//! Progress bars, on a terminal only, and what Ctrl-C does to long work.

use crate::exit;
use engine::images::{Progress, ProgressUnit};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Between two looks at the work.
const LOOK: Duration = Duration::from_millis(100);

/// Does `work` and shows how far it is, unless nobody looks. The first Ctrl-C asks the work to stop, which
/// leaves files closed properly; the second ends the process.
pub(crate) async fn watch<T>(progress: Progress, quiet: bool, work: impl Future<Output = T>) -> T {
    let mut bar = Bar::new(quiet);
    let mut interrupts = Interrupts::new();
    tokio::pin!(work);
    let mut tick = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            result = &mut work => {
                bar.clear();
                return result;
            }
            _ = tick.tick() => {
                let (done, total) = progress.now();
                bar.show(done, total, progress.unit());
            }
            () = interrupts.next() => progress.cancel(),
        }
    }
}

/// Ctrl-C, of which the second one ends the process.
pub(crate) struct Interrupts {
    /// Absent where signals cannot be caught: they end the process then, as they do by themselves.
    signal: Option<Signal>,
    told: bool,
}

impl Interrupts {
    /// Catches it from now on.
    pub(crate) fn new() -> Self {
        Self { signal: signal(SignalKind::interrupt()).ok(), told: false }
    }

    /// Waits for the first one. Called again, it waits for the second one and does not come back.
    pub(crate) async fn next(&mut self) {
        let Some(signal) = &mut self.signal else { return std::future::pending().await };
        if signal.recv().await.is_none() {
            return std::future::pending().await;
        }
        if self.told {
            eprintln!("highwater: interrupted twice: files that were being written may be incomplete");
            std::process::exit(i32::from(exit::INTERRUPTED));
        }
        self.told = true;
    }
}

/// A bar that appears with the first thing there is to show.
pub(crate) struct Bar {
    wanted: bool,
    bar: Option<ProgressBar>,
}

impl Bar {
    pub(crate) fn new(quiet: bool) -> Self {
        Self { wanted: !quiet && std::io::stderr().is_terminal(), bar: None }
    }

    /// Shows how far the work is; nothing while it is not known how much there is to do.
    pub(crate) fn show(&mut self, done: u64, total: u64, unit: ProgressUnit) {
        if !self.wanted || total == 0 {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| styled(unit));
        bar.set_length(total);
        bar.set_position(done);
    }

    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn styled(unit: ProgressUnit) -> ProgressBar {
    let style = match unit {
        ProgressUnit::Bytes => {
            "{bar:40} {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}"
        }
        ProgressUnit::Tables => "{bar:40} {percent:>3}% {pos}/{len} tables {eta}",
    };
    let bar = ProgressBar::no_length();
    match ProgressStyle::with_template(style) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
