//! Files that a process opens before it loses the way to them: a jail has no device nodes, and a process that cannot be
//! dumped does not own its files in `/proc`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::OnceLock;

/// KVM's device (kernel `Documentation/virt/kvm/api.rst`).
pub const KVM: &str = "/dev/kvm";
/// The device that makes userfaultfds (kernel `Documentation/admin-guide/mm/userfaultfd.rst`).
pub const USERFAULTFD: &str = "/dev/userfaultfd";
/// The page map of this process, readable by its owner only.
pub const PAGEMAP: &str = "/proc/self/pagemap";
/// The system call of the main thread (proc(5), `/proc/pid/syscall`), readable by its owner only.
pub const MAIN_SYSCALL: &str = "/proc/self/syscall";

static HELD: OnceLock<Vec<(&'static str, File)>> = OnceLock::new();

/// A file that cannot be opened to be held.
#[derive(Debug, thiserror::Error)]
#[error("Cannot open {path} for the jail")]
pub struct Unheld {
    /// Its path.
    pub path: &'static str,
    /// The kernel's error.
    pub source: io::Error,
}

/// Opens all of the above, and holds them until the process ends. Files that the host does not have are left out. To be
/// called once.
///
/// # Errors
/// A file that is there and cannot be opened.
pub fn hold_all() -> Result<(), Unheld> {
    let mut held = Vec::new();
    for (path, writes) in [(KVM, true), (USERFAULTFD, true), (PAGEMAP, false), (MAIN_SYSCALL, false)] {
        // KVM's ioctls want a descriptor that may write, as those of userfaultfd do.
        match OpenOptions::new().read(true).write(writes).custom_flags(libc::O_CLOEXEC).open(path) {
            Ok(file) => held.push((path, file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Unheld { path, source }),
        }
    }
    // A second call would hold the same files.
    let _ = HELD.set(held);
    Ok(())
}

/// The held file of this name; `None` if nothing is held, or the host has no such file.
pub fn get(path: &str) -> Option<&'static File> {
    HELD.get()?.iter().find(|(name, _)| *name == path).map(|(_, file)| file)
}

/// Opens a file to read, or duplicates it if it is held. Both share an offset then: read at offsets only.
///
/// # Errors
/// Those of open(2) and dup(2).
pub fn open(path: &str) -> io::Result<File> {
    match get(path) {
        Some(file) => file.try_clone(),
        None => File::open(path),
    }
}
