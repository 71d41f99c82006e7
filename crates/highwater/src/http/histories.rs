//! Histories of disks over HTTP: marks, and what changed since.

use super::State;
use super::routes::{Answer, Part, body, query, uninterrupted};
use api::{ChangesQuery, ChangesReport, ErrorBody, HistoryReport, MarkList, MarkReport, MarkSpec};
use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{self};
use axum::http::StatusCode;

/// Ranges in one answer to `changes`.
const CHANGED_RANGES: usize = 16384;

/// Takes a mark of disks, or of all disks of virtual machines, at one instant: on all of them, or on none.
#[utoipa::path(post, path = "/v1/marks", tag = "histories", request_body = MarkSpec, responses(
    (status = 201, body = MarkList),
    (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn take_mark(
    extract::State(state): extract::State<State>,
    spec: Result<Json<MarkSpec>, JsonRejection>,
) -> Answer<(StatusCode, Json<MarkList>)> {
    let spec = body(spec)?;
    let engine = state.engine;
    let marks = uninterrupted(async move { engine.mark(spec).await }).await?;
    Ok((StatusCode::CREATED, Json(MarkList { marks })))
}

/// A disk's history, as it is now.
#[utoipa::path(get, path = "/v1/disks/{name}/history", tag = "histories",
    params(("name" = String, Path, description = "The disk")),
    responses((status = 200, body = HistoryReport), (status = 404, body = ErrorBody)))]
pub(super) async fn history(
    extract::State(state): extract::State<State>,
    Part(name): Part<String>,
) -> Answer<Json<HistoryReport>> {
    Ok(Json(state.engine.history(&name).await?))
}

/// Trusts all marks of a disk again, on the user's word that nobody has changed the image unseen.
#[utoipa::path(post, path = "/v1/disks/{name}/history/trust", tag = "histories",
    params(("name" = String, Path, description = "The disk")),
    responses((status = 200, body = MarkList), (status = 404, body = ErrorBody), (status = 501, body = ErrorBody)))]
pub(super) async fn trust(
    extract::State(state): extract::State<State>,
    Part(name): Part<String>,
) -> Answer<Json<MarkList>> {
    let engine = state.engine;
    let marks = uninterrupted(async move { engine.trust_history(&name).await }).await?;
    Ok(Json(MarkList { marks }))
}

/// A disk's marks, oldest first.
#[utoipa::path(get, path = "/v1/disks/{name}/marks", tag = "histories",
    params(("name" = String, Path, description = "The disk")),
    responses((status = 200, body = MarkList), (status = 404, body = ErrorBody), (status = 501, body = ErrorBody)))]
pub(super) async fn list_marks(
    extract::State(state): extract::State<State>,
    Part(name): Part<String>,
) -> Answer<Json<MarkList>> {
    Ok(Json(MarkList { marks: state.engine.marks(&name).await? }))
}

/// One mark.
#[utoipa::path(get, path = "/v1/disks/{name}/marks/{mark}", tag = "histories",
    params(("name" = String, Path, description = "The disk"), ("mark" = String, Path, description = "The mark")),
    responses((status = 200, body = MarkReport), (status = 404, body = ErrorBody)))]
pub(super) async fn show_mark(
    extract::State(state): extract::State<State>,
    Part((name, mark)): Part<(String, String)>,
) -> Answer<Json<MarkReport>> {
    Ok(Json(state.engine.mark_named(&name, &mark).await?))
}

/// Forgets a mark.
#[utoipa::path(delete, path = "/v1/disks/{name}/marks/{mark}", tag = "histories",
    params(("name" = String, Path, description = "The disk"), ("mark" = String, Path, description = "The mark")),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn delete_mark(
    extract::State(state): extract::State<State>,
    Part((name, mark)): Part<(String, String)>,
) -> Answer<StatusCode> {
    let engine = state.engine;
    uninterrupted(async move { engine.delete_mark(&name, &mark).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What changed on a disk since a mark; a bounded part of it, and where to ask on.
#[utoipa::path(get, path = "/v1/disks/{name}/changes", tag = "histories",
    params(("name" = String, Path, description = "The disk"), ChangesQuery), responses(
    (status = 200, body = ChangesReport),
    (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn changes(
    extract::State(state): extract::State<State>,
    Part(name): Part<String>,
    which: Result<extract::Query<ChangesQuery>, QueryRejection>,
) -> Answer<Json<ChangesReport>> {
    let ChangesQuery { since, until, start, most } = query(which)?;
    let most = most.unwrap_or(CHANGED_RANGES).min(CHANGED_RANGES);
    Ok(Json(state.engine.changes(&name, since, until, start, most).await?))
}
