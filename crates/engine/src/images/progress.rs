//! How far long work is, how fast it may go, and the wish that it pause or stop.

use super::rate_limit::RateLimit;
use super::rate_meter::RateMeter;
use crate::EngineError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use utoipa::ToSchema;

/// What progress is counted in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProgressUnit {
    /// Bytes.
    #[default]
    Bytes,
    /// Tables of an image's metadata.
    Tables,
}

/// Shared between who works, who shows the progress, and who steers it.
///
/// The work calls [`pace`](Self::pace) before each piece, says with [`advance`](Self::advance) what is done, and
/// needs nothing else.
#[derive(Clone, Debug)]
pub struct Progress(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    done: AtomicU64,
    total: AtomicU64,
    tables: AtomicBool,
    /// One of the wishes below.
    wish: AtomicU8,
    /// Whether there is anything to ask the brake about.
    braked: AtomicBool,
    brake: Mutex<Brake>,
    meter: Mutex<RateMeter>,
}

/// Wishes: to go on, to stop for good, to stop because the process ends. The first wish to stop stands.
const GO_ON: u8 = 0;
const CANCEL: u8 = 1;
const INTERRUPT: u8 = 2;

/// What holds the work up.
#[derive(Debug)]
struct Brake {
    paused: bool,
    limit: RateLimit,
    /// Counts changes of what is above, and of the wish, so that none is slept through.
    changes: u64,
    /// Who waits for the next change.
    waiting: BTreeMap<u64, Waker>,
    last_waiting: u64,
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress {
    /// Nothing done of nothing.
    pub fn new() -> Self {
        let now = Instant::now();
        Self(Arc::new(Shared {
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            tables: AtomicBool::new(false),
            wish: AtomicU8::new(GO_ON),
            braked: AtomicBool::new(false),
            brake: Mutex::new(Brake {
                paused: false,
                limit: RateLimit::none(now),
                changes: 0,
                waiting: BTreeMap::new(),
                last_waiting: 0,
            }),
            meter: Mutex::new(RateMeter::new(now)),
        }))
    }

    /// Says what is counted; bytes unless this is called.
    pub fn set_unit(&self, unit: ProgressUnit) {
        self.0.tables.store(unit == ProgressUnit::Tables, Ordering::Relaxed);
    }

    /// What is counted.
    pub fn unit(&self) -> ProgressUnit {
        if self.0.tables.load(Ordering::Relaxed) { ProgressUnit::Tables } else { ProgressUnit::Bytes }
    }

    /// Says how much there is to do.
    pub fn set_total(&self, total: u64) {
        self.0.total.store(total, Ordering::Relaxed);
    }

    /// Says that so much more is done.
    pub fn advance(&self, done: u64) {
        self.0.done.fetch_add(done, Ordering::Relaxed);
    }

    /// How much is done, and how much there is to do in all; 0 when that is not known.
    pub fn now(&self) -> (u64, u64) {
        let total = self.0.total.load(Ordering::Relaxed);
        (self.0.done.load(Ordering::Relaxed).min(total), total)
    }

    /// Part done, 0 to 100.
    pub fn percent(&self) -> u8 {
        percent(self.now())
    }

    /// How much is done in a second, of late: in [`unit`](Self::unit). 0 while it is paused, `None` while it is not known.
    pub fn rate(&self) -> Option<u64> {
        self.measured().map(|rate| rate as u64)
    }

    /// Seconds until all is done, if it goes on at the present rate.
    pub fn seconds_left(&self) -> Option<u64> {
        let (done, total) = self.now();
        let rate = self.measured().filter(|rate| *rate > 0.0 && total > 0)?;
        Some(((total - done) as f64 / rate).ceil() as u64)
    }

    fn measured(&self) -> Option<f64> {
        self.meter().look(self.0.done.load(Ordering::Relaxed), Instant::now())
    }

    fn meter(&self) -> MutexGuard<'_, RateMeter> {
        self.0.meter.lock().expect("no panic while the meter is locked")
    }

    /// Has the work wait before its next piece, until [`resume`](Self::resume).
    pub fn pause(&self) {
        self.meter().stop(self.0.done.load(Ordering::Relaxed), Instant::now());
        self.steer(|brake| brake.paused = true);
    }

    /// Lets paused work go on.
    pub fn resume(&self) {
        self.meter().go_on(self.0.done.load(Ordering::Relaxed), Instant::now());
        self.steer(|brake| brake.paused = false);
    }

    /// Whether it is to wait.
    pub fn is_paused(&self) -> bool {
        self.0.brake().paused
    }

    /// How many bytes a second the work may move, from now on; `None`: as many as it can. 0 is taken for 1.
    pub fn set_rate_limit(&self, bytes_per_second: Option<u64>) {
        self.steer(|brake| brake.limit.set_rate(bytes_per_second, Instant::now()));
    }

    /// How many bytes a second the work may move.
    pub fn rate_limit(&self) -> Option<u64> {
        self.0.brake().limit.rate()
    }

    /// Asks the work to stop soon, for good.
    pub fn cancel(&self) {
        self.stop(CANCEL);
    }

    /// Asks the work to stop soon because the process ends. For work that cannot go on afterwards this is the same as
    /// [`cancel`](Self::cancel); other work keeps what it has done.
    pub fn interrupt(&self) {
        self.stop(INTERRUPT);
    }

    fn stop(&self, wish: u8) {
        // An error means that it was asked to stop before.
        let _ = self.0.wish.compare_exchange(GO_ON, wish, Ordering::Relaxed, Ordering::Relaxed);
        self.steer(|_| ());
    }

    /// Changes the brake, and wakes whom it held up.
    fn steer(&self, change: impl FnOnce(&mut Brake)) {
        let woken = {
            let mut brake = self.0.brake();
            change(&mut brake);
            brake.changes += 1;
            self.0.braked.store(brake.paused || brake.limit.rate().is_some(), Ordering::Relaxed);
            std::mem::take(&mut brake.waiting)
        };
        woken.into_values().for_each(Waker::wake);
    }

    /// Whether it was asked to stop, for whatever reason.
    pub fn is_cancelled(&self) -> bool {
        self.0.wish.load(Ordering::Relaxed) != GO_ON
    }

    /// Whether it was asked to stop because the process ends.
    pub fn is_interrupted(&self) -> bool {
        self.0.wish.load(Ordering::Relaxed) == INTERRUPT
    }

    /// For the work to call between two steps that must not wait.
    ///
    /// # Errors
    /// [`EngineError::Cancelled`] when it was asked to stop.
    pub fn check(&self) -> Result<(), EngineError> {
        if self.is_cancelled() { Err(EngineError::Cancelled) } else { Ok(()) }
    }

    /// For the work to call before it moves so many bytes: waits while it is paused, and until the rate allows them.
    /// 0 bytes wait for the end of the pause alone. Costs two loads when there is neither pause nor limit.
    ///
    /// Several pieces of one job may wait at the same time. To be awaited on an I/O thread, with nothing held that a guest
    /// may wait for.
    ///
    /// # Errors
    /// [`EngineError::Cancelled`] when it was asked to stop, also while it waits.
    pub async fn pace(&self, bytes: u64) -> Result<(), EngineError> {
        loop {
            self.check()?;
            if !self.0.braked.load(Ordering::Relaxed) {
                return Ok(());
            }
            let (seen, wait) = {
                let mut brake = self.0.brake();
                let wait = if brake.paused { Some(Duration::MAX) } else { brake.limit.take(bytes, Instant::now()) };
                (brake.changes, wait)
            };
            let Some(wait) = wait else { return Ok(()) };
            // The wish may have changed before `seen` was read, and its change is counted in there.
            self.check()?;
            let changed = Changed { shared: &self.0, seen, waiting: None };
            if wait == Duration::MAX {
                changed.await;
            } else {
                dataplane::timeout(wait, changed).await;
            }
        }
    }
}

/// Part done, 0 to 100.
pub(crate) fn percent((done, total): (u64, u64)) -> u8 {
    if total == 0 { 0 } else { (u128::from(done.min(total)) * 100 / u128::from(total)) as u8 }
}

impl Shared {
    fn brake(&self) -> MutexGuard<'_, Brake> {
        self.brake.lock().expect("no panic while the brake is locked")
    }
}

/// Waits until the brake is not as it was seen.
struct Changed<'a> {
    shared: &'a Shared,
    seen: u64,
    /// Our place among those who wait.
    waiting: Option<u64>,
}

impl Future for Changed<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let shared = self.shared;
        let mut brake = shared.brake();
        if brake.changes != self.seen {
            return Poll::Ready(());
        }
        let place = *self.waiting.get_or_insert_with(|| {
            brake.last_waiting += 1;
            brake.last_waiting
        });
        brake.waiting.insert(place, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.waiting {
            // Dropped when the lock is free again: a waker may drop a task.
            let entry = self.shared.brake().waiting.remove(&place);
            drop(entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::join_all;

    #[test]
    fn percent_is_bounded() {
        let progress = Progress::new();
        assert_eq!(progress.percent(), 0);
        progress.set_total(u64::MAX);
        progress.advance(u64::MAX / 2 + 1);
        assert_eq!(progress.percent(), 50);
        progress.advance(u64::MAX / 2);
        assert_eq!(progress.percent(), 100);
        assert!(progress.check().is_ok());
        progress.clone().cancel();
        assert!(matches!(progress.check(), Err(EngineError::Cancelled)));
        assert!(!progress.is_interrupted());
        progress.interrupt();
        assert!(progress.is_cancelled() && !progress.is_interrupted(), "the first wish stands");
        let progress = Progress::new();
        progress.interrupt();
        progress.cancel();
        assert!(progress.is_cancelled() && progress.is_interrupted());
    }

    /// Steers from another thread after a moment, as the daemon does.
    fn soon(progress: &Progress, steer: impl FnOnce(&Progress) + Send + 'static) -> std::thread::JoinHandle<()> {
        let progress = progress.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            steer(&progress);
        })
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        dataplane::block_on(dataplane::Backend::Threads, work).unwrap()
    }

    #[test]
    fn a_pause_holds_all_pieces_until_its_end() {
        let progress = Progress::new();
        run(async {
            progress.pace(1 << 40).await.unwrap();
            progress.pause();
            assert!(progress.is_paused());
            assert_eq!(progress.rate(), Some(0));
            let held = dataplane::timeout(Duration::from_millis(30), progress.pace(0)).await;
            assert!(held.is_none(), "went on while paused");
            assert!(progress.0.brake().waiting.is_empty(), "who has gone waits no more");
            let resumed = soon(&progress, Progress::resume);
            for done in join_all((0..20).map(|n| progress.pace(n))).await {
                done.unwrap();
            }
            resumed.join().unwrap();
            assert!(!progress.is_paused());
        });
    }

    #[test]
    fn waiting_work_hears_the_wish_to_stop() {
        for limit in [None, Some(1)] {
            let progress = Progress::new();
            run(async {
                match limit {
                    None => progress.pause(),
                    Some(_) => {
                        progress.set_rate_limit(limit);
                        // The first goes into debt for longer than anybody waits.
                        progress.pace(1 << 30).await.unwrap();
                    }
                }
                let stopped = soon(&progress, Progress::interrupt);
                assert!(matches!(progress.pace(1).await, Err(EngineError::Cancelled)));
                stopped.join().unwrap();
            });
        }
    }

    #[test]
    fn a_rate_that_is_raised_counts_for_who_waits() {
        let progress = Progress::new();
        run(async {
            progress.set_rate_limit(Some(1));
            progress.pace(1 << 30).await.unwrap();
            let raised = soon(&progress, |progress| progress.set_rate_limit(None));
            progress.pace(1 << 30).await.unwrap();
            raised.join().unwrap();
            assert_eq!(progress.rate_limit(), None);
        });
    }

    #[test]
    fn real_work_keeps_to_the_rate() {
        let progress = Progress::new();
        progress.set_total(1 << 30);
        run(async {
            progress.set_rate_limit(Some(10 << 20));
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(1500) {
                progress.pace(128 << 10).await.unwrap();
                progress.advance(128 << 10);
            }
            let rate = progress.now().0 as f64 / start.elapsed().as_secs_f64();
            assert!((5e6..13e6).contains(&rate), "{rate}");
            let told = progress.rate().unwrap();
            assert!((5_000_000..13_000_000).contains(&told), "{told}");
            let left = progress.seconds_left().unwrap();
            assert!((80..250).contains(&left), "{left}");
        });
    }
}
