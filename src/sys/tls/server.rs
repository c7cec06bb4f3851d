//! TLS 1.3 by rustls.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::RootCertStore;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ServerConfig, WebPkiClientVerifier};
use rustls::version::TLS13;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::files::{TlsError, TlsFiles};
use super::secured::Secured;
use crate::snapshot::{Sha256Digest, open_regular, read_limited};
use crate::sys::own_file::check_private;

/// The largest PEM file.
const MAX_BYTES: u64 = 1 << 20;
/// The application protocol that clients may ask for.
const HTTP_1_1: &[u8] = b"http/1.1";

/// A TLS server. Connections that are open keep the certificate that they began with.
#[derive(Debug)]
pub struct Tls {
    files: TlsFiles,
    config: Mutex<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// A file that cannot be read or is not of its kind; a key that other users may read, or that is another
    /// certificate's.
    pub fn open(files: TlsFiles) -> Result<Tls, TlsError> {
        let config = Mutex::new(Arc::new(config(&files)?));
        Ok(Tls { files, config })
    }

    /// Reads the files again, for new connections. After an error the former certificates stay in use. Blocks for the
    /// disk.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn reload(&self) -> Result<(), TlsError> {
        let config = Arc::new(config(&self.files)?);
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// Makes the handshake of a new connection.
    ///
    /// # Errors
    /// Those of the stream; the client speaks no TLS 1.3, or has no certificate that it needs.
    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> io::Result<Secured<TlsStream<S>>> {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let stream = TlsAcceptor::from(config).accept(stream).await?;
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let certificate = certificates.first().map(|certificate| Sha256Digest(Sha256::digest(certificate).into()));
        Ok(Secured { stream, certificate })
    }
}

fn config(files: &TlsFiles) -> Result<ServerConfig, TlsError> {
    let chain = certificates(&files.cert)?;
    let key = private_key(&files.key)?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&TLS13]);
    let builder = builder.map_err(|error| unusable(&files.cert, error))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for root in certificates(path)? {
                roots.add(root).map_err(|error| unusable(path, error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| unusable(path, error))?)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| unusable(&files.cert, error))?;
    config.alpn_protocols = vec![HTTP_1_1.to_vec()];
    Ok(config)
}

fn unusable(path: &Path, problem: impl ToString) -> TlsError {
    TlsError::Unusable { path: path.to_owned(), problem: problem.to_string() }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read_limited(path, MAX_BYTES)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if found.is_empty() => Err(unusable(path, "it has no certificate. Give a file in PEM form")),
        Ok(found) => Ok(found),
        Err(error) => Err(unusable(path, error)),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let (file, _) = open_regular(path)?;
    let metadata = file.metadata().map_err(|error| unusable(path, error))?;
    check_private(&metadata).map_err(|problem| unusable(path, problem))?;
    let text = read_limited(path, MAX_BYTES)?;
    PrivateKeyDer::from_pem_slice(&text)
        .map_err(|error| unusable(path, format!("{error}. Give the private key in PEM form, without a passphrase")))
}
