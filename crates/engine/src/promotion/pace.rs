//! How fast a job works beside a guest.

use crate::EngineError;
use crate::images::Progress;
use chain::{Chain, Control, CopyStats};
use futures_util::future::{Either, select};
use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A job waits for the guest no longer than this for one piece. A piece that takes longer waits for its target, not for what the
/// guest uses, and the longer a copy takes, the more of the guest's writes go to both sides.
const LONGEST_WAIT: Duration = Duration::from_millis(10);

/// What comes late, when all else is done, is moved again before the guest is held once more; so often at most.
pub(crate) const TRIES: u32 = 8;

/// For reports.
pub(crate) fn microseconds(pause: Duration) -> u64 {
    u64::try_from(pause.as_micros()).unwrap_or(u64::MAX)
}

/// Lets a job pause, keep to its rate, and give way to the guest: when the guest was at work during a piece of the job, the
/// job rests for as long as that piece took, and then begins no other one in the midst of the guest's requests; both up to
/// a bound. So a guest that asks now and then is not met by the job's pieces but for those that were under way, one that asks all the
/// time leaves the job a third to half of what a fast storage can do, and one that is idle leaves it all.
pub(crate) struct JobControl {
    progress: Progress,
    chain: Rc<Chain>,
    /// When the last piece began, and what the guest had asked for until then.
    last: Cell<(Instant, u64)>,
    /// The last wait for the guest to rest was in vain.
    restless: Cell<bool>,
    counted: Cell<u64>,
}

impl JobControl {
    /// For a job on that disk.
    pub(crate) fn new(progress: Progress, chain: Rc<Chain>) -> Rc<Self> {
        let last = Cell::new((Instant::now(), chain.served()));
        Rc::new(Self { progress, chain, last, restless: Cell::new(false), counted: Cell::new(0) })
    }

    async fn give_way(&self) {
        let (began, served) = self.last.get();
        let piece = began.elapsed().min(LONGEST_WAIT);
        if self.chain.served() != served {
            dataplane::sleep(piece).await;
        }
        let bound = if self.restless.get() { piece } else { LONGEST_WAIT };
        let (rests, bound) = (pin!(self.chain.guest_rests()), pin!(dataplane::sleep(bound)));
        self.restless.set(matches!(select(rests, bound).await, Either::Right(_)));
        self.last.set((Instant::now(), self.chain.served()));
    }
}

impl Control for JobControl {
    type Error = EngineError;

    async fn pace(&self, bytes: u64) -> Result<(), EngineError> {
        if bytes > 0 {
            self.give_way().await;
        }
        self.progress.pace(bytes).await
    }

    fn progress(&self, position: u64, _done: CopyStats) {
        // What is done twice is not counted twice.
        if let Some(more) = position.checked_sub(self.counted.get()) {
            self.progress.advance(more);
            self.counted.set(position);
        }
    }
}
