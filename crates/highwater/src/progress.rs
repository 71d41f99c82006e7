//! Progress bars, on a terminal only.

use engine::images::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;

/// Does `work` and shows how far it is, unless nobody looks. The first Ctrl-C asks the work to stop, which
/// leaves files closed properly.
pub(crate) async fn watch<T>(progress: Progress, quiet: bool, work: impl Future<Output = T>) -> T {
    let bar = if !quiet && std::io::stderr().is_terminal() { bar() } else { ProgressBar::hidden() };
    tokio::pin!(work);
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            result = &mut work => {
                bar.finish_and_clear();
                return result;
            }
            _ = tick.tick() => {
                let (done, total) = progress.now();
                bar.set_length(total);
                bar.set_position(done);
            }
            Ok(()) = tokio::signal::ctrl_c() => progress.cancel(),
        }
    }
}

fn bar() -> ProgressBar {
    let style = "{bar:40} {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    let bar = ProgressBar::new(0);
    match ProgressStyle::with_template(style) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
