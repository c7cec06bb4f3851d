//! A connection after the TLS handshake.

use crate::snapshot::Sha256Digest;

/// A connection after the handshake.
#[derive(Debug)]
pub struct Secured<S> {
    pub stream: S,
    /// The digest of the client's certificate, if clients need one.
    pub certificate: Option<Sha256Digest>,
}
