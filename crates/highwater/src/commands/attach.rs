//! `highwater attach`: how QEMU and libvirt attach a disk's export.

use super::{Outcome, target};
use crate::args::{AttachArgs, Global};
use crate::exit;
use crate::output;
use anyhow::anyhow;
use api::{DiskStatus, ExportStatus};
use serde_json::{Value, json};

pub(crate) async fn run(global: &Global, args: AttachArgs) -> Outcome {
    let client = target::client(global)?;
    let disk = client.disk(&args.disk).await?;
    if let Some(error) = &disk.error {
        let name = &disk.spec.name;
        return Err(anyhow!(
            "disk {name:?} is not open ({error}); when that is mended, open it with `highwater disk open {name}`"
        )
        .into());
    }
    let export = choose(&disk, args.export.as_deref())?;
    let attachment = Attachment::of(&disk, export)?;
    if global.wants_json() {
        output::json(&json!({
            "uri": attachment.uri,
            "qemu": { "blockdev": attachment.blockdev, "args": attachment.qemu_args() },
            "libvirt": attachment.libvirt(),
        }))?;
    } else {
        let pairs: Vec<String> =
            attachment.qemu_args().chunks(2).map(|pair| format!("{} {}", pair[0], quoted(&pair[1]))).collect();
        output::line(&format!("# QEMU\n{}\n", pairs.join(" \\\n  ")))?;
        output::line(&format!("# QEMU, in one option\n{}\n", attachment.drive()))?;
        output::line(&format!("<!-- libvirt -->\n{}", attachment.libvirt()))?;
    }
    Ok(exit::OK)
}

fn choose<'a>(disk: &'a DiskStatus, name: Option<&str>) -> anyhow::Result<&'a ExportStatus> {
    let found = match name {
        Some(name) => disk.exports.iter().find(|e| e.name == name),
        None => disk.exports.iter().find(|e| !e.uris.is_empty()),
    };
    let open = found.filter(|e| !e.uris.is_empty());
    open.ok_or_else(|| {
        let name = &disk.spec.name;
        anyhow!("disk {name:?} has no such export that is open; make one with `highwater disk export {name}`")
    })
}

/// One way to attach one export.
struct Attachment {
    node: String,
    uri: String,
    export: String,
    read_only: bool,
    place: Place,
    tls: bool,
    blockdev: Value,
}

enum Place {
    Unix(String),
    Tcp { host: String, port: String },
}

impl Attachment {
    fn of(disk: &DiskStatus, export: &ExportStatus) -> anyhow::Result<Self> {
        let uri = export.uris.first().ok_or_else(|| anyhow!("export {:?} is not open", export.name))?;
        let tls = export.spec.tls.is_some();
        let place = match uri.split_once("://") {
            Some((scheme, rest)) if scheme.ends_with("+unix") => {
                let socket = rest.split_once("?socket=").map_or("", |(_, socket)| socket);
                Place::Unix(decoded(socket))
            }
            Some((_, rest)) => {
                let address = rest.split_once('/').map_or(rest, |(address, _)| address);
                let (host, port) = address.rsplit_once(':').unwrap_or((address, "10809"));
                Place::Tcp { host: host.trim_matches(['[', ']']).to_owned(), port: port.to_owned() }
            }
            None => return Err(anyhow!("{uri:?} is not an NBD URI")),
        };
        // Node names of QEMU begin with a letter and have at most 31 characters.
        let node: String = format!("hw-{}", disk.spec.name).chars().take(31).collect();
        let server = match &place {
            Place::Unix(path) => json!({ "type": "unix", "path": path }),
            Place::Tcp { host, port } => json!({ "type": "inet", "host": host, "port": port }),
        };
        let mut blockdev = json!({
            "driver": "nbd",
            "node-name": node,
            "server": server,
            "export": export.name,
            "discard": "unmap",
            "read-only": disk.read_only || export.spec.read_only,
        });
        if tls {
            blockdev["tls-creds"] = json!("hwtls0");
        }
        let read_only = disk.read_only || export.spec.read_only;
        Ok(Self { node, uri: uri.clone(), export: export.name.clone(), read_only, place, tls, blockdev })
    }

    /// The elements of QEMU's argument vector: options, each with its value.
    fn qemu_args(&self) -> Vec<String> {
        let mut args = Vec::new();
        let mut push = |option: &str, value: String| args.extend([option.to_owned(), value]);
        if self.tls {
            push("-object", "tls-creds-x509,id=hwtls0,endpoint=client,dir=DIRECTORY-WITH-ca-cert.pem".to_owned());
        }
        push("-blockdev", self.blockdev.to_string());
        push("-device", format!("virtio-blk-pci,drive={}", self.node));
        args
    }

    fn drive(&self) -> String {
        let read_only = if self.read_only { ",readonly=on" } else { "" };
        let tls = if self.tls { ",file.tls-creds=hwtls0" } else { "" };
        let comma = |text: &str| text.replace(',', ",,");
        let place = match &self.place {
            Place::Unix(path) => format!("file.server.type=unix,file.server.path={}", comma(path)),
            Place::Tcp { host, port } => {
                format!("file.server.type=inet,file.server.host={},file.server.port={port}", comma(host))
            }
        };
        format!(
            "-drive 'driver=raw,file.driver=nbd,{place},file.export={},discard=unmap,if=virtio{read_only}{tls}'",
            comma(&self.export)
        )
    }

    fn libvirt(&self) -> String {
        let tls = if self.tls { " tls='yes'" } else { "" };
        let host = match &self.place {
            Place::Unix(path) => format!("<host transport='unix' socket='{}'/>", xml(path)),
            Place::Tcp { host, port } => format!("<host name='{}' port='{}'/>", xml(host), xml(port)),
        };
        let read_only = if self.read_only { "\n  <readonly/>" } else { "" };
        format!(
            "<disk type='network' device='disk'>\n  <driver name='qemu' type='raw' discard='unmap'/>\n  \
             <source protocol='nbd' name='{}'{tls}>\n    {host}\n  </source>\n  \
             <target dev='vda' bus='virtio'/>{read_only}\n</disk>",
            xml(&self.export)
        )
    }
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;").replace('"', "&quot;")
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.,=/:".contains(c);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

/// Percent-encoding taken back.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let pair = (*first == b'%').then(|| tail.get(..2)).flatten();
        let byte = pair.and_then(|p| std::str::from_utf8(p).ok()).and_then(|p| u8::from_str_radix(p, 16).ok());
        match byte {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(listen: Option<&str>, uri: &str) -> DiskStatus {
        serde_json::from_value(json!({
            "spec": { "name": "d_1", "image": { "file": "/x/d.raw" } },
            "state": "open",
            "read-only": false,
            "exports": [{ "name": "e<1>", "spec": { "listen": listen }, "uris": [uri] }],
        }))
        .unwrap()
    }

    #[test]
    fn over_a_unix_socket() {
        let disk = disk(None, "nbd+unix:///e%3C1%3E?socket=/run/a%20b.sock");
        let attachment = Attachment::of(&disk, choose(&disk, None).unwrap()).unwrap();
        assert_eq!(attachment.blockdev["server"], json!({ "type": "unix", "path": "/run/a b.sock" }));
        assert_eq!(attachment.blockdev["node-name"], "hw-d_1");
        assert!(attachment.libvirt().contains("name='e&lt;1&gt;'"));
        assert!(attachment.libvirt().contains("socket='/run/a b.sock'"));
        assert!(choose(&disk, Some("other")).is_err());
    }

    #[test]
    fn over_tcp() {
        let disk = disk(Some("[::1]:10809"), "nbd://[::1]:10809/e%3C1%3E");
        let attachment = Attachment::of(&disk, choose(&disk, None).unwrap()).unwrap();
        assert_eq!(attachment.blockdev["server"], json!({ "type": "inet", "host": "::1", "port": "10809" }));
        assert!(attachment.drive().contains("file.server.host=::1,file.server.port=10809"));
    }
}
