//! A single-threaded executor whose order is decided by a seed.
//!
//! Among the tasks that are ready it polls a random one, so that one seed stands for one interleaving and
//! many seeds for many. It knows no clock: when no task is ready and some are unfinished, nothing can ever
//! wake them, and that is reported as a deadlock.

use disk::LocalFuture;
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

thread_local! {
    /// Tasks that running tasks spawned, until the executor takes them over.
    static SPAWNED: RefCell<Vec<LocalFuture<'static, ()>>> = const { RefCell::new(Vec::new()) };
}

/// Runs tasks on this thread in an order that the seed decides.
pub struct Executor<'a> {
    tasks: Vec<Option<LocalFuture<'a, ()>>>,
    wakers: Vec<Waker>,
    ready: Arc<Ready>,
    random: fastrand::Rng,
    /// Decides instead of chance, if there is one.
    guide: Option<Guide>,
    /// The task that was polled last.
    last: usize,
    unfinished: usize,
}

#[derive(Default)]
struct Ready(Mutex<Vec<usize>>);

struct TaskWaker {
    ready: Arc<Ready>,
    task: usize,
}

impl Ready {
    fn push(&self, task: usize) {
        let mut ready = self.0.lock().expect("no panic while the list is locked");
        if !ready.contains(&task) {
            ready.push(task);
        }
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.ready.push(self.task);
    }
}

impl<'a> Executor<'a> {
    /// An executor without tasks.
    pub fn new(seed: u64) -> Self {
        Self {
            tasks: Vec::new(),
            wakers: Vec::new(),
            ready: Arc::default(),
            random: fastrand::Rng::with_seed(seed),
            guide: None,
            last: 0,
            unfinished: 0,
        }
    }

    /// An executor whose order the guide decides.
    pub fn guided(guide: &Guide) -> Self {
        Self { guide: Some(guide.clone()), ..Self::new(0) }
    }

    /// Adds a task.
    pub fn spawn(&mut self, future: impl Future<Output = ()> + 'a) {
        self.add(Box::pin(future));
    }

    fn add(&mut self, future: LocalFuture<'a, ()>) {
        let task = self.tasks.len();
        self.tasks.push(Some(future));
        self.wakers.push(Waker::from(Arc::new(TaskWaker { ready: Arc::clone(&self.ready), task })));
        self.ready.push(task);
        self.unfinished += 1;
    }

    /// How many tasks have not ended.
    pub fn unfinished(&self) -> usize {
        self.unfinished
    }

    /// Polls one ready task; `false` when none is ready.
    pub fn step(&mut self) -> bool {
        let task = {
            let mut ready = self.ready.0.lock().expect("no panic while the list is locked");
            if ready.is_empty() {
                return false;
            }
            let at = match &self.guide {
                Some(guide) => guide.choose(&ready, self.last),
                None => self.random.usize(..ready.len()),
            };
            ready.swap_remove(at)
        };
        self.last = task;
        if let Some(future) = &mut self.tasks[task] {
            let mut context = Context::from_waker(&self.wakers[task]);
            if future.as_mut().poll(&mut context).is_ready() {
                self.tasks[task] = None;
                self.unfinished -= 1;
            }
        }
        for future in SPAWNED.take() {
            self.add(future);
        }
        true
    }

    /// Polls at most `steps` times, as for a crash at any moment; returns whether all tasks have ended.
    ///
    /// # Panics
    /// When tasks are left that nothing can wake.
    pub fn run_steps(&mut self, steps: u64) -> bool {
        for _ in 0..steps {
            if self.unfinished == 0 {
                return true;
            }
            assert!(self.step(), "deadlock: {} tasks wait and nothing can wake them", self.unfinished);
        }
        self.unfinished == 0
    }

    /// Runs until all tasks have ended.
    ///
    /// # Panics
    /// When tasks are left that nothing can wake.
    pub fn run(&mut self) {
        while !self.run_steps(u64::MAX) {}
    }
}

/// Runs `future`, and everything that it [`spawn`]s, to the end.
///
/// # Panics
/// At a deadlock.
pub fn run<'a, T: 'a>(seed: u64, future: impl Future<Output = T> + 'a) -> T {
    run_all(seed, vec![Box::pin(future) as LocalFuture<'a, T>]).pop().expect("one future, one result")
}

/// Runs the futures in an order that the seed decides; returns their results in the order given.
///
/// # Panics
/// At a deadlock.
pub fn run_all<'a, T: 'a>(seed: u64, futures: Vec<LocalFuture<'a, T>>) -> Vec<T> {
    let results: Rc<RefCell<Vec<Option<T>>>> = Rc::new(RefCell::new(futures.iter().map(|_| None).collect()));
    {
        let mut executor = Executor::new(seed);
        for (at, future) in futures.into_iter().enumerate() {
            let results = Rc::clone(&results);
            executor.spawn(async move {
                let result = future.await;
                results.borrow_mut()[at] = Some(result);
            });
        }
        executor.run();
    }
    let results = results.take();
    results.into_iter().map(|r| r.expect("every task has ended")).collect()
}

/// Starts a task beside the running one; it is polled from the next step on. Awaiting the returned
/// future brings the result; dropping it lets the task run on.
pub fn spawn<T: 'static>(future: impl Future<Output = T> + 'static) -> Join<T> {
    let slot = Rc::new(RefCell::new(JoinSlot { result: None, waker: None }));
    let theirs = Rc::clone(&slot);
    SPAWNED.with_borrow_mut(|spawned| {
        spawned.push(Box::pin(async move {
            let result = future.await;
            let mut slot = theirs.borrow_mut();
            slot.result = Some(result);
            if let Some(waker) = slot.waker.take() {
                waker.wake();
            }
        }));
    });
    Join(slot)
}

/// The result of a [`spawn`]ed task.
pub struct Join<T>(Rc<RefCell<JoinSlot<T>>>);

struct JoinSlot<T> {
    result: Option<T>,
    waker: Option<Waker>,
}

impl<T> Future for Join<T> {
    type Output = T;
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let mut slot = self.0.borrow_mut();
        match slot.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                slot.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Takes the decisions of one way through a program, and remembers what else could have been decided.
///
/// Clones are the same guide.
#[derive(Clone)]
pub struct Guide(Rc<RefCell<Way>>);

struct Way {
    /// The first decisions, given.
    given: Vec<usize>,
    /// All decisions so far: which, and of how many.
    taken: Vec<(usize, usize)>,
    /// How often a task may still be left that could go on.
    preemptions: usize,
}

impl Guide {
    /// The index of the ready task that is polled next.
    fn choose(&self, ready: &[usize], last: usize) -> usize {
        let mut way = self.0.borrow_mut();
        // The last task first, then the others by their numbers.
        let mut order: Vec<usize> = (0..ready.len()).collect();
        order.sort_by_key(|at| (ready[*at] != last, ready[*at]));
        let goes_on = ready[order[0]] == last;
        let options = if goes_on && way.preemptions == 0 { 1 } else { order.len() };
        let choice = way.given.get(way.taken.len()).copied().unwrap_or(0);
        assert!(choice < options, "the program is not the same when it runs again");
        way.taken.push((choice, options));
        if goes_on && choice > 0 {
            way.preemptions -= 1;
        }
        order[choice]
    }

    /// Whether all that was decided so far had been decided in an earlier way, too.
    pub fn is_known(&self) -> bool {
        let way = self.0.borrow();
        way.taken.len() < way.given.len()
    }
}

/// Runs a program in every order of its tasks in which a task that could go on is left at most `preemptions` times
/// (most faults need one or two), and returns how many there are.
///
/// # Panics
/// When there are more than `most`.
pub fn every_order(preemptions: usize, most: u64, mut program: impl FnMut(&Guide)) -> u64 {
    let mut given = Vec::new();
    for run in 1..=most {
        let way = Way { given: std::mem::take(&mut given), taken: Vec::new(), preemptions };
        let guide = Guide(Rc::new(RefCell::new(way)));
        program(&guide);
        let mut taken = std::mem::take(&mut guide.0.borrow_mut().taken);
        // The last decision that can be another one.
        loop {
            match taken.pop() {
                None => return run,
                Some((choice, of)) if choice + 1 < of => {
                    given = taken.iter().map(|(choice, _)| *choice).chain([choice + 1]).collect();
                    break;
                }
                Some(_) => {}
            }
        }
    }
    panic!("there are more than {most} orders; make the program smaller");
}

/// Lets other tasks go first, once.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(seed: u64) -> Vec<usize> {
        let order = Rc::new(RefCell::new(Vec::new()));
        let futures: Vec<LocalFuture<'_, ()>> = (0..4)
            .map(|task| {
                let order = Rc::clone(&order);
                Box::pin(async move {
                    for _ in 0..3 {
                        order.borrow_mut().push(task);
                        yield_now().await;
                    }
                }) as LocalFuture<'_, ()>
            })
            .collect();
        run_all(seed, futures);
        order.take()
    }

    #[test]
    fn a_seed_is_an_order() {
        assert_eq!(order(1), order(1));
        assert!((2..20).any(|seed| order(seed) != order(1)), "seeds make a difference");
    }

    #[test]
    fn spawned_tasks_run_and_are_joined() {
        let sum = run(3, async {
            let tasks: Vec<_> = (0..10_u32)
                .map(|n| {
                    spawn(async move {
                        yield_now().await;
                        n
                    })
                })
                .collect();
            let mut sum = 0;
            for task in tasks {
                sum += task.await;
            }
            sum
        });
        assert_eq!(sum, 45);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn deadlock_is_reported() {
        run(0, std::future::pending::<()>());
    }

    #[test]
    fn can_be_stopped_at_any_step() {
        let mut executor = Executor::new(0);
        executor.spawn(async {
            for _ in 0..10 {
                yield_now().await;
            }
        });
        assert!(!executor.run_steps(5));
        assert_eq!(executor.unfinished(), 1);
        assert!(executor.run_steps(6));
    }
}
