//! Where long computations are done. The format runs on any executor, so whoever opens an image says.

use disk::LocalFuture;
use std::fmt;
use std::sync::{Arc, Mutex};

/// A computation.
pub type Job = Box<dyn FnOnce() + Send>;

type Run = dyn Fn(Job) -> LocalFuture<'static, ()> + Send + Sync;

/// Runs computations that would hold up everything else on an I/O thread. By default they are done in place.
#[derive(Clone, Default)]
pub struct Workers(Option<Arc<Run>>);

impl Workers {
    /// `run` does a job on another thread; its future is ready when the job is done.
    pub fn new(run: impl Fn(Job) -> LocalFuture<'static, ()> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(run)))
    }

    pub(super) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let Some(run) = &self.0 else { return work() };
        let result = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&result);
        run(Box::new(move || {
            let value = work();
            *slot.lock().expect("nobody panics while it is locked") = Some(value);
        }))
        .await;
        let value = result.lock().expect("nobody panics while it is locked").take();
        value.expect("a job that is done has left its result")
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Workers(elsewhere)" } else { "Workers(in place)" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use testkit::executor::run;

    #[test]
    fn jobs_run_where_they_are_told_to() {
        let here = thread::current().id();
        assert_eq!(run(1, async { Workers::default().run(move || thread::current().id()).await }), here);
        let elsewhere =
            Workers::new(|job| Box::pin(async move { thread::spawn(job).join().expect("the job does not panic") }));
        assert_ne!(run(1, async move { elsewhere.run(move || thread::current().id()).await }), here);
    }
}
