//! The namespaces of a program that is started in a jail (unshare(2), pivot_root(2)).

use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

/// Makes children of this process live in a process namespace of their own; the first is its process 1.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN.
pub fn for_children() -> io::Result<()> {
    // SAFETY: CLONE_FILES is not among the flags, so no other thread's descriptors are concerned.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?)
}

/// Makes `root` the root of this process, in a mount namespace of its own. On its directory `proc`, a procfs is mounted
/// that shows processes alone, and of them those that its reader may trace (`subset=pid` and `hidepid=ptraceable` of
/// kernel `Documentation/filesystems/proc.rst`). Nothing else of the host is reachable by name then.
///
/// # Errors
/// The error of the call that failed.
pub fn enter_root(root: &Path) -> io::Result<()> {
    // SAFETY: as above.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    // The new root must be a mount.
    rustix::mount::mount_bind_recursive(root, root)?;
    rustix::process::chdir(root)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("proc", "proc", "proc", flags, c"subset=pid,hidepid=ptraceable")?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}
