//! The TLS server of a build without TLS: there is none.

use std::io;

use super::files::{TlsError, TlsFiles};
use super::secured::Secured;

/// A build without TLS has no server.
#[derive(Debug)]
pub enum Tls {}

impl Tls {
    /// Always fails in this build.
    ///
    /// # Errors
    /// [`TlsError::NotBuilt`].
    pub fn open(files: TlsFiles) -> Result<Tls, TlsError> {
        Err(TlsError::NotBuilt { path: files.cert })
    }

    /// There is nothing to read again.
    ///
    /// # Errors
    /// None.
    pub fn reload(&self) -> Result<(), TlsError> {
        match *self {}
    }

    /// There are no connections.
    ///
    /// # Errors
    /// None.
    pub async fn accept<S>(&self, _: S) -> io::Result<Secured<S>> {
        match *self {}
    }
}
