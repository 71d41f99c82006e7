//! The list of jobs over the ends of a daemon. Nothing in the product's kinds is resumable by itself, so the tests say which.

use super::*;
use crate::images::Workshop;
use futures_util::future::select;
use serde_json::json;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const fn all(_: &JobKind) -> bool {
    true
}

fn kind() -> JobKind {
    serde_json::from_str(r#"{"job":"check","file":"/missing.qcow2"}"#).unwrap()
}

async fn never() -> Result<Value, EngineError> {
    std::future::pending().await
}

fn run<T>(work: impl Future<Output = T>) -> T {
    dataplane::block_on(dataplane::Backend::Threads, work).unwrap()
}

fn states(jobs: &Jobs) -> Vec<(u64, JobState)> {
    jobs.all().iter().map(|job| (job.id, job.state)).collect()
}

#[test]
fn unfinished_jobs_are_interrupted_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = Jobs::open(dir.path()).unwrap();
    let (first, work) = jobs.begin(kind(), None, |_| never()).unwrap();
    let (second, _never_run) = jobs.begin(kind(), None, |_| never()).unwrap();
    drop(work);
    assert!(matches!(jobs.forget(second.id), Err(EngineError::JobRunning(_))));
    jobs.end(first.id, Err(EngineError::Cancelled));
    assert_eq!(jobs.show(first.id).unwrap().state, JobState::Cancelled);
    assert!(matches!(jobs.cancel(first.id), Err(EngineError::JobEnded(_))));
    assert!(matches!(jobs.pause(first.id), Err(EngineError::JobEnded(_))));
    assert!(matches!(jobs.resume(first.id), Err(EngineError::JobEnded(_))));
    assert!(matches!(jobs.set_rate_limit(9, None), Err(EngineError::NoSuchJob(9))));
    drop(jobs);

    let jobs = Jobs::open(dir.path()).unwrap();
    assert_eq!(states(&jobs), [(first.id, JobState::Cancelled), (second.id, JobState::Interrupted)]);
    assert!(jobs.show(second.id).unwrap().error.unwrap().contains("start it again"));
    assert_eq!(jobs.to_begin_again(), [] as [u64; 0]);
    assert!(matches!(
        jobs.begin_again(second.id, |_| never()).err(),
        Some(EngineError::JobNotResumable { kind: "check", .. })
    ));
    let (third, _never_run) = jobs.begin(kind(), None, |_| never()).unwrap();
    assert!(third.id > second.id, "numbers are not used twice");
    jobs.interrupt_all();
    jobs.end(third.id, Err(EngineError::Cancelled));
    jobs.forget(second.id).unwrap();
    assert_eq!(
        states(&Jobs::open(dir.path()).unwrap()),
        [(first.id, JobState::Cancelled), (third.id, JobState::Interrupted)]
    );
}

#[test]
fn what_came_out_is_remembered_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = Jobs::open(dir.path()).unwrap();
    let outcomes: [(Result<Value, EngineError>, JobState); 3] = [
        (Ok(json!({"identical": true})), JobState::Done),
        (Ok(json!("x".repeat(100_000))), JobState::Done),
        (Err(EngineError::Invalid("there is no such thing".into())), JobState::Failed),
    ];
    let mut before = Vec::new();
    for (result, state) in outcomes {
        let (status, work) = jobs
            .begin(kind(), Some(1 << 40), |job| async move {
                job.progress().set_total(200);
                job.progress().advance(100);
                result
            })
            .unwrap();
        run(work);
        let told = jobs.show(status.id).unwrap();
        assert_eq!((told.state, told.done, told.total), (state, 100, 200));
        assert_eq!((told.rate, told.seconds_left), (None, None), "an ended job has no speed");
        before.push(told);
    }
    let after = Jobs::open(dir.path()).unwrap().all();
    // A result of that size is not kept.
    before[1].result = None;
    assert_eq!(serde_json::to_value(&before).unwrap(), serde_json::to_value(&after).unwrap());
    assert_eq!(after[0].result, Some(json!({"identical": true})));
    assert_eq!(after[2].error.as_deref(), Some("there is no such thing"));
}

#[test]
fn the_list_of_the_version_before_is_understood() {
    let dir = tempfile::tempdir().unwrap();
    let text = r#"{"version":1,"last":7,"jobs":[{"id":5,"started":3,"kind":{"job":"check","file":"/a"}}]}"#;
    std::fs::write(dir.path().join("jobs.json"), text).unwrap();
    let jobs = Jobs::open(dir.path()).unwrap();
    assert_eq!(states(&jobs), [(5, JobState::Interrupted)]);
    assert_eq!(jobs.begin(kind(), None, |_| never()).unwrap().0.id, 8);
}

#[test]
fn the_history_is_bounded_and_what_goes_on_later_is_not_part_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = Jobs::open_with(dir.path(), all).unwrap();
    let (waiting, _) = jobs.begin(kind(), None, |_| never()).unwrap();
    drop(jobs);
    let jobs = Jobs::open_with(dir.path(), all).unwrap();
    for _ in 0..REMEMBERED + 5 {
        let (_, work) = jobs.begin(kind(), None, |_| async { Ok(json!(1)) }).unwrap();
        run(work);
    }
    assert_eq!(jobs.all().len(), REMEMBERED + 1);
    assert_eq!(jobs.to_begin_again(), [waiting.id]);
}

fn workshop() -> Workshop {
    Workshop::start(dataplane::Backend::Threads).unwrap()
}

/// [`count`] is at its crash.
static CRASHED: AtomicBool = AtomicBool::new(false);

/// Counts to ten, a step for each byte, and saves where it is after each.
async fn count(job: JobHandle, steps: Arc<AtomicU64>, crash_at: u64) -> Result<Value, EngineError> {
    let from = job.position().and_then(|at| at.as_u64()).unwrap_or(0);
    for step in from..10 {
        job.progress().pace(1).await?;
        if step == crash_at {
            CRASHED.store(true, Ordering::Relaxed);
            never().await?;
        }
        steps.fetch_add(1, Ordering::Relaxed);
        job.save_position(json!(step + 1)).await?;
    }
    Ok(json!({"from": from, "begun-again": job.is_begun_again()}))
}

#[test]
fn resumable_jobs_go_on_from_the_durable_position() {
    for crash_at in 0..10 {
        let dir = tempfile::tempdir().unwrap();
        let steps = Arc::new(AtomicU64::new(0));
        let jobs = Jobs::open_with(dir.path(), all).unwrap();
        let threads = workshop();
        let counting = |job: JobHandle, crash_at| {
            let (threads, steps) = (threads.clone(), Arc::clone(&steps));
            async move { threads.run(move || count(job, steps, crash_at)).await }
        };
        let (begun, work) = jobs.begin(kind(), Some(1 << 30), |job| counting(job, crash_at)).unwrap();
        run(async {
            let crashed = pin!(async {
                while !CRASHED.swap(false, Ordering::Relaxed) {
                    dataplane::sleep(Duration::from_millis(1)).await;
                }
            });
            select(work, crashed).await;
        });
        assert_eq!(steps.load(Ordering::Relaxed), crash_at);
        drop(jobs); // As a crash leaves it: nobody has said that it ended.

        let jobs = Jobs::open_with(dir.path(), all).unwrap();
        let waiting = jobs.show(begun.id).unwrap();
        assert_eq!((waiting.state, waiting.rate_limit), (JobState::Interrupted, Some(1 << 30)));
        assert!(waiting.error.unwrap().contains("goes on"));
        assert_eq!(jobs.to_begin_again(), [begun.id]);
        let (again, work) = jobs.begin_again(begun.id, |job| counting(job, 99)).unwrap();
        assert_eq!((again.id, again.state, again.started), (begun.id, JobState::Running, begun.started));
        assert_eq!((again.rate_limit, again.error), (Some(1 << 30), None));
        assert!(matches!(jobs.begin_again(begun.id, |_| never()).err(), Some(EngineError::JobEnded(_))));
        run(work);
        let end = jobs.show(begun.id).unwrap();
        assert_eq!(end.result, Some(json!({"from": crash_at, "begun-again": true})));
        assert_eq!(steps.load(Ordering::Relaxed), 10, "a step was done twice");
        assert!(!dir.path().join(format!("job-{}.position", begun.id)).exists());
        assert_eq!(states(&Jobs::open_with(dir.path(), all).unwrap()), [(begun.id, JobState::Done)]);
    }
}

#[test]
fn the_end_of_the_daemon_is_told_from_a_cancel() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = Jobs::open_with(dir.path(), all).unwrap();
    let keeps: Arc<Mutex<Vec<bool>>> = Arc::default();
    let work = |job: JobHandle| {
        let keeps = Arc::clone(&keeps);
        async move {
            let here = job.clone();
            let end = workshop().run(move || async move { here.progress().pace(0).await }).await;
            keeps.lock().unwrap().push(job.will_be_begun_again());
            end.map(|()| json!("not stopped"))
        }
    };
    let (cancelled, first) = jobs.begin(kind(), None, work).unwrap();
    let (interrupted, second) = jobs.begin(kind(), None, work).unwrap();
    let (paused, third) = jobs.begin(kind(), None, work).unwrap();
    assert_eq!(jobs.pause(paused.id).unwrap().state, JobState::Paused);
    assert_eq!(jobs.pause(paused.id).unwrap().state, JobState::Paused, "said twice");
    jobs.cancel(cancelled.id).unwrap();
    jobs.interrupt_all();
    for work in [first, second, third] {
        run(work);
    }
    assert_eq!(*keeps.lock().unwrap(), [false, true, true]);
    let ends = [
        (cancelled.id, JobState::Cancelled),
        (interrupted.id, JobState::Interrupted),
        (paused.id, JobState::Interrupted),
    ];
    assert_eq!(states(&jobs), ends);

    // What was paused stays so, until somebody lets it go on.
    let jobs = Jobs::open_with(dir.path(), all).unwrap();
    assert_eq!(states(&jobs), ends);
    let (again, work) = jobs.begin_again(paused.id, |_| async { Ok(json!(2)) }).unwrap();
    assert_eq!(again.state, JobState::Paused);
    assert_eq!(jobs.resume(paused.id).unwrap().state, JobState::Running);
    run(work);
    assert_eq!(jobs.show(paused.id).unwrap().state, JobState::Done);
    jobs.forget(interrupted.id).unwrap();
    assert_eq!(Jobs::open_with(dir.path(), all).unwrap().to_begin_again(), [] as [u64; 0]);
}

#[test]
fn a_cancel_outlives_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = Jobs::open_with(dir.path(), all).unwrap();
    let (begun, _never_run) = jobs.begin(kind(), None, |_| never()).unwrap();
    jobs.cancel(begun.id).unwrap();
    let jobs = Jobs::open_with(dir.path(), all).unwrap();
    // Another job has the list written again, before this one was begun again.
    let (_, another) = jobs.begin(kind(), None, |_| async { Ok(json!(2)) }).unwrap();
    run(another);
    jobs.forget(begun.id + 1).unwrap();
    let jobs = Jobs::open_with(dir.path(), all).unwrap();
    let clean = |job: JobHandle| async move {
        assert!(!job.will_be_begun_again());
        job.progress().check().map(|()| json!(1))
    };
    let (_, work) = jobs.begin_again(begun.id, clean).unwrap();
    run(work);
    assert_eq!(states(&Jobs::open_with(dir.path(), all).unwrap()), [(begun.id, JobState::Cancelled)]);
}

#[test]
fn what_cannot_be_recorded_does_not_happen() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let jobs = Jobs::open_with(&state, all).unwrap();
    let (begun, _never_run) = jobs.begin(kind(), None, |_| never()).unwrap();
    assert!(matches!(jobs.set_rate_limit(begun.id, Some(0)), Err(EngineError::Invalid(_))));
    std::fs::rename(&state, dir.path().join("away")).unwrap();
    assert!(jobs.begin(kind(), None, |_| never()).is_err());
    assert!(jobs.pause(begun.id).is_err());
    assert!(jobs.set_rate_limit(begun.id, Some(5)).is_err());
    let status = jobs.show(begun.id).unwrap();
    assert_eq!((status.state, status.rate_limit), (JobState::Running, None));
    assert_eq!(jobs.all().len(), 1);
}

#[test]
fn what_fails_while_the_daemon_ends_goes_on_later() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = Jobs::open_with(dir.path(), all).unwrap();
    let failing = |_| async { Err(EngineError::Invalid("the disk is closed".to_owned())) };
    let (interrupted, first) = jobs.begin(kind(), None, failing).unwrap();
    let (failed, second) = jobs.begin(kind(), None, failing).unwrap();
    run(second);
    jobs.interrupt_all();
    run(first);
    assert_eq!(states(&jobs), [(interrupted.id, JobState::Interrupted), (failed.id, JobState::Failed)]);
    assert!(matches!(jobs.begin(kind(), None, |_| never()).err(), Some(EngineError::DaemonEnds)));
    assert!(matches!(jobs.begin_again(interrupted.id, |_| never()).err(), Some(EngineError::DaemonEnds)));
}

#[test]
fn a_list_that_is_not_understood_is_kept() {
    let position = r#"{"position":1}"#;
    for text in [
        "no JSON",
        r#"{"version":99,"jobs":"of another time"}"#,
        r#"{"version":2,"last":18446744073709551615,"jobs":[]}"#,
    ] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("jobs.json"), text).unwrap();
        std::fs::write(dir.path().join("job-3.position"), position).unwrap();
        for _ in 0..2 {
            let jobs = Jobs::open(dir.path()).unwrap();
            run(jobs.begin(kind(), None, |_| async { Ok(json!(1)) }).unwrap().1);
        }
        assert_eq!(std::fs::read_to_string(dir.path().join("jobs.json.damaged-0")).unwrap(), text);
        assert_eq!(states(&Jobs::open(dir.path()).unwrap()).len(), 2);
    }
}
