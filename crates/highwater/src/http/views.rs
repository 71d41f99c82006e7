//! Views of disks at their marks over HTTP.

use super::State;
use super::routes::{Answer, Part, uninterrupted};
use api::{ErrorBody, ViewList};
use axum::Json;
use axum::extract;
use axum::http::StatusCode;

/// All views.
#[utoipa::path(get, path = "/v1/views", tag = "histories", responses((status = 200, body = ViewList)))]
pub(super) async fn list_views(extract::State(state): extract::State<State>) -> Json<ViewList> {
    Json(ViewList { views: state.engine.views_status().await })
}

/// Closes a view and forgets what it has saved; its mark stays.
#[utoipa::path(delete, path = "/v1/views/{name}", tag = "histories",
    params(("name" = String, Path, description = "The disk's and the mark's names with @ between")),
    responses((status = 204), (status = 404, body = ErrorBody)))]
pub(super) async fn close_view(
    extract::State(state): extract::State<State>,
    Part(name): Part<String>,
) -> Answer<StatusCode> {
    let engine = state.engine;
    uninterrupted(async move { engine.close_view(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}
