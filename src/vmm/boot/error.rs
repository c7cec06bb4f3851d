//! Errors of loading a kernel, initrd, command line and tables.

use std::io;
use std::path::PathBuf;

/// A guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("Cannot access guest memory at {gpa:#x} to write the {what}")]
    GuestAccess { what: &'static str, gpa: u64, source: vm_memory::GuestMemoryError },
    #[error("Cannot open the kernel image {path}")]
    KernelOpen { path: PathBuf, source: io::Error },
    #[error("Cannot load the kernel image {name}: {what}")]
    KernelLoad { name: String, what: String },
    #[error("The kernel {name} does not fit into guest memory: it ends at {end:#x}, memory already at {ram_end:#x}")]
    KernelTooLarge { name: String, end: u64, ram_end: u64 },
    #[error(
        "The kernel command line is {len} bytes long, at most {max} fit",
        max = crate::vmm::arch::layout::CMDLINE_MAX - 1
    )]
    CmdlineTooLong { len: usize },
    #[error("The kernel command line cannot be used: {0}")]
    Cmdline(String),
    #[error("Cannot use the initrd {path}: {what}")]
    Initrd { path: PathBuf, what: String },
    #[error("The initrd {path} does not fit into guest memory: it has {len} bytes, above the kernel are {room}")]
    InitrdTooLarge { path: PathBuf, len: u64, room: u64 },
    #[error("The kernel command line has a NUL byte or a character outside ASCII")]
    CmdlineCharacters,
    #[error("The kernel image {name} cannot be entered by {protocol}: {what}")]
    BootProtocol { name: String, protocol: &'static str, what: &'static str },
    #[error("Guest memory of {mib} MiB is too small: boot parameters and kernel need at least 2 MiB")]
    TooSmall { mib: u64 },
}
