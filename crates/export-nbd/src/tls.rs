//! TLS with X.509 certificates, from a directory in QEMU's layout, and the record layer over our sockets.

use disk::Buf;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use std::fmt;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of ciphertext in one buffer to be sent.
const SEND_PIECE: usize = 128 << 10;

/// Encryption of a server's connections.
#[derive(Clone, Debug, Default)]
pub enum Tls {
    /// Clients that ask for it are refused.
    #[default]
    Off,
    /// At the client's choice. Anybody on the way can talk client and server out of it: protects nothing
    /// unless the clients insist.
    Optional(TlsIdentity),
    /// Nothing happens before it.
    Required(TlsIdentity),
}

/// Certificates and key of a server.
#[derive(Clone)]
pub struct TlsIdentity(Arc<ServerConfig>);

/// Why a directory of certificates is no use.
#[derive(Debug)]
pub struct TlsError {
    path: PathBuf,
    reason: String,
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason)
    }
}

impl std::error::Error for TlsError {}

impl TlsIdentity {
    /// Reads `server-cert.pem`, `server-key.pem` and, if `verify_clients`, `ca-cert.pem` and `ca-crl.pem`
    /// (the latter need not exist) from `directory`: QEMU's `tls-creds-x509` layout.
    ///
    /// With `verify_clients` only clients that show a certificate of that authority are let in.
    ///
    /// # Errors
    /// When a file is missing or does not hold what its name says.
    pub fn from_directory(directory: &Path, verify_clients: bool) -> Result<Self, TlsError> {
        let chain = certificates(&directory.join("server-cert.pem"))?;
        let key_path = directory.join("server-key.pem");
        let key = PrivateKeyDer::from_pem_file(&key_path)
            .map_err(|error| failure(&key_path, format!("expected a private key in PEM form: {error}")))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| failure(directory, error.to_string()))?;
        let builder = if verify_clients {
            let ca_path = directory.join("ca-cert.pem");
            let mut roots = RootCertStore::empty();
            for certificate in certificates(&ca_path)? {
                roots.add(certificate).map_err(|error| failure(&ca_path, error.to_string()))?;
            }
            let crl_path = directory.join("ca-crl.pem");
            let mut verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            if crl_path.exists() {
                let bad = |error: rustls::pki_types::pem::Error| failure(&crl_path, error.to_string());
                let crls = rustls::pki_types::CertificateRevocationListDer::pem_file_iter(&crl_path)
                    .map_err(bad)?
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(bad)?;
                verifier = verifier.with_crls(crls);
            }
            let verifier = verifier.build().map_err(|error| failure(&ca_path, error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let config = builder
            .with_single_cert(chain, key)
            .map_err(|error| failure(&key_path, format!("key and certificate do not fit: {error}")))?;
        Ok(Self(Arc::new(config)))
    }
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsIdentity") // The key is nobody's business.
    }
}

fn failure(path: &Path, reason: impl Into<String>) -> TlsError {
    TlsError { path: path.to_owned(), reason: reason.into() }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bad =
        |error: rustls::pki_types::pem::Error| failure(path, format!("expected certificates in PEM form: {error}"));
    let all = CertificateDer::pem_file_iter(path).map_err(bad)?.collect::<Result<Vec<_>, _>>().map_err(bad)?;
    if all.is_empty() {
        return Err(failure(path, "expected certificates in PEM form, found none"));
    }
    Ok(all)
}

/// The record layer of one connection: bytes in, bytes out, no I/O.
pub(crate) struct Records(ServerConnection);

impl Records {
    pub(crate) fn new(identity: &TlsIdentity) -> Result<Self, rustls::Error> {
        let mut connection = ServerConnection::new(Arc::clone(&identity.0))?;
        connection.set_buffer_limit(None); // What is written is bounded by the caller.
        Ok(Self(connection))
    }

    pub(crate) fn is_handshaking(&self) -> bool {
        self.0.is_handshaking()
    }

    /// Whether records wait to be sent.
    pub(crate) fn wants_write(&self) -> bool {
        self.0.wants_write()
    }

    /// Takes ciphertext, which is not empty; returns how many bytes of it. Plaintext must be read out before
    /// more is taken.
    pub(crate) fn receive(&mut self, mut ciphertext: &[u8]) -> io::Result<usize> {
        let taken = self.0.read_tls(&mut ciphertext)?;
        self.0.process_new_packets().map_err(io::Error::other)?;
        if taken == 0 {
            return Err(io::Error::other("the TLS peer sends data after its end"));
        }
        Ok(taken)
    }

    /// Gives out plaintext: 0 when the peer ended the stream properly, `WouldBlock` when more ciphertext is
    /// needed first.
    pub(crate) fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.reader().read(buf)
    }

    /// Encrypts plaintext; it comes out of [`Records::take_records`].
    pub(crate) fn write(&mut self, plaintext: &[u8]) -> io::Result<()> {
        self.0.writer().write_all(plaintext)
    }

    /// Ends the stream properly.
    pub(crate) fn close(&mut self) {
        self.0.send_close_notify();
    }

    /// What is to be sent.
    pub(crate) fn take_records(&mut self) -> io::Result<Vec<Buf>> {
        let mut gather = Gather::default();
        while self.0.wants_write() {
            self.0.write_tls(&mut gather)?;
        }
        Ok(gather.finish())
    }
}

/// Gathers bytes in buffers.
#[derive(Default)]
struct Gather {
    full: Vec<Buf>,
    last: Option<(Buf, usize)>,
}

impl Gather {
    fn finish(mut self) -> Vec<Buf> {
        if let Some((mut buf, len)) = self.last.take() {
            buf.truncate(len);
            self.full.push(buf);
        }
        self.full
    }
}

impl Write for Gather {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (buf, len) = self.last.get_or_insert_with(|| (Buf::new(SEND_PIECE), 0));
        let n = bytes.len().min(buf.len() - *len);
        buf[*len..*len + n].copy_from_slice(&bytes[..n]);
        *len += n;
        if *len == buf.len() {
            self.full.extend(self.last.take().map(|(buf, _)| buf));
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
