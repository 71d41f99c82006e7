//! TLS: with real clients, and against an attacker in the middle.

use crate::clients::{run, try_run};
use crate::raw_client::*;
use crate::served::{Served, Setup};
use export_nbd::{Tls, TlsIdentity};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

/// Directories in QEMU's layout, for the server, for a client of the same authority, and for a stranger.
struct Certificates {
    server: TempDir,
    client: TempDir,
    stranger: TempDir,
}

fn authority() -> (String, Issuer<'static, KeyPair>) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let pem = params.self_signed(&key).unwrap().pem();
    (pem, Issuer::new(params, key))
}

fn put(directory: &Path, name: &str, ca: &Issuer<'static, KeyPair>, usage: ExtendedKeyUsagePurpose) {
    let mut params = CertificateParams::new(vec!["localhost".into()]).unwrap();
    params.extended_key_usages = vec![usage];
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, ca).unwrap();
    std::fs::write(directory.join(format!("{name}-cert.pem")), certificate.pem()).unwrap();
    std::fs::write(directory.join(format!("{name}-key.pem")), key.serialize_pem()).unwrap();
}

impl Certificates {
    fn new() -> Self {
        let directory = || tempfile::tempdir().unwrap();
        let this = Self { server: directory(), client: directory(), stranger: directory() };
        let (ca, issuer) = authority();
        let (_, other) = authority();
        for place in [&this.server, &this.client, &this.stranger] {
            std::fs::write(place.path().join("ca-cert.pem"), &ca).unwrap();
        }
        put(this.server.path(), "server", &issuer, ExtendedKeyUsagePurpose::ServerAuth);
        put(this.client.path(), "client", &issuer, ExtendedKeyUsagePurpose::ClientAuth);
        put(this.stranger.path(), "client", &other, ExtendedKeyUsagePurpose::ClientAuth);
        this
    }

    fn identity(&self, verify_clients: bool) -> TlsIdentity {
        TlsIdentity::from_directory(self.server.path(), verify_clients).unwrap()
    }
}

fn serve(tls: Tls) -> Served {
    Served::new(Setup { tls, ..Setup::default() })
}

fn uri(served: &Served, certificates: &TempDir) -> String {
    let (socket, directory) = (served.socket(), certificates.path());
    format!(
        "nbds+unix:///disk?socket={}&tls-certificates={}&tls-hostname=localhost",
        socket.display(),
        directory.display()
    )
}

#[test]
fn required_tls_with_libnbd_and_qemu() {
    let certificates = Certificates::new();
    let served = serve(Tls::Required(certificates.identity(false)));
    let uri = uri(&served, &certificates.client);
    let info = run("nbdinfo", &[&uri]);
    assert!(info.contains("with TLS"), "{info}");
    assert!(!try_run("nbdinfo", &[&served.uri()]).status.success(), "not without TLS");
    let (from, to) = (served.file("from"), served.file("to"));
    let bytes: Vec<u8> = (0..64u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    std::fs::write(&from, &bytes).unwrap();
    run("nbdcopy", &[&from, &uri]);
    run("nbdcopy", &[&uri, &to]);
    assert!(std::fs::read(to).unwrap() == bytes);
    let credentials = format!("tls-creds-x509,id=t,endpoint=client,dir={}", certificates.client.path().display());
    let image = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},file.export=disk,file.tls-creds=t,\
         file.tls-hostname=localhost",
        served.socket().display()
    );
    let compare =
        ["compare", "--object", &credentials, "--image-opts", &image, &format!("driver=raw,file.filename={from}")];
    run("qemu-img", &compare);
    assert_eq!(served.stats.connections(), 0);
}

#[test]
fn client_certificates() {
    let certificates = Certificates::new();
    let served = serve(Tls::Required(certificates.identity(true)));
    run("nbdinfo", &[&uri(&served, &certificates.client)]);
    assert!(!try_run("nbdinfo", &[&uri(&served, &certificates.stranger)]).status.success());
    assert!(!try_run("nbdinfo", &[&uri(&served, &certificates.server)]).status.success(), "no client certificate");
    assert_eq!(served.stats.connections_total(), 1);
}

#[test]
fn optional_tls() {
    let certificates = Certificates::new();
    let served = serve(Tls::Optional(certificates.identity(false)));
    assert!(run("nbdinfo", &[&served.uri()]).contains("without TLS"));
    assert!(run("nbdinfo", &[&uri(&served, &certificates.client)]).contains("with TLS"));
}

/// The rest of a client's connection after `NBD_REP_ACK` to `NBD_OPT_STARTTLS`.
fn encrypt(
    client: RawClient,
    certificates: &Certificates,
) -> RawClient<StreamOwned<ClientConnection, std::os::unix::net::UnixStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(certificates.server.path().join("ca-cert.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connection = ClientConnection::new(Arc::new(config), ServerName::try_from("localhost").unwrap()).unwrap();
    RawClient { stream: StreamOwned::new(connection, client.stream), style: Style::Simple }
}

#[test]
fn what_is_injected_before_tls_is_forgotten() {
    let certificates = Certificates::new();
    let served = serve(Tls::Optional(certificates.identity(false)));
    let mut client = RawClient::greeted(&served.socket());
    // An attacker's options, before STARTTLS and glued behind it.
    assert_eq!(client.option(OPT_EXTENDED, &[])[0].0, REP_ACK);
    let mut glued = option_bytes(OPT_STARTTLS, &[]);
    glued.extend(option_bytes(OPT_STRUCTURED, &[]));
    glued.extend(option_bytes(OPT_GO, &go_data("disk")));
    client.stream.write_all(&glued).unwrap();
    assert_eq!(client.option_replies(OPT_STARTTLS)[0].0, REP_ACK);
    let mut client = encrypt(client, &certificates);
    assert_eq!(client.option(OPT_GO, &go_data("disk")).last().unwrap().0, REP_ACK);
    assert_eq!(client.send(WRITE, 0, 0, &[6; 100_000]).error(), 0);
    let reply = client.request(READ, 0, 0, 100_000);
    assert_eq!(reply.parts, [Part::Data { offset: u64::MAX, bytes: vec![6; 100_000] }], "simple replies");
    assert!(served.server.connections()[0].encrypted);
}

#[test]
fn garbage_instead_of_tls() {
    let certificates = Certificates::new();
    let served = serve(Tls::Required(certificates.identity(false)));
    let mut client = RawClient::greeted(&served.socket());
    assert_eq!(client.option(OPT_STARTTLS, &[])[0].0, REP_ACK);
    client.stream.write_all(&[0x41; 3000]).unwrap();
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut client.stream, &mut rest); // An alert, then the end.
    served.wait_until(|served| served.server.connections().is_empty());
    run("nbdinfo", &[&uri(&served, &certificates.client)]);
}

#[test]
fn incomplete_directories_are_named() {
    let certificates = Certificates::new();
    let directory = certificates.server.path();
    std::fs::remove_file(directory.join("ca-cert.pem")).unwrap();
    TlsIdentity::from_directory(directory, false).unwrap();
    let error = TlsIdentity::from_directory(directory, true).unwrap_err().to_string();
    assert!(error.contains("ca-cert.pem"), "{error}");
    std::fs::write(directory.join("server-key.pem"), "no key").unwrap();
    let error = TlsIdentity::from_directory(directory, false).unwrap_err().to_string();
    assert!(error.contains("server-key.pem"), "{error}");
}
