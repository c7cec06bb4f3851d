//! The files of a TLS server.

use std::path::PathBuf;

/// The PEM files of a TLS server.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Its certificate, and those between it and a root that clients know.
    pub cert: PathBuf,
    /// The private key of the certificate.
    pub key: PathBuf,
    /// The roots of clients' certificates; None: clients need no certificate.
    pub client_ca: Option<PathBuf>,
}

/// The reason why TLS cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] crate::snapshot::Error),
    /// A file cannot be used.
    #[error("Cannot use {} for TLS: {problem}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// The defect and its remedy.
        problem: String,
    },
    /// This build has no TLS.
    #[cfg(not(feature = "tls"))]
    #[error(
        "Cannot use {} for TLS: this build of tvmm has none. Build it with `cargo build --release --features tls`",
        path.display()
    )]
    NotBuilt {
        /// The certificate.
        path: PathBuf,
    },
}
