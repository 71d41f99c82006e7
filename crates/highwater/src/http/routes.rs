//! One function per path and method.

use super::{Refusal, State, events, histories, jobs, snapshots, views};
use api::{
    ChainReport, DiskList, DiskSpec, DiskStatus, ErrorBody, ExportQuery, ExportSpec, ExportStatus, ImageChain,
    ImageInfo, MapQuery, MapReply, ResizeRequest, VersionInfo,
};
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{self, DefaultBodyLimit, FromRequestParts, Path};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::{Json, Router};
use disk::ByteRange;
use engine::EngineError;
use engine::images::request::NewSize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Duration;
use utoipa::OpenApi;
use utoipa::openapi::{ContentBuilder, Ref, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// No honest request is larger.
const LARGEST_BODY: usize = 1 << 20;
/// Entries in one answer to `map`.
const MAP_ENTRIES: usize = 16384;
/// How long histories are waited for when disks are shown.
const HISTORIES_LIMIT: Duration = Duration::from_millis(500);

#[derive(OpenApi)]
#[openapi(
    info(title = "Highwater", description = "Disks, their exports, and work on images."),
    components(schemas(ErrorBody)),
    tags(
        (name = "histories", description = "Histories of disks, their marks, and what changed since"),
        (name = "snapshots", description = "Frozen states of disks, and clones of them"),
        (name = "disks", description = "Disks of the catalogue and their exports"),
        (name = "jobs", description = "Long work on image files"),
        (name = "daemon", description = "The daemon itself")
    )
)]
struct Document;

pub(super) type Answer<T> = Result<T, Refusal>;

/// A part of the path: a disk's name or a job's number.
pub(super) struct Part<T>(pub(super) T);

impl<T: DeserializeOwned + Send> FromRequestParts<State> for Part<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &State) -> Result<Self, Refusal> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(part)) => Ok(Self(part)),
            Err(rejection) => Err(Refusal(EngineError::Invalid(lower(&rejection.body_text())))),
        }
    }
}

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
        .method_not_allowed_fallback(|| async {
            let body = ErrorBody {
                error: EngineError::NoSuchPath.to_string(),
                kind: EngineError::NoSuchPath.class().word().to_owned(),
                next_step: None,
            };
            (StatusCode::METHOD_NOT_ALLOWED, Json(body))
        })
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .with_state(state)
}

fn described() -> (Router<State>, utoipa::openapi::OpenApi) {
    let (router, mut document) = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(version))
        .routes(routes!(events::events))
        .routes(routes!(metrics))
        .routes(routes!(list_disks, add_disk))
        .routes(routes!(show_disk, remove_disk))
        .routes(routes!(open_disk))
        .routes(routes!(add_export, remove_exports))
        .routes(routes!(map))
        .routes(routes!(info))
        .routes(routes!(chain))
        .routes(routes!(linkage))
        .routes(routes!(resize))
        .routes(routes!(histories::take_mark))
        .routes(routes!(histories::history))
        .routes(routes!(histories::trust))
        .routes(routes!(histories::list_marks))
        .routes(routes!(histories::show_mark, histories::delete_mark))
        .routes(routes!(histories::changes))
        .routes(routes!(snapshots::take_snapshot))
        .routes(routes!(snapshots::list_snapshots))
        .routes(routes!(snapshots::revert))
        .routes(routes!(snapshots::clone))
        .routes(routes!(views::list_views))
        .routes(routes!(views::close_view))
        .routes(routes!(jobs::list_jobs, jobs::start_job))
        .routes(routes!(jobs::show_job, jobs::forget_job))
        .routes(routes!(jobs::cancel_job))
        .routes(routes!(jobs::pause_job))
        .routes(routes!(jobs::resume_job))
        .routes(routes!(jobs::set_job_rate))
        .split_for_parts();
    describe_errors(&mut document);
    (router, document)
}

/// Every operation may be refused, with the same body.
fn describe_errors(document: &mut utoipa::openapi::OpenApi) {
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("ErrorBody"))).build();
    let response = ResponseBuilder::new()
        .description("Refused or failed; `kind` in the body says why, and which status that is")
        .content("application/json", content)
        .build();
    for item in document.paths.paths.values_mut() {
        let operations = [&mut item.get, &mut item.post, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            operation.responses.responses.entry("default".to_owned()).or_insert_with(|| response.clone().into());
        }
    }
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
    look_at_histories(&state).await;
    ([(header::CONTENT_TYPE, KIND)], state.engine.metrics_text())
}

/// All disks.
#[utoipa::path(get, path = "/v1/disks", tag = "disks", responses((status = 200, body = DiskList)))]
async fn list_disks(extract::State(state): extract::State<State>) -> Json<DiskList> {
    look_at_histories(&state).await;
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
async fn show_disk(extract::State(state): extract::State<State>, Part(name): Part<String>) -> Answer<Json<DiskStatus>> {
    look_at_histories(&state).await;
    Ok(Json(state.engine.disk(&name)?))
}

/// Has the present facts of histories in what is told of disks; a thread that does not answer is not waited for.
async fn look_at_histories(state: &State) {
    let _ = tokio::time::timeout(HISTORIES_LIMIT, state.engine.look_at_histories()).await;
}

/// Closes a disk and forgets it; its image is left.
#[utoipa::path(delete, path = "/v1/disks/{name}", tag = "disks",
    params(("name" = String, Path, description = "The disk")),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
async fn remove_disk(extract::State(state): extract::State<State>, Part(name): Part<String>) -> Answer<StatusCode> {
    let engine = state.engine;
    uninterrupted(async move { engine.remove_disk(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Tries again to open a disk that could not be opened, or those of its exports that could not be.
#[utoipa::path(post, path = "/v1/disks/{name}/open", tag = "disks",
    params(("name" = String, Path, description = "The disk")),
    responses((status = 200, body = DiskStatus), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
async fn open_disk(extract::State(state): extract::State<State>, Part(name): Part<String>) -> Answer<Json<DiskStatus>> {
    let engine = state.engine;
    Ok(Json(uninterrupted(async move { engine.open_again(&name).await }).await?))
}

/// Opens one more export of a disk.
#[utoipa::path(post, path = "/v1/disks/{name}/exports", tag = "disks", request_body = ExportSpec,
    params(("name" = String, Path, description = "The disk")), responses(
    (status = 201, body = ExportStatus),
    (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
async fn add_export(
    extract::State(state): extract::State<State>,
    Part(name): Part<String>,
    spec: Result<Json<ExportSpec>, JsonRejection>,
) -> Answer<(StatusCode, Json<ExportStatus>)> {
    let spec = body(spec)?;
    let engine = state.engine;
    let status = uninterrupted(async move { engine.add_export(&name, spec).await }).await?;
    Ok((StatusCode::CREATED, Json(status)))
}

/// Closes one export of a disk, or all with `all=true`.
#[utoipa::path(delete, path = "/v1/disks/{name}/exports", tag = "disks",
    params(("name" = String, Path, description = "The disk"), ExportQuery),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
async fn remove_exports(
    extract::State(state): extract::State<State>,
    Part(name): Part<String>,
    which: Result<extract::Query<ExportQuery>, QueryRejection>,
) -> Answer<StatusCode> {
    let export = match query(which)? {
        ExportQuery { name: Some(export), all: false } => Some(export),
        ExportQuery { name: None, all: true } => None,
        _ => return Err(EngineError::WhichExport(name).into()),
    };
    let engine = state.engine;
    uninterrupted(async move { engine.remove_exports(&name, export.as_deref()).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Which ranges of a disk hold data.
#[utoipa::path(get, path = "/v1/disks/{name}/map", tag = "disks",
    params(("name" = String, Path, description = "The disk"), MapQuery),
    responses((status = 200, body = MapReply), (status = 404, body = ErrorBody)))]
async fn map(
    extract::State(state): extract::State<State>,
    Part(name): Part<String>,
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
async fn info(extract::State(state): extract::State<State>, Part(name): Part<String>) -> Answer<Json<ImageInfo>> {
    Ok(Json(state.engine.info(&name).await?))
}

/// The facts of a disk's image and of all images below it, top first.
#[utoipa::path(get, path = "/v1/disks/{name}/chain", tag = "disks",
    params(("name" = String, Path, description = "The disk")),
    responses((status = 200, body = ImageChain), (status = 404, body = ErrorBody)))]
async fn chain(extract::State(state): extract::State<State>, Part(name): Part<String>) -> Answer<Json<ImageChain>> {
    Ok(Json(ImageChain { images: state.engine.info_of_chain(&name).await? }))
}

/// The layers of a disk's chain, whether each is what the one above it was bound to, as their files are now, and which
/// other images depend on them.
#[utoipa::path(get, path = "/v1/disks/{name}/linkage", tag = "disks",
    params(("name" = String, Path, description = "The disk")),
    responses((status = 200, body = ChainReport), (status = 404, body = ErrorBody)))]
async fn linkage(extract::State(state): extract::State<State>, Part(name): Part<String>) -> Answer<Json<ChainReport>> {
    Ok(Json(state.engine.linkage(&name).await?))
}

/// Changes a disk's size. New connections see it.
#[utoipa::path(post, path = "/v1/disks/{name}/resize", tag = "disks", request_body = ResizeRequest,
    params(("name" = String, Path, description = "The disk")),
    responses((status = 200, body = DiskStatus), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
async fn resize(
    extract::State(state): extract::State<State>,
    Part(name): Part<String>,
    request: Result<Json<ResizeRequest>, JsonRejection>,
) -> Answer<Json<DiskStatus>> {
    let ResizeRequest { size, shrink, preallocation } = body(request)?;
    let engine = state.engine;
    let change = async move { engine.resize(&name, NewSize::To(size), shrink, preallocation).await };
    Ok(Json(uninterrupted(change).await?))
}

/// Runs a change to its end even if the client goes away in its middle.
pub(super) async fn uninterrupted<T: Send + 'static>(
    change: impl Future<Output = Result<T, EngineError>> + Send + 'static,
) -> Result<T, EngineError> {
    tokio::spawn(change).await.unwrap_or(Err(EngineError::ThreadGone))
}

pub(super) fn body<T>(body: Result<Json<T>, JsonRejection>) -> Result<T, EngineError> {
    body.map(|Json(body)| body).map_err(|e| EngineError::Invalid(lower(&e.body_text())))
}

pub(super) fn query<T>(query: Result<extract::Query<T>, QueryRejection>) -> Result<T, EngineError> {
    query.map(|extract::Query(query)| query).map_err(|e| EngineError::Invalid(lower(&e.body_text())))
}

fn lower(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or_else(String::new, |first| first.to_lowercase().chain(rest).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::JobKind;
    use serde_json::Value;

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
            "/v1/disks/{name}/chain",
            "/v1/disks/{name}/open",
            "/v1/disks/{name}/resize",
            "/v1/marks",
            "/v1/disks/{name}/history",
            "/v1/disks/{name}/history/trust",
            "/v1/disks/{name}/marks",
            "/v1/disks/{name}/marks/{mark}",
            "/v1/disks/{name}/changes",
            "/v1/jobs",
            "/v1/jobs/{id}",
            "/v1/jobs/{id}/cancel",
            "/v1/jobs/{id}/pause",
            "/v1/jobs/{id}/resume",
            "/v1/jobs/{id}/rate",
        ] {
            assert!(document["paths"][path].is_object(), "{path} is not described");
            for (method, operation) in document["paths"][path].as_object().unwrap() {
                assert!(operation["responses"]["default"].is_object(), "{method} {path} has no description of errors");
            }
        }
        for schema in
            ["DiskSpec", "DiskStatus", "ErrorBody", "ExportSpec", "ImageInfo", "JobKind", "MapEntry", "MarkSpec"]
        {
            assert!(document["components"]["schemas"][schema].is_object(), "{schema} is not described");
        }
        assert!(document["components"]["schemas"]["BTreeMap"].is_null(), "a type of the language has slipped in");
    }

    /// What the description of a job's kind demands, as far as this document uses it.
    fn fits(document: &Value, schema: &Value, value: &Value) -> bool {
        if let Some(name) = schema["$ref"].as_str() {
            let schema = document.pointer(name.trim_start_matches('#')).expect("a reference leads somewhere");
            return fits(document, schema, value);
        }
        assert!(schema["allOf"].is_null(), "parts that must all fit are not understood here");
        if let Some(kinds) = schema["oneOf"].as_array() {
            return kinds.iter().filter(|kind| fits(document, kind, value)).count() == 1;
        }
        let is = |kind: &Value| match kind.as_str() {
            Some("null") => value.is_null(),
            Some("string") => value.is_string(),
            Some("integer") => value.is_u64(),
            Some("boolean") => value.is_boolean(),
            Some("array") => value.is_array(),
            Some("object") => value.is_object(),
            other => panic!("the type {other:?} is not understood here"),
        };
        match &schema["type"] {
            Value::Null => {}
            Value::Array(kinds) if !kinds.iter().any(is) => return false,
            Value::Array(_) => {}
            kind if !is(kind) => return false,
            _ => {}
        }
        if let Some(words) = schema["enum"].as_array() {
            return words.contains(value);
        }
        let Some(object) = value.as_object() else { return true };
        let known = |name: &String| schema["properties"][name].is_object();
        let open = schema["additionalProperties"] != Value::Bool(false);
        let required = schema["required"].as_array().into_iter().flatten();
        object.keys().all(|name| open || known(name))
            && required.into_iter().all(|name| object.contains_key(name.as_str().unwrap_or_default()))
            && object
                .iter()
                .filter(|(name, _)| known(name))
                .all(|(name, value)| fits(document, &schema["properties"][name], value))
    }

    #[test]
    fn the_document_allows_real_jobs() {
        let document = serde_json::to_value(described().1).unwrap();
        let schema = &document["components"]["schemas"]["JobKind"];
        for text in [
            r#"{"job":"create","file":"/x/a.qcow2","format":"qcow2","size":1,"options":{"compat":"1.1"}}"#,
            r#"{"job":"convert","source":{"file":"/x/a.raw"},"target":"/x/b.raw","format":"raw"}"#,
            r#"{"job":"convert","source":{"disk":"d"},"target":"/x/b.raw","format":"raw"}"#,
            r#"{"job":"compare","first":{"file":"/a"},"second":{"file":"/b"},"strict":true}"#,
            r#"{"job":"check","file":"/x/a.qcow2","repair":"all"}"#,
            r#"{"job":"measure","size":5,"format":"qcow2"}"#,
            r#"{"job":"resize","file":"/x/a.qcow2","size":{"grow":512}}"#,
        ] {
            let value: Value = serde_json::from_str(text).unwrap();
            let kind: JobKind = serde_json::from_str(text).unwrap();
            assert!(fits(&document, schema, &value), "{text} does not fit {schema:#}");
            let whole = serde_json::to_value(kind).unwrap();
            assert!(fits(&document, schema, &whole), "{whole} does not fit {schema:#}");
        }
        for text in [r#"{"job":"sing"}"#, r#"{"job":"check"}"#, r#"{"job":"check","file":"/x","fiel":1}"#] {
            let value: Value = serde_json::from_str(text).unwrap();
            assert!(!fits(&document, schema, &value), "{text} fits");
        }
    }
}
