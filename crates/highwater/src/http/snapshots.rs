//! Snapshots of disks over HTTP.

use super::State;
use super::routes::{Answer, Part, body, uninterrupted};
use api::{CloneSpec, DiskStatus, ErrorBody, ImageInfo, SnapshotList, SnapshotSpec};
use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{self};
use axum::http::StatusCode;

/// Takes a snapshot of disks, or of all disks of virtual machines, at one instant: on all of them, or on none.
#[utoipa::path(post, path = "/v1/snapshots", tag = "snapshots", request_body = SnapshotSpec, responses(
    (status = 201, body = SnapshotList),
    (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn take_snapshot(
    extract::State(state): extract::State<State>,
    spec: Result<Json<SnapshotSpec>, JsonRejection>,
) -> Answer<(StatusCode, Json<SnapshotList>)> {
    let spec = body(spec)?;
    let engine = state.engine;
    let snapshots = uninterrupted(async move { engine.snapshot(spec).await }).await?;
    Ok((StatusCode::CREATED, Json(SnapshotList { snapshots })))
}

/// A disk's snapshots, oldest first.
#[utoipa::path(get, path = "/v1/disks/{name}/snapshots", tag = "snapshots",
    params(("name" = String, Path, description = "The disk")),
    responses((status = 200, body = SnapshotList), (status = 404, body = ErrorBody)))]
pub(super) async fn list_snapshots(
    extract::State(state): extract::State<State>,
    Part(name): Part<String>,
) -> Answer<Json<SnapshotList>> {
    Ok(Json(SnapshotList { snapshots: state.engine.snapshots(&name).await? }))
}

/// Has a disk that nobody is connected to go back to a snapshot. What it holds now, and no snapshot holds, is lost.
#[utoipa::path(post, path = "/v1/disks/{name}/snapshots/{snapshot}/revert", tag = "snapshots",
    params(("name" = String, Path, description = "The disk"), ("snapshot" = String, Path, description = "The snapshot")),
    responses((status = 200, body = DiskStatus), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn revert(
    extract::State(state): extract::State<State>,
    Part((name, snapshot)): Part<(String, String)>,
) -> Answer<Json<DiskStatus>> {
    let engine = state.engine;
    Ok(Json(uninterrupted(async move { engine.revert(&name, &snapshot).await }).await?))
}

/// Makes a new qcow2 image that begins as a snapshot of a disk and shares its bytes.
#[utoipa::path(post, path = "/v1/disks/{name}/snapshots/{snapshot}/clones", tag = "snapshots", request_body = CloneSpec,
    params(("name" = String, Path, description = "The disk"), ("snapshot" = String, Path, description = "The snapshot")),
    responses((status = 201, body = ImageInfo), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn clone(
    extract::State(state): extract::State<State>,
    Part((name, snapshot)): Part<(String, String)>,
    spec: Result<Json<CloneSpec>, JsonRejection>,
) -> Answer<(StatusCode, Json<ImageInfo>)> {
    let spec = body(spec)?;
    let engine = state.engine;
    let info = uninterrupted(async move { engine.clone_snapshot(&name, &snapshot, spec).await }).await?;
    Ok((StatusCode::CREATED, Json(info)))
}
