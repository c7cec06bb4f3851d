//! Namespaces and the empty root: a small tmpfs with the paths that stay, at their own names (pivot_root(2),
//! mount_namespaces(7), user_namespaces(7)).
//!
//! The process ends up in a directory of that tmpfs, by chroot(2): a process whose root is not the root of its mount
//! namespace can make no user namespace (user_namespaces(7), EPERM). So it has no way to capabilities by which it could
//! leave the directory, or mount anything.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use rustix::thread::{CapabilitySet, UnshareFlags};

use super::error::Error;
use super::types::{JailPath, Network, Use};

/// The directory of the tmpfs that becomes the root.
const ROOT: &str = "root";
/// Directories of which any host has one: the tmpfs is mounted there for a moment, in the new namespace only.
const MOUNT_POINTS: [&str; 4] = ["/tmp", "/run", "/dev", "/proc"];

/// A mount that is in no namespace yet.
struct Tree {
    fd: OwnedFd,
    path: PathBuf,
    is_dir: bool,
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

fn failed<E: Into<io::Error>>(doing: &'static str, path: &Path) -> impl FnOnce(E) -> Error {
    let path = path.to_owned();
    move |source| Error::Root { doing, path, source: source.into() }
}

/// Makes the namespaces. Returns their names.
///
/// # Errors
/// [`Error::Namespaces`]; also if this process has a second thread.
pub fn make_namespaces(network: &Network) -> Result<Vec<&'static str>, Error> {
    let mut flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    let mut names = vec!["mount", "ipc", "uts"];
    // CLONE_THREAD: refused by the kernel if there is a second thread, which would stay outside (unshare(2)).
    flags |= UnshareFlags::from_bits_retain(libc::CLONE_THREAD as u32);
    let has_power = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT));
    let uid = rustix::process::geteuid();
    let gid = rustix::process::getegid();
    if !has_power {
        flags |= UnshareFlags::NEWUSER;
        names.push("user");
    }
    if matches!(network, Network::Own) {
        flags |= UnshareFlags::NEWNET;
        names.push("net");
    }
    // SAFETY: CLONE_FILES is not among the flags, so no other thread's descriptors are concerned.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(|error| Error::Namespaces { source: error.into() })?;
    if !has_power {
        let write = |path: &str, text: String| fs::write(path, text).map_err(failed("map the user", Path::new(path)));
        write("/proc/self/setgroups", "deny".to_owned())?;
        write("/proc/self/uid_map", format!("{0} {0} 1", uid.as_raw()))?;
        write("/proc/self/gid_map", format!("{0} {0} 1", gid.as_raw()))?;
    }
    if let Network::Named(netns) = network {
        netns.enter_now()?;
        names.push("net");
    }
    Ok(names)
}

/// Leaves the host's files: the root is empty but for `paths`, and a `/proc/self` of this process alone.
///
/// # Errors
/// [`Error::Root`] with the step that failed.
pub fn leave_host(paths: &[JailPath]) -> Result<(), Error> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(failed("keep mounts to itself", Path::new("/")))?;
    let mut trees = Vec::with_capacity(paths.len());
    for entry in paths {
        trees.push(open_tree(entry)?);
    }
    let cwd = std::env::current_dir().ok();
    let root = mount_root()?;
    let inner = Path::new(ROOT);
    make_dir(root.as_fd(), inner)?;
    for tree in trees {
        attach(root.as_fd(), inner, &tree)?;
    }
    if let Some(cwd) = &cwd {
        make_dirs(root.as_fd(), &inner.join(cwd.strip_prefix("/").unwrap_or(cwd)))?;
    }
    set_attributes(root.as_fd(), libc::MOUNT_ATTR_RDONLY, 0).map_err(failed("make read-only", inner))?;
    let doing = "enter the root";
    rustix::process::fchdir(&root).map_err(failed(doing, inner))?;
    // The old root lies over the new one then, and goes (pivot_root(2), "pivot_root(".", ".")").
    rustix::process::pivot_root(".", ".").map_err(failed(doing, inner))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed("leave the old root", Path::new("/")))?;
    rustix::process::chdir(inner).map_err(failed(doing, inner))?;
    rustix::process::chroot(".").map_err(failed(doing, inner))?;
    let cwd = cwd.unwrap_or_else(|| PathBuf::from("/"));
    rustix::process::chdir(&cwd).map_err(failed(doing, &cwd))
}

/// Makes the mount of a path that stays.
fn open_tree(entry: &JailPath) -> Result<Tree, Error> {
    let path = &entry.path;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let fd = rustix::mount::open_tree(CWD, path, flags).map_err(failed("take along", path))?;
    let kind = fs::metadata(path).map_err(failed("look at", path))?.file_type();
    let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    if !kind.is_block_device() && !kind.is_char_device() {
        attributes |= libc::MOUNT_ATTR_NODEV;
    }
    // A socket is made in its directory.
    if entry.allowed == Use::Read {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    set_attributes(fd.as_fd(), attributes, libc::AT_RECURSIVE as u32).map_err(failed("restrict", path))?;
    Ok(Tree { fd, path: path.clone(), is_dir: kind.is_dir() })
}

/// Mounts the tmpfs that becomes the root.
fn mount_root() -> Result<OwnedFd, Error> {
    let doing = "mount a tmpfs";
    let found = MOUNT_POINTS.iter().map(Path::new).find(|path| path.is_dir());
    let at =
        found.ok_or_else(|| failed(doing, Path::new(MOUNT_POINTS[0]))(io::Error::from(io::ErrorKind::NotFound)))?;
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed(doing, at))?;
    for (key, value) in [("mode", "0755"), ("size", "64k")] {
        rustix::mount::fsconfig_set_string(context.as_fd(), key, value).map_err(failed(doing, at))?;
    }
    rustix::mount::fsconfig_create(context.as_fd()).map_err(failed(doing, at))?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes);
    let root = root.map_err(failed(doing, at))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(root.as_fd(), "", CWD, at, flags).map_err(failed(doing, at))?;
    Ok(root)
}

/// Attaches a mount at its own name below `inner`.
fn attach(root: BorrowedFd<'_>, inner: &Path, tree: &Tree) -> Result<(), Error> {
    let at = inner.join(tree.path.strip_prefix("/").unwrap_or(&tree.path));
    // The name may lie in a mount that was attached before, where it is there already.
    if rustix::fs::statat(root, &at, rustix::fs::AtFlags::empty()).is_err() {
        if tree.is_dir {
            make_dirs(root, &at)?;
        } else {
            at.parent().map_or(Ok(()), |parent| make_dirs(root, parent))?;
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(root, &at, flags, Mode::empty()).map_err(failed("make a place for", &tree.path))?;
        }
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(tree.fd.as_fd(), "", root, &at, flags).map_err(failed("attach", &tree.path))
}

fn make_dirs(root: BorrowedFd<'_>, path: &Path) -> Result<(), Error> {
    let mut made = PathBuf::new();
    for component in path.components() {
        made.push(component);
        make_dir(root, &made)?;
    }
    Ok(())
}

fn make_dir(root: BorrowedFd<'_>, path: &Path) -> Result<(), Error> {
    match rustix::fs::mkdirat(root, path, Mode::from_raw_mode(0o755)) {
        // The name may lie in a mount that was attached before.
        Err(rustix::io::Errno::EXIST | rustix::io::Errno::ROFS) => Ok(()),
        made => made.map_err(failed("make directory", path)),
    }
}

/// Sets attributes of a mount (mount_setattr(2)).
fn set_attributes(mount: BorrowedFd<'_>, attributes: u64, flags: u32) -> io::Result<()> {
    let attr = MountAttr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let empty = CString::default();
    let flags = libc::AT_EMPTY_PATH as u32 | flags;
    // SAFETY: the struct has the kernel's layout and, as the empty path, lives through the call, which only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            empty.as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The directory of this process in `/proc`: the only one that it sees there. `None`: there is no `/proc`.
pub fn own_proc() -> Option<JailPath> {
    let path = Path::new("/proc/self");
    path.exists().then(|| JailPath::new(path, Use::Read))
}
