//! Reasons why the service cannot start.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// The reason why the service cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The state directory cannot be used.
    #[error("Cannot use {}", path.display())]
    Directory {
        /// The part of it that cannot.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
    /// Another daemon uses the directory.
    #[error("Cannot use {}: it is served by another tvmm. Stop that one, or choose another --dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The directory is not empty, and is none of `tvmm serve`'s.
    #[error(
        "Cannot use {}: it is not empty and not a directory of tvmm serve. Choose a new or an empty directory by --dir",
        path.display()
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
    },
    /// A file in a place for none.
    #[error("Cannot use {}: it is not a file of tvmm's. Move it away", path.display())]
    Stranger {
        /// The file.
        path: PathBuf,
    },
    /// A state file is damaged.
    #[error("Cannot read {}: it is not what tvmm has written. Repair it or move it away", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The defect.
        source: serde_json::Error,
    },
    /// A state file cannot be read.
    #[error(transparent)]
    File(#[from] crate::snapshot::Error),
    /// The token file cannot be used.
    #[error(transparent)]
    Tokens(#[from] super::access::token_file::TokenFileError),
    /// TLS cannot be served.
    #[error(transparent)]
    Tls(#[from] crate::sys::tls::TlsError),
    /// A pool that restores take memory from by default cannot be opened.
    #[error("Cannot restore from {pool}: {said}")]
    Pool {
        /// Its name in the arguments.
        pool: String,
        /// The reason.
        said: String,
    },
    /// The TCP address cannot be listened on.
    #[error("Cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The Unix socket cannot be listened on.
    #[error(transparent)]
    Socket(#[from] crate::sys::unix_socket::SocketError),
    /// The trace file cannot be written.
    #[error("Cannot write the trace file {}", path.display())]
    TraceFile {
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The collector's address is unusable, or this build has no OpenTelemetry.
    #[error(transparent)]
    Collector(#[from] crate::sys::otlp::Unusable),
    /// The kernel refused something else.
    #[error("Cannot {doing}")]
    Os {
        /// The refused action.
        doing: &'static str,
        /// The error of the kernel.
        source: io::Error,
    },
}

impl ServeError {
    pub(super) fn os(doing: &'static str) -> impl FnOnce(io::Error) -> ServeError {
        move |source| ServeError::Os { doing, source }
    }
}
