//! Jobs over HTTP, and where they run.

use super::State;
use super::routes::{Answer, Part, body, query, uninterrupted};
use api::{ErrorBody, JobKind, JobList, JobQuery, JobRate, JobStatus};
use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{self};
use axum::http::StatusCode;
use engine::{Engine, JobWork};
use std::sync::Arc;
use std::time::Duration;

/// Between two events that tell how far a job is.
const BETWEEN_PROGRESS: Duration = Duration::from_millis(500);

/// Runs a job to its end, and tells meanwhile how far it is.
fn run(engine: Arc<Engine>, id: u64, work: JobWork) {
    tokio::spawn(work);
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(BETWEEN_PROGRESS);
        tick.tick().await;
        loop {
            tick.tick().await;
            if !engine.tell_job_progress(id) {
                return;
            }
        }
    });
}

/// Lets those jobs go on that the end of the last daemon has interrupted and that can.
pub(crate) fn resume_jobs(engine: &Arc<Engine>) {
    for (status, work) in engine.resume_jobs() {
        run(Arc::clone(engine), status.id, work);
    }
}

/// All jobs, oldest first.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", responses((status = 200, body = JobList)))]
pub(super) async fn list_jobs(extract::State(state): extract::State<State>) -> Json<JobList> {
    Json(JobList { jobs: state.engine.jobs().all() })
}

/// Starts a job: create, convert, compare, check, measure or resize of image files. Convert, compare and measure
/// read disks of the daemon as well.
#[utoipa::path(post, path = "/v1/jobs", tag = "jobs", params(JobQuery), request_body = JobKind,
    responses((status = 202, body = JobStatus), (status = 400, body = ErrorBody)))]
pub(super) async fn start_job(
    extract::State(state): extract::State<State>,
    how: Result<extract::Query<JobQuery>, QueryRejection>,
    kind: Result<Json<JobKind>, JsonRejection>,
) -> Answer<(StatusCode, Json<JobStatus>)> {
    let JobQuery { bytes_per_second } = query(how)?;
    let (status, work) = state.engine.begin_job(body(kind)?, bytes_per_second)?;
    run(state.engine, status.id, work);
    Ok((StatusCode::ACCEPTED, Json(status)))
}

/// One job.
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = u64, Path, description = "The job")),
    responses((status = 200, body = JobStatus), (status = 404, body = ErrorBody)))]
pub(super) async fn show_job(
    extract::State(state): extract::State<State>,
    Part(id): Part<u64>,
) -> Answer<Json<JobStatus>> {
    Ok(Json(state.engine.jobs().show(id)?))
}

/// Forgets a job that has ended, and its result. One that was interrupted does not go on then.
#[utoipa::path(delete, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = u64, Path, description = "The job")),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn forget_job(
    extract::State(state): extract::State<State>,
    Part(id): Part<u64>,
) -> Answer<StatusCode> {
    state.engine.jobs().forget(id)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Asks a job to stop, paused or not; it ends as `cancelled` soon after.
#[utoipa::path(post, path = "/v1/jobs/{id}/cancel", tag = "jobs", params(("id" = u64, Path, description = "The job")),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn cancel_job(
    extract::State(state): extract::State<State>,
    Part(id): Part<u64>,
) -> Answer<StatusCode> {
    state.engine.jobs().cancel(id)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Holds a job up before its next piece of work. What is under way is finished.
#[utoipa::path(post, path = "/v1/jobs/{id}/pause", tag = "jobs", params(("id" = u64, Path, description = "The job")),
    responses((status = 200, body = JobStatus), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn pause_job(
    extract::State(state): extract::State<State>,
    Part(id): Part<u64>,
) -> Answer<Json<JobStatus>> {
    Ok(Json(state.engine.pause_job(id)?))
}

/// Lets a paused job go on; or one that was interrupted, if it is of a kind that can.
#[utoipa::path(post, path = "/v1/jobs/{id}/resume", tag = "jobs", params(("id" = u64, Path, description = "The job")),
    responses((status = 200, body = JobStatus), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn resume_job(
    extract::State(state): extract::State<State>,
    Part(id): Part<u64>,
) -> Answer<Json<JobStatus>> {
    // Not between the job's beginning and its run: nobody else would run it.
    let engine = state.engine;
    let resume = async move {
        let (status, work) = engine.resume_job(id)?;
        if let Some(work) = work {
            run(engine, id, work);
        }
        Ok(status)
    };
    Ok(Json(uninterrupted(resume).await?))
}

/// How many bytes a second a job may move from now on; `null`: as many as it can.
#[utoipa::path(post, path = "/v1/jobs/{id}/rate", tag = "jobs", params(("id" = u64, Path, description = "The job")),
    request_body = JobRate, responses(
    (status = 200, body = JobStatus), (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn set_job_rate(
    extract::State(state): extract::State<State>,
    Part(id): Part<u64>,
    rate: Result<Json<JobRate>, JsonRejection>,
) -> Answer<Json<JobStatus>> {
    let JobRate { bytes_per_second } = body(rate)?;
    Ok(Json(state.engine.jobs().set_rate_limit(id, bytes_per_second)?))
}
