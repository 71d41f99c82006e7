//! TLS with X.509: libnbd and QEMU as clients.

use interop::{Server, missing, qemu_img, run, run_for_status};
use std::path::Path;

/// An authority with the certificates of a server (`localhost`, 127.0.0.1) and of a client, named as QEMU names them.
fn certificates(directory: &Path) {
    let make = r#"
set -e
cd "$1"
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj '/CN=test authority' -keyout ca-key.pem -out ca-cert.pem \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
issue() {
    openssl req -newkey rsa:2048 -nodes -subj "/CN=$2" -keyout "$1-key.pem" -out "$1.csr"
    printf 'basicConstraints=CA:FALSE\nsubjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=%s\n' "$3" >"$1.ext"
    openssl x509 -req -days 2 -in "$1.csr" -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -extfile "$1.ext" \
        -out "$1-cert.pem"
}
issue server localhost serverAuth
issue client somebody clientAuth
mkdir stranger
cp ca-cert.pem stranger/
"#;
    run("sh", &["-c", make, "sh", directory.to_str().expect("UTF-8")]);
}

/// The export's address as libnbd reads it, with the directory of a client's certificates.
fn address(uri: &str, directory: &Path) -> String {
    let uri = uri.replace("127.0.0.1", "localhost");
    assert!(uri.starts_with("nbds://"), "the server prints the address {uri}");
    format!("{uri}?tls-certificates={}", directory.display())
}

#[test]
fn tls_clients_connect_and_others_do_not() {
    if missing(&["openssl", "nbdinfo", "nbdcopy", "qemu-img"]).is_some() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    certificates(directory.path());
    let tls = directory.path().to_str().expect("UTF-8");
    let image = directory.path().join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", image.to_str().expect("UTF-8"), "4M"]);
    let stranger = directory.path().join("stranger");

    // Any client that trusts us.
    let server = Server::start_tcp(&image, &["--tls", tls]);
    for client in [directory.path(), &stranger] {
        let info = run("nbdinfo", &["--json", &address(&server.uri, client)]);
        let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
        assert_eq!(info["TLS"], true, "{info}");
    }
    let copy = directory.path().join("copy.raw");
    run("nbdcopy", &[&address(&server.uri, directory.path()), copy.to_str().expect("UTF-8")]);
    let port = server.uri.split(':').nth(2).and_then(|rest| rest.split('/').next()).expect("a port").to_owned();
    let export = server.uri.rsplit('/').next().expect("a name").to_owned();
    let credentials = format!("tls-creds-x509,id=t,dir={tls},endpoint=client");
    let options = format!("driver=nbd,server.type=inet,server.host=localhost,server.port={port},tls-creds=t");
    let options = format!("{options},export={export}");
    run("qemu-img", &["info", "--object", &credentials, "--image-opts", &options]);
    // Without TLS.
    let plain = server.uri.replace("nbds://", "nbd://");
    let (status, said) = run_for_status("nbdinfo", &[&plain]);
    assert_ne!(status, 0, "a plain connection was accepted: {said}");
    server.stop();

    // Only clients with a certificate.
    let server = Server::start_tcp(&image, &["--tls", tls, "--tls-verify"]);
    run("nbdinfo", &[&address(&server.uri, directory.path())]);
    let (status, said) = run_for_status("nbdinfo", &[&address(&server.uri, &stranger)]);
    assert_ne!(status, 0, "a client without a certificate was accepted: {said}");
    server.stop();

    // Both.
    let server = Server::start_tcp(&image, &["--tls", tls, "--tls-optional"]);
    run("nbdinfo", &[&address(&server.uri.replace("nbd://", "nbds://"), directory.path())]);
    run("nbdinfo", &[&server.uri.replace("nbds://", "nbd://")]);
    server.stop();
}
