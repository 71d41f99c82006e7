//! Progress bars, on a terminal only, and what Ctrl-C does to long work.

use crate::exit;
use crate::size::{human, human_seconds};
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
                bar.show(&Look {
                    done,
                    total,
                    unit: progress.unit(),
                    rate: progress.rate(),
                    seconds_left: progress.seconds_left(),
                    paused: progress.is_paused(),
                });
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

/// How far and how fast work is.
pub(crate) struct Look {
    pub(crate) done: u64,
    /// 0 while it is not known.
    pub(crate) total: u64,
    pub(crate) unit: ProgressUnit,
    /// In `unit`, for each second.
    pub(crate) rate: Option<u64>,
    pub(crate) seconds_left: Option<u64>,
    pub(crate) paused: bool,
}

impl Look {
    /// What stands behind the bar.
    fn words(&self) -> String {
        if self.paused {
            return "paused".to_owned();
        }
        let rate = self.rate.map(|rate| speed(self.unit, rate));
        let left = self.seconds_left.map(|left| format!("{} left", human_seconds(left)));
        rate.into_iter().chain(left).collect::<Vec<String>>().join(", ")
    }
}

/// A rate for people.
pub(crate) fn speed(unit: ProgressUnit, rate: u64) -> String {
    match unit {
        ProgressUnit::Bytes => format!("{}/s", human(rate)),
        ProgressUnit::Tables => format!("{rate} tables/s"),
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
    pub(crate) fn show(&mut self, look: &Look) {
        if !self.wanted || look.total == 0 {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| styled(look.unit));
        bar.set_length(look.total);
        bar.set_position(look.done);
        bar.set_message(look.words());
    }

    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn styled(unit: ProgressUnit) -> ProgressBar {
    let style = match unit {
        ProgressUnit::Bytes => "{bar:40} {percent:>3}% {binary_bytes}/{binary_total_bytes} {msg}",
        ProgressUnit::Tables => "{bar:40} {percent:>3}% {pos}/{len} tables {msg}",
    };
    let bar = ProgressBar::no_length();
    match ProgressStyle::with_template(style) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_behind_the_bar() {
        let look = Look {
            done: 1,
            total: 10,
            unit: ProgressUnit::Bytes,
            rate: Some(60 << 20),
            seconds_left: Some(150),
            paused: false,
        };
        assert_eq!(look.words(), "60 MiB/s, 3 min left");
        assert_eq!(Look { unit: ProgressUnit::Tables, rate: Some(7), ..look }.words(), "7 tables/s, 3 min left");
        let unknown = Look { rate: None, seconds_left: None, ..look };
        assert_eq!(unknown.words(), "");
        assert_eq!(Look { paused: true, ..unknown }.words(), "paused");
    }
}
