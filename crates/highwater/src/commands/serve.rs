//! `highwater serve`.

use super::daemon::{Ends, SocketDirectory, config, serve_until_told};
use super::{Outcome, target};
use crate::args::{ExportArgs, Global, ServeArgs};
use crate::exit::Failure;
use crate::http::ApiSocket;
use crate::output;
use api::{DiskSpec, ExportSpec, ImageSpec, TlsSpec};
use engine::{Engine, SocketAccess, chain_text, name_of_file};
use serde_json::json;

pub(crate) async fn run(global: &Global, args: ServeArgs) -> Outcome {
    let ends = Ends::new()?;
    let socket = match &global.api {
        Some(path) => Some(ApiSocket::bind(&target::absolute(path)?).await?),
        None => None,
    };
    let export = export_spec(&args.export, args.export_name, args.read_only)?;
    let own = match export.socket.is_none() && export.listen.is_none() {
        true => Some(SocketDirectory::make()?),
        false => None,
    };
    let nbd_socket =
        own.as_ref().map_or_else(|| api::runtime_directory().join("nbd.sock"), |d| d.path().join("nbd.sock"));
    let engine = Engine::start(config(&args.threads, None, nbd_socket, SocketAccess::default())).await?;
    let spec = DiskSpec {
        name: name_of_file(&args.file),
        image: ImageSpec { snapshot: args.snapshot, ..ImageSpec::of(target::absolute(&args.file)?, args.format) },
        cache: args.cache,
        read_only: args.read_only,
        despite_fault: args.despite_fault,
        history: target::history(&args.history)?,
        vm: None,
        exports: vec![export],
    };
    let status = match engine.add_disk(spec).await {
        Ok(status) => status,
        Err(error) => {
            if let Err(closing) = engine.shut_down().await {
                tracing::warn!(error = chain_text(&closing), "ending");
            }
            return Err(error.into());
        }
    };
    engine.pin(&status.spec.name);
    let uris: Vec<&String> = status.exports.iter().flat_map(|e| &e.uris).collect();
    if global.wants_json() {
        output::json_line(&json!({
            "event": "ready",
            "disk": status.spec.name,
            "size": status.virtual_size,
            "read-only": status.read_only,
            "history": status.history,
            "uris": uris,
            "api": global.api,
            "pid": std::process::id(),
        }))?;
    } else if !global.quiet {
        for uri in uris {
            output::line(uri)?;
        }
    }
    serve_until_told(engine, socket, ends).await
}

/// An export from the command line.
pub(crate) fn export_spec(args: &ExportArgs, name: Option<String>, read_only: bool) -> Result<ExportSpec, Failure> {
    let tls = match &args.tls {
        None => None,
        Some(dir) => {
            Some(TlsSpec { dir: target::absolute(dir)?, required: !args.tls_optional, verify: args.tls_verify })
        }
    };
    Ok(ExportSpec {
        name,
        socket: args.socket.as_deref().map(target::absolute).transpose()?,
        socket_mode: args.socket_mode.clone(),
        socket_group: args.socket_group.clone(),
        listen: args.listen.clone(),
        tls,
        read_only,
    })
}
