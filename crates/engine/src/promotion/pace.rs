//! How fast a job works beside a guest.

use crate::EngineError;
use crate::images::Progress;
use chain::{Chain, Control, CopyStats};
use std::cell::Cell;
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
/// job rests for as long as that piece took, up to a bound. So it takes about half of what a fast storage can do from a guest
/// that wants it, and all of it from one that does not.
pub(crate) struct JobControl {
    progress: Progress,
    chain: Rc<Chain>,
    /// When the last piece began, and what the guest had asked for until then.
    last: Cell<(Instant, u64)>,
    counted: Cell<u64>,
}

impl JobControl {
    /// For a job on that disk.
    pub(crate) fn new(progress: Progress, chain: Rc<Chain>) -> Rc<Self> {
        let last = Cell::new((Instant::now(), chain.served()));
        Rc::new(Self { progress, chain, last, counted: Cell::new(0) })
    }

    async fn give_way(&self) {
        let (began, served) = self.last.get();
        let busy = self.chain.served() != served;
        if busy {
            dataplane::sleep(began.elapsed().min(LONGEST_WAIT)).await;
        }
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
