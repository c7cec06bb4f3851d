//! Errors of guest memory.

use std::io;
use std::path::PathBuf;

use crate::snapshot;
use crate::tiering;

/// The one error of the room `memory`. Each variant names the action and its object; causes are chained.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Cannot reserve {mib} MiB of address space for guest memory")]
    Reserve { mib: u64, source: io::Error },
    #[error("Cannot map {pages} pages of guest memory at {gpa:#x}")]
    Map { gpa: u64, pages: u64, source: io::Error },
    #[error("Guest memory was no longer served while the machine was restored: {0}")]
    Unserved(String),
    #[error("{pages} pages at {gpa:#x} are not guest memory")]
    OutsideRam { gpa: u64, pages: u64 },
    #[error("Cannot build the view of guest memory: {0}")]
    MemoryView(String),
    #[error("The {0} did not stop in time: it waits for memory from a file that hangs")]
    Stuck(&'static str),
    #[error(
        "Cannot use userfaultfd. Run as root, or give this user access to /dev/userfaultfd (it is enough that the \
         file can be opened); on kernels without that file set vm.unprivileged_userfaultfd=1"
    )]
    Userfaultfd(#[source] io::Error),
    #[error("{0}")]
    Lost(String),
    #[error(
        "Cannot trust pool {path}: {bytes} bytes for guest-physical {gpa:#x} do not match their checksums. Restore \
         without the pool, or remove the snapshot from it and add it again (`tvmm pool fsck` tells what is damaged)"
    )]
    PoolMemory { path: PathBuf, gpa: u64, bytes: u64 },
    #[error("Cannot take a snapshot: memory that the guest reads from an image {0}")]
    Uncompared(&'static str),
    #[error("Cannot {doing}")]
    Os { doing: &'static str, source: io::Error },
    #[error("Cannot {doing} {path}")]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    #[error(transparent)]
    Tiering(#[from] tiering::Error),
}

impl Error {
    pub(super) fn os(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Os { doing, source }
    }
}

/// The reason why memory of a guest could not be changed.
#[derive(Debug)]
pub enum ChangeError {
    /// The guest's bytes are as they were.
    Kept(Error),
    /// Bytes of the guest may be lost, so the memory must not be used again.
    Lost(Error),
}
