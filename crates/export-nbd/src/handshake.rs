//! Carrying the negotiation out on a connection.

use crate::connection::{Control, Course};
use crate::negotiation::{Agreement, Negotiation, Step, TlsMode};
use crate::server::{Listed, Shared};
use crate::session::End;
use crate::stream::Stream;
use crate::tls::Tls;
use disk::Buf;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

/// Bytes received at once.
const RECEIVE: usize = 16 << 10;

/// What a successful handshake leads to.
pub(crate) struct Negotiated {
    pub(crate) stream: Stream,
    pub(crate) agreement: Agreement,
    pub(crate) export: Arc<Listed>,
    /// Bytes received behind the last option.
    pub(crate) early: Vec<u8>,
}

/// Negotiates until transmission, or until the server's course changes. The caller limits the time.
pub(crate) async fn negotiate(
    shared: &Shared,
    stream: Stream,
    tls: &Tls,
    control: &Control,
) -> Result<Negotiated, End> {
    let mut dialogue = pin!(converse(shared, stream, tls, control));
    poll_fn(|cx| {
        if let Poll::Ready(result) = dialogue.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        match control.poll_course(cx.waker()) {
            Course::Run => Poll::Pending,
            Course::Drain | Course::Abort => Poll::Ready(Err(End::Orderly)),
        }
    })
    .await
}

async fn converse(shared: &Shared, mut stream: Stream, tls: &Tls, control: &Control) -> Result<Negotiated, End> {
    let mode = match tls {
        Tls::Off => TlsMode::Off,
        Tls::Optional(_) => TlsMode::Optional,
        Tls::Required(_) => TlsMode::Required,
    };
    let mut negotiation = Negotiation::new(mode);
    let mut export: Option<Arc<Listed>> = None;
    let mut answered = None;
    let mut staging = Some(Buf::new(RECEIVE));
    loop {
        let step = match answered.take() {
            Some(step) => step,
            None => {
                if control.course() != Course::Run {
                    negotiation.shut_down();
                }
                negotiation.advance()
            }
        };
        let output = negotiation.take_output();
        if !output.is_empty() {
            stream.send(vec![Buf::copy_of(&output)]).await.map_err(End::Failed)?;
        }
        match step {
            Step::Receive => {
                let buf = staging.take().unwrap_or_else(|| Buf::new(RECEIVE));
                let (result, buf) = stream.receive(buf).await;
                let n = result.map_err(End::Failed)?;
                if n == 0 {
                    return Err(End::Closed);
                }
                negotiation.receive(&buf[..n]);
                staging = Some(buf);
            }
            Step::List => {
                let exports = shared.list();
                let lines =
                    exports.iter().map(|export| (export.export.name.as_str(), export.export.description.as_str()));
                negotiation.list(lines);
            }
            Step::Lookup { name, with_contexts } => {
                export = shared.find(&name);
                let facts = match &export {
                    Some(found) => found.facts(with_contexts).await,
                    None => None,
                };
                answered = negotiation.found(facts);
            }
            Step::StartTls => {
                let (Tls::Optional(identity) | Tls::Required(identity)) = tls else {
                    return Err(End::Violation("TLS is not configured"));
                };
                stream.start_tls(identity).await.map_err(End::Failed)?;
                control.update(|info| info.encrypted = true);
                negotiation.tls_started();
            }
            Step::Transmit(agreement) => {
                // The last look-up was that of the export agreed on.
                let Some(export) = export else { return Err(End::Violation("export does not exist")) };
                return Ok(Negotiated { stream, agreement, export, early: negotiation.into_input() });
            }
            Step::Close(reason) => {
                tracing::debug!(reason, "negotiation ended");
                stream.close().await;
                return Err(End::Orderly);
            }
        }
    }
}
