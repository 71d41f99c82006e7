//! `/v1/events`: what happens, as server-sent events.

use super::State;
use axum::extract;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::stream::{self, Stream, StreamExt};
use std::convert::Infallible;

/// What happens from now on, as server-sent events.
///
/// One event per message, its name in `event`, its body in `data`. A reader that falls 1,024 events behind
/// is cut off and should list everything again.
#[utoipa::path(get, path = "/v1/events", tag = "daemon",
    responses((status = 200, description = "A stream of events", content_type = "text/event-stream", body = api::Event)))]
pub(super) async fn events(
    extract::State(state): extract::State<State>,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let events = state.engine.subscribe().map(|event| {
        let value = serde_json::to_value(&event).unwrap_or_default();
        let name = value.get("event").and_then(|n| n.as_str()).unwrap_or("unknown").to_owned();
        Ok(Event::default().event(name).data(value.to_string()))
    });
    let mut ending = state.ending;
    let end = async move {
        let _ = ending.wait_for(|end| *end).await;
    };
    // A comment first, so that the reader knows that it has been subscribed.
    let hello = stream::once(async { Ok(Event::default().comment("highwater")) });
    Sse::new(hello.chain(events).take_until(end)).keep_alive(KeepAlive::default())
}
