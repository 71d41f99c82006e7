//! Taking a point while the guest writes.
//!
//! 1. Requests that change bytes are held, and those under way are waited for: now the disk's content is one.
//! 2. The epoch ends. Requests go on, in the next one.
//! 3. The disk is flushed, so that a power cut cannot take back what was before the instant.
//! 4. The table gets the ended epoch, and the list the point, in one step.
//!
//! Several disks get one instant when all are held before the first epoch ends.
//!
//! Crash: before step 4 is durable there is no point. After it, the content before the instant is durable, and so is every
//! change of the ended epoch.

use super::{Tracked, View};
use crate::History;
use crate::epoch_marks::EpochMarks;
use crate::kind::LAST_EPOCH;
use crate::points::is_name;
use crate::{Consistency, HistoryError, Id, Point};
use disk::{Disk, StorageHandle};
use std::rc::Rc;

/// What a new point is to be.
#[derive(Clone, Debug)]
pub struct NewPoint {
    /// Its name.
    pub name: String,
    /// Shared by the points of several disks that are taken at one instant.
    pub set: Id,
}

/// The right to take a point of that disk; one at a time.
struct Turn<D: Disk>(Rc<Tracked<D>>);

impl<D: Disk> Drop for Turn<D> {
    fn drop(&mut self) {
        self.0.marking.set(false);
        self.0.moved.notify(usize::MAX);
    }
}

/// A disk on which no byte changes; released when dropped.
pub struct Held<D: Disk> {
    turn: Option<Turn<D>>,
}

impl<D: Disk> Drop for Held<D> {
    fn drop(&mut self) {
        if let Some(Turn(tracked)) = &self.turn {
            tracked.release();
        }
    }
}

/// A point whose instant has passed, and that is not durable yet.
#[must_use = "a point that is not committed does not exist"]
pub struct UncommittedPoint<D: Disk> {
    turn: Turn<D>,
    point: Point,
}

impl History {
    /// Whether a point of that name can be taken now.
    ///
    /// # Errors
    /// When the name is taken or none, or tracking has stopped.
    pub fn may_mark(&self, name: &str) -> Result<(), HistoryError> {
        if !is_name(name) {
            return Err(HistoryError::BadName { name: name.to_owned() });
        }
        self.refuse_if_stopped()?;
        if self.point(name).is_ok() {
            return Err(HistoryError::PointExists { name: name.to_owned() });
        }
        if self.state.borrow().current.epoch >= LAST_EPOCH {
            return Err(HistoryError::Stopped {
                reason: "the history has reached its last epoch; begin a new one".to_owned(),
            });
        }
        Ok(())
    }
}

impl<D: Disk> Tracked<D> {
    /// Holds the disk for a point of that name.
    ///
    /// # Errors
    /// When the name is taken or none, or tracking has stopped.
    pub async fn hold(self: &Rc<Self>, name: &str) -> Result<Held<D>, HistoryError> {
        self.history.may_mark(name)?;
        while self.marking.get() {
            self.moved.listen().await;
        }
        self.marking.set(true);
        let turn = Turn(Rc::clone(self));
        self.history.may_mark(name)?;
        if self.history.state.borrow().frozen.is_some() {
            self.history.checkpoint().await?; // Of a point that could not be made durable.
        }
        self.hold_off().await;
        let held = Held { turn: Some(turn) };
        self.drained().await;
        Ok(held)
    }

    /// Takes a point of this disk alone.
    ///
    /// # Errors
    /// As [`Tracked::hold`] and [`UncommittedPoint::commit`].
    pub async fn mark(self: &Rc<Self>, new: NewPoint) -> Result<Point, HistoryError> {
        self.hold(&new.name).await?.cut(new).commit(Consistency::Crash).await
    }
}

impl<D: Disk> Held<D> {
    /// A view of this instant, which saves old bytes in that store, `limit` bytes at most.
    ///
    /// # Panics
    /// Never: a held disk has its turn until it is cut.
    pub fn view(&self, store: StorageHandle, limit: u64) -> View<D> {
        self.turn.as_ref().expect("held until cut or dropped").0.view_now(store, limit)
    }

    /// Ends the epoch at this instant and lets the guest go on.
    ///
    /// # Panics
    /// Never: a held disk has its turn until here.
    pub fn cut(mut self, new: NewPoint) -> UncommittedPoint<D> {
        let turn = self.turn.take().expect("held until cut or dropped");
        let tracked = Rc::clone(&turn.0);
        let history = &tracked.history;
        let mut known = history.state.borrow_mut();
        let pages = known.index.len();
        let next = EpochMarks::new(known.current.epoch + 1, pages);
        let ended = std::mem::replace(&mut known.current, next);
        known.forget_ahead();
        let point = Point {
            name: new.name,
            id: history.host.random_id(),
            set: new.set,
            epoch: ended.epoch,
            time: history.host.now(),
            size: tracked.inner.geometry().size,
            consistency: Consistency::Crash,
            refused: None,
            pending: Vec::new(),
        };
        known.frozen = Some(ended);
        drop(known);
        tracked.release();
        UncommittedPoint { turn, point }
    }
}

impl<D: Disk> UncommittedPoint<D> {
    /// Makes the point durable.
    ///
    /// # Errors
    /// When the disk cannot be flushed or the sidecar not written: there is no point then.
    pub async fn commit(self, consistency: Consistency) -> Result<Point, HistoryError> {
        let Self { turn, point } = self;
        let tracked = Rc::clone(&turn.0);
        let point = Point { consistency, ..point };
        let settled = std::mem::take(&mut *tracked.settled.borrow_mut());
        tracked.inner.flush().await?;
        tracked.settle(settled);
        let entered = point.clone();
        tracked.history.checkpoint_with(Some(Box::new(|points| points.push(entered))), |_| {}).await?;
        Ok(point)
    }
}
