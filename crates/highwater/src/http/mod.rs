//! The HTTP server: routes over the engine, on a unix socket that only its owner can open.

mod events;
mod histories;
mod jobs;
mod routes;
mod snapshots;
mod socket;
mod views;

pub(crate) use jobs::resume_jobs;
pub(crate) use socket::{ApiSocket, make_private_directory};

use api::ErrorBody;
use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use engine::{Engine, EngineError, ErrorClass, chain_text};
use std::sync::Arc;
use tokio::sync::watch;

/// What every handler can reach.
#[derive(Clone)]
pub(crate) struct State {
    pub(crate) engine: Arc<Engine>,
    /// Becomes true when the daemon ends, so that endless answers end.
    pub(crate) ending: watch::Receiver<bool>,
}

/// Serves until `ending` becomes true and the answers under way are complete.
pub(crate) async fn serve(socket: ApiSocket, state: State) -> std::io::Result<()> {
    let mut ending = state.ending.clone();
    let (listener, _removed_on_drop) = socket.into_listener();
    axum::serve(listener, routes::router(state))
        .with_graceful_shutdown(async move {
            // An error means that the sender is gone, which is the end as well.
            let _ = ending.wait_for(|end| *end).await;
        })
        .await
}

/// An engine's error on its way to a client.
pub(crate) struct Refusal(EngineError);

impl<E: Into<EngineError>> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// Which HTTP status a class of errors has.
fn status_of(class: ErrorClass) -> StatusCode {
    match class {
        ErrorClass::NotFound => StatusCode::NOT_FOUND,
        ErrorClass::Conflict | ErrorClass::InUse | ErrorClass::Cancelled => StatusCode::CONFLICT,
        ErrorClass::Invalid => StatusCode::BAD_REQUEST,
        ErrorClass::Unsupported => StatusCode::NOT_IMPLEMENTED,
        ErrorClass::Corrupt => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorClass::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        ErrorClass::Failed => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let class = self.0.class();
        let body =
            ErrorBody { error: chain_text(&self.0), kind: class.word().to_owned(), next_step: self.0.next_step() };
        (status_of(class), Json(body)).into_response()
    }
}
