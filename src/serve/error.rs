//! Why the service cannot start.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Why the service cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The state directory cannot be used.
    #[error("Cannot use {}", path.display())]
    Directory {
        /// The part of it that cannot.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another daemon has it.
    #[error("{} is served by another tvmm: stop that one, or choose another --dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The directory has things in it, and is none of `tvmm serve`'s.
    #[error(
        "Cannot use {}: it is not empty and not a directory of tvmm serve. Choose a new or an empty directory by --dir",
        path.display()
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
    },
    /// A file where none should be.
    #[error("{} is not a file of tvmm's: move it away", path.display())]
    Stranger {
        /// The file.
        path: PathBuf,
    },
    /// A state file is damaged.
    #[error("{} is not what tvmm has written: repair it or move it away", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A state file cannot be read.
    #[error(transparent)]
    File(#[from] crate::snapshot::Error),
    /// A pool that restores are to take memory from cannot be looked into.
    #[error("Cannot restore from {pool}: {said}")]
    Pool {
        /// As it was named.
        pool: String,
        /// Why.
        said: String,
    },
    /// The TCP address cannot be listened on.
    #[error("Cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
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
        /// What the kernel said.
        source: io::Error,
    },
    /// The collector's address is of no use, or this build has no OpenTelemetry.
    #[error(transparent)]
    Collector(#[from] crate::sys::otlp::Unusable),
    /// Something else the kernel refused.
    #[error("Cannot {doing}")]
    Os {
        /// What.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl ServeError {
    pub(super) fn os(doing: &'static str) -> impl FnOnce(io::Error) -> ServeError {
        move |source| ServeError::Os { doing, source }
    }
}
