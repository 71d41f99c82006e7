//! One function per path and method.

use super::{Refusal, State, events};
use api::{
    DiskList, DiskSpec, DiskStatus, ErrorBody, ExportQuery, ExportSpec, ExportStatus, ImageInfo, JobKind, JobList,
    JobStatus, MapQuery, MapReply, ResizeRequest, VersionInfo,
};
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{self, DefaultBodyLimit, Path};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::{Json, Router};
use disk::ByteRange;
use engine::EngineError;
use std::sync::Arc;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// No honest request is larger.
const LARGEST_BODY: usize = 1 << 20;
/// Entries in one answer to `map`.
const MAP_ENTRIES: usize = 16384;

#[derive(OpenApi)]
#[openapi(
    info(title = "Highwater", description = "Disks, their exports, and work on images."),
    components(schemas(ErrorBody)),
    tags(
        (name = "disks", description = "Disks of the catalogue and their exports"),
        (name = "jobs", description = "Long work on image files"),
        (name = "daemon", description = "The daemon itself")
    )
)]
struct Document;

type Answer<T> = Result<T, Refusal>;

/// All paths.
pub(super) fn router(state: State) -> Router {
    let (router, document) = described();
    let document = Arc::new(document.to_json().unwrap_or_default());
    router
        .route(
            "/openapi.json",
            axum::routing::get(move || {
                let document = document.to_string();
                async move { ([(header::CONTENT_TYPE, "application/json")], document) }
            }),
        )
        .fallback(|| async { Refusal(EngineError::NoSuchPath) })
        .method_not_allowed_fallback(|| async { Refusal(EngineError::NoSuchPath) })
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .with_state(state)
}

fn described() -> (Router<State>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(version))
        .routes(routes!(events::events))
        .routes(routes!(metrics))
        .routes(routes!(list_disks, add_disk))
        .routes(routes!(show_disk, remove_disk))
        .routes(routes!(add_export, remove_exports))
        .routes(routes!(map))
        .routes(routes!(info))
        .routes(routes!(resize))
        .routes(routes!(list_jobs, start_job))
        .routes(routes!(show_job, cancel_job))
        .split_for_parts()
}

/// Who answers.
#[utoipa::path(get, path = "/v1/version", tag = "daemon", responses((status = 200, body = VersionInfo)))]
async fn version(extract::State(state): extract::State<State>) -> Json<VersionInfo> {
    Json(VersionInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        api: 1,
        pid: std::process::id(),
        io_threads: state.engine.io_threads(),
        io_backend: state.engine.io_backend().to_owned(),
    })
}

/// Counters in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", tag = "daemon",
    responses((status = 200, content_type = "text/plain", body = String)))]
async fn metrics(extract::State(state): extract::State<State>) -> impl IntoResponse {
    const KIND: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, KIND)], state.engine.metrics_text())
}

/// All disks.
#[utoipa::path(get, path = "/v1/disks", tag = "disks", responses((status = 200, body = DiskList)))]
async fn list_disks(extract::State(state): extract::State<State>) -> Json<DiskList> {
    Json(DiskList { disks: state.engine.disks_status() })
}

/// Opens an image as a disk, with its exports, and enters it into the catalogue.
#[utoipa::path(post, path = "/v1/disks", tag = "disks", request_body = DiskSpec, responses(
    (status = 201, body = DiskStatus),
    (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
async fn add_disk(
    extract::State(state): extract::State<State>,
    spec: Result<Json<DiskSpec>, JsonRejection>,
) -> Answer<(StatusCode, Json<DiskStatus>)> {
    let spec = body(spec)?;
    let engine = state.engine;
    let status = uninterrupted(async move { engine.add_disk(spec).await }).await?;
    Ok((StatusCode::CREATED, Json(status)))
}

/// One disk.
#[utoipa::path(get, path = "/v1/disks/{name}", tag = "disks", params(("name" = String, Path, description = "The disk")),
    responses((status = 200, body = DiskStatus), (status = 404, body = ErrorBody)))]
async fn show_disk(extract::State(state): extract::State<State>, Path(name): Path<String>) -> Answer<Json<DiskStatus>> {
    Ok(Json(state.engine.disk(&name)?))
}

/// Closes a disk and forgets it; its image is left.
#[utoipa::path(delete, path = "/v1/disks/{name}", tag = "disks",
    params(("name" = String, Path, description = "The disk")),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
async fn remove_disk(extract::State(state): extract::State<State>, Path(name): Path<String>) -> Answer<StatusCode> {
    let engine = state.engine;
    uninterrupted(async move { engine.remove_disk(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Opens one more export of a disk.
#[utoipa::path(post, path = "/v1/disks/{name}/exports", tag = "disks", request_body = ExportSpec,
    params(("name" = String, Path, description = "The disk")), responses(
    (status = 201, body = ExportStatus),
    (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
async fn add_export(
    extract::State(state): extract::State<State>,
    Path(name): Path<String>,
    spec: Result<Json<ExportSpec>, JsonRejection>,
) -> Answer<(StatusCode, Json<ExportStatus>)> {
    let spec = body(spec)?;
    let engine = state.engine;
    let status = uninterrupted(async move { engine.add_export(&name, spec).await }).await?;
    Ok((StatusCode::CREATED, Json(status)))
}

/// Closes one export of a disk, or all.
#[utoipa::path(delete, path = "/v1/disks/{name}/exports", tag = "disks",
    params(("name" = String, Path, description = "The disk"), ExportQuery),
    responses((status = 204), (status = 404, body = ErrorBody)))]
async fn remove_exports(
    extract::State(state): extract::State<State>,
    Path(name): Path<String>,
    which: Result<extract::Query<ExportQuery>, QueryRejection>,
) -> Answer<StatusCode> {
    let which = query(which)?;
    let engine = state.engine;
    uninterrupted(async move { engine.remove_exports(&name, which.name.as_deref()).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Which ranges of a disk hold data.
#[utoipa::path(get, path = "/v1/disks/{name}/map", tag = "disks",
    params(("name" = String, Path, description = "The disk"), MapQuery),
    responses((status = 200, body = MapReply), (status = 404, body = ErrorBody)))]
async fn map(
    extract::State(state): extract::State<State>,
    Path(name): Path<String>,
    part: Result<extract::Query<MapQuery>, QueryRejection>,
) -> Answer<Json<MapReply>> {
    let MapQuery { start, length } = query(part)?;
    let range = match length {
        None => ByteRange::between(start, u64::MAX),
        Some(length) => ByteRange::checked(start, length)
            .ok_or_else(|| EngineError::Invalid(format!("{length} bytes from {start} are beyond all disks")))?,
    };
    let (entries, next) = state.engine.map(&name, range, MAP_ENTRIES).await?;
    Ok(Json(MapReply { entries, next }))
}

/// The facts of a disk's image.
#[utoipa::path(get, path = "/v1/disks/{name}/info", tag = "disks",
    params(("name" = String, Path, description = "The disk")),
    responses((status = 200, body = ImageInfo), (status = 404, body = ErrorBody)))]
async fn info(extract::State(state): extract::State<State>, Path(name): Path<String>) -> Answer<Json<ImageInfo>> {
    Ok(Json(state.engine.info(&name).await?))
}

/// Changes a disk's size. New connections see it.
#[utoipa::path(post, path = "/v1/disks/{name}/resize", tag = "disks", request_body = ResizeRequest,
    params(("name" = String, Path, description = "The disk")),
    responses((status = 200, body = DiskStatus), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
async fn resize(
    extract::State(state): extract::State<State>,
    Path(name): Path<String>,
    request: Result<Json<ResizeRequest>, JsonRejection>,
) -> Answer<Json<DiskStatus>> {
    let ResizeRequest { size, shrink } = body(request)?;
    let engine = state.engine;
    Ok(Json(uninterrupted(async move { engine.resize(&name, size, shrink).await }).await?))
}

/// All jobs, oldest first.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", responses((status = 200, body = JobList)))]
async fn list_jobs(extract::State(state): extract::State<State>) -> Json<JobList> {
    Json(JobList { jobs: state.engine.jobs().all() })
}

/// Starts a job: create, convert, compare, check, measure or resize of image files.
#[utoipa::path(post, path = "/v1/jobs", tag = "jobs", request_body = JobKind,
    responses((status = 202, body = JobStatus), (status = 400, body = ErrorBody)))]
async fn start_job(
    extract::State(state): extract::State<State>,
    kind: Result<Json<JobKind>, JsonRejection>,
) -> Answer<(StatusCode, Json<JobStatus>)> {
    let (status, work) = state.engine.begin_job(body(kind)?)?;
    tokio::spawn(work);
    Ok((StatusCode::ACCEPTED, Json(status)))
}

/// One job.
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = u64, Path, description = "The job")),
    responses((status = 200, body = JobStatus), (status = 404, body = ErrorBody)))]
async fn show_job(extract::State(state): extract::State<State>, Path(id): Path<u64>) -> Answer<Json<JobStatus>> {
    Ok(Json(state.engine.jobs().show(id)?))
}

/// Asks a running job to stop, or forgets one that has ended.
#[utoipa::path(delete, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = u64, Path, description = "The job")),
    responses((status = 204), (status = 404, body = ErrorBody)))]
async fn cancel_job(extract::State(state): extract::State<State>, Path(id): Path<u64>) -> Answer<StatusCode> {
    state.engine.jobs().cancel(id)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Runs a change to its end even if the client goes away in its middle.
async fn uninterrupted<T: Send + 'static>(
    change: impl Future<Output = Result<T, EngineError>> + Send + 'static,
) -> Result<T, EngineError> {
    tokio::spawn(change).await.unwrap_or(Err(EngineError::ThreadGone))
}

fn body<T>(body: Result<Json<T>, JsonRejection>) -> Result<T, EngineError> {
    body.map(|Json(body)| body).map_err(|e| EngineError::Invalid(lower(&e.body_text())))
}

fn query<T>(query: Result<extract::Query<T>, QueryRejection>) -> Result<T, EngineError> {
    query.map(|extract::Query(query)| query).map_err(|e| EngineError::Invalid(lower(&e.body_text())))
}

fn lower(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or_else(String::new, |first| first.to_lowercase().chain(rest).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_names_every_path() {
        let document = serde_json::to_value(described().1).unwrap();
        for path in [
            "/v1/version",
            "/v1/events",
            "/metrics",
            "/v1/disks",
            "/v1/disks/{name}",
            "/v1/disks/{name}/exports",
            "/v1/disks/{name}/map",
            "/v1/disks/{name}/info",
            "/v1/disks/{name}/resize",
            "/v1/jobs",
            "/v1/jobs/{id}",
        ] {
            assert!(document["paths"][path].is_object(), "{path} is not described");
        }
        for schema in ["DiskSpec", "DiskStatus", "ErrorBody", "ExportSpec", "ImageInfo", "JobKind", "MapEntry"] {
            assert!(document["components"]["schemas"][schema].is_object(), "{schema} is not described");
        }
    }
}
