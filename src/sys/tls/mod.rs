//! TLS on server connections: certificates and keys from files, and the certificates of clients.
//!
//! Builds without the feature `tls` know the nouns and refuse the files.

mod files;
#[cfg(not(feature = "tls"))]
mod no_server;
mod secured;
#[cfg(feature = "tls")]
mod server;

pub use files::{TlsError, TlsFiles};
#[cfg(not(feature = "tls"))]
pub use no_server::Tls;
#[cfg(feature = "tls")]
pub use server::Tls;
