//! The errors of this room.

use std::io;
use std::path::PathBuf;

/// The error of a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An eventfd could not be made or used.
    #[error("Cannot {doing} for the {device}")]
    Event { doing: &'static str, device: &'static str, source: io::Error },
    /// Two devices want the same addresses.
    #[error("The address range {base:#x}+{len:#x} is taken already")]
    Overlap { base: u64, len: u64 },
    /// A drive's file cannot be opened or examined.
    #[error("Cannot {doing} {} for drive `{id}`", path.display())]
    DriveFile { doing: &'static str, id: String, path: PathBuf, source: io::Error },
    /// A file that cannot be this drive.
    #[error("{} cannot be drive `{id}`: {what}", path.display())]
    Drive { id: String, path: PathBuf, what: String },
    /// The host refuses the asynchronous engine.
    #[error(
        "Drive `{id}` cannot have io_engine Async: io_uring cannot be used here (the sysctl kernel.io_uring_disabled, \
         a seccomp filter, or a limit on locked memory forbids it); use io_engine Sync"
    )]
    IoUring { id: String, source: io::Error },
    /// A tap device that cannot be used; `why` says what to do.
    #[error("Network interface `{id}` cannot use the tap `{tap}`: {why}")]
    Tap { id: String, tap: String, why: String, source: io::Error },
    /// A new MAC address for a guest that cannot learn of it.
    #[error(
        "Network interface `{id}` cannot have another MAC address: it had no guest_mac, so the guest chose its own; \
         give it one before it boots"
    )]
    NoMac { id: String },
    /// A pmem image cannot be opened or examined.
    #[error("Cannot {doing} {} for pmem device `{id}`", path.display())]
    PmemFile { doing: &'static str, id: String, path: PathBuf, source: io::Error },
    /// A file that cannot be this pmem image.
    #[error("{} cannot be pmem device `{id}`: {what}", path.display())]
    Pmem { id: String, path: PathBuf, what: String },
    /// A balloon that the guest cannot fill.
    #[error("A balloon of {amount_mib} MiB is larger than the guest, which has {ram_mib} MiB")]
    BalloonTooLarge { amount_mib: u32, ram_mib: u64 },
    /// Saved state that the device cannot have had.
    #[error("The saved state of the {device} is not valid: {what}")]
    State { device: &'static str, what: &'static str },
    /// The path of the vsock device's socket is taken.
    #[error(
        "Cannot listen on the vsock device's socket {path}: the path is taken. Give another `uds_path` (at restore: \
         `--vsock PATH`, `vsock_override`); if a VM that has ended left the file, delete it"
    )]
    VsockPathTaken { path: PathBuf },
    /// With the port of a guest's connection the path would not fit a socket address.
    #[error("The path of the vsock device's socket is too long, at most {max} bytes leave room for `_<port>`: {path}")]
    VsockPathLong { path: PathBuf, max: usize },
    /// The vsock device's socket could not be made.
    #[error("Cannot {doing} the vsock device's socket {path}")]
    VsockSocket { doing: &'static str, path: PathBuf, source: io::Error },
}
