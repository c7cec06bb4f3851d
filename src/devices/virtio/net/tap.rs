//! A tap device (Linux Documentation/networking/tuntap.rst): frames with a virtio-net header in front, straight between
//! the kernel and guest memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_iow_nr;

use super::frame::HEADER_LEN;
use crate::devices::Error;
use crate::devices::virtio::block::touch_pieces;
use crate::devices::virtio::chain::Slice;
use crate::sys::tun::{self, Failed};

/// Offloads of a tap (linux/if_tun.h): work that the kernel may leave undone in frames that are read from it.
pub const TUN_F_CSUM: u32 = 1;
pub const TUN_F_TSO4: u32 = 2;
pub const TUN_F_TSO6: u32 = 4;
pub const TUN_F_UFO: u32 = 16;

/// The most buffers one system call takes (UIO_MAXIOV).
pub const BUFFERS_MAX: usize = 1024;

const TUN: libc::c_uint = 'T' as libc::c_uint;
ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, libc::c_int);

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    has_ufo: bool,
    offload: u32,
}

impl Tap {
    /// Opens the tap `name` for the network interface `id`. It must exist: a tap made here would be connected to
    /// nothing, and would vanish with this process.
    pub fn open(id: &str, name: &str) -> Result<Self, Error> {
        Tap::check(id, name)?;
        let failed = |why: String, source| Error::Tap { id: id.to_owned(), tap: name.to_owned(), why, source };
        let file = tun::attach(name).map_err(|failure| match failure {
            Failed::Open(error) => failed(why_not_open(&error).into(), error),
            Failed::Attach(error) => failed(why_not_attached(name, &error), error),
        })?;
        // The present offloads are unknown: another process may have set some.
        let mut tap = Tap { file, name: name.to_owned(), has_ufo: true, offload: u32::MAX };
        tap.set_header_len().map_err(|error| failed("its header size cannot be set".into(), error))?;
        // Kernels from 4.14 on may be without UFO.
        let all = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6;
        tap.has_ufo = tap.set_offload(all | TUN_F_UFO).is_ok();
        tap.set_offload(0).map_err(|error| failed("its offloads cannot be set".into(), error))?;
        Ok(tap)
    }

    /// Checks that the tap `name` exists.
    ///
    /// # Errors
    /// It does not, or no interface can have this name.
    pub fn check(id: &str, name: &str) -> Result<(), Error> {
        let failed = |why: String, source| Error::Tap { id: id.to_owned(), tap: name.to_owned(), why, source };
        // IFNAMSIZ with its NUL (netdevice(7)).
        if name.is_empty()
            || name.len() >= libc::IFNAMSIZ
            || !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
        {
            return Err(failed("it is no interface name".into(), io::ErrorKind::InvalidInput.into()));
        }
        tun::check_exists(name).map_err(|error| match error.raw_os_error() {
            Some(libc::ENODEV) if crate::sys::jail::in_force().is_some_and(|jail| jail.has_own_network()) => failed(
                format!("the jail's network has no taps but those that it began with; name it with --jail-tap {name}"),
                error,
            ),
            Some(libc::ENODEV) => failed(
                format!(
                    "it does not exist in this network namespace; make it with `ip tuntap add dev {name} mode tap`"
                ),
                error,
            ),
            _ => failed("network interfaces cannot be looked up".into(), error),
        })
    }

    /// A socket that keeps datagrams apart, in place of a tap.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn over(socket: std::os::fd::OwnedFd) -> Self {
        Tap { file: socket.into(), name: "test".into(), has_ufo: true, offload: 0 }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn has_ufo(&self) -> bool {
        self.has_ufo
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Sets the work that the kernel may leave undone in frames that are read: `TUN_F_…`.
    pub fn set_offload(&mut self, offload: u32) -> io::Result<()> {
        if offload != self.offload {
            // SAFETY: the argument is a number; no memory is involved.
            checked(unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD(), offload.into()) })?;
            self.offload = offload;
        }
        Ok(())
    }

    fn set_header_len(&self) -> io::Result<()> {
        let len = HEADER_LEN as libc::c_int;
        // SAFETY: the kernel reads one int, which lives until the call returns.
        checked(unsafe { ioctl_with_ref(&self.file, TUNSETVNETHDRSZ(), &len) })
    }

    /// Reads one frame with its header into `buffers`, at most [`BUFFERS_MAX`]` - 1` of them, and the rest into `tail`.
    /// Returns its length, at most the length of all buffers. Does not mark pages as written.
    pub fn read<'a, 'm: 'a>(&self, buffers: impl Iterator<Item = &'a Slice<'m>>, tail: &mut [u8]) -> io::Result<usize> {
        let mut vectors = vectors(buffers);
        vectors.push(libc::iovec { iov_base: tail.as_mut_ptr().cast(), iov_len: tail.len() });
        // SAFETY: each entry but the last is a slice of guest memory, which outlives the call (`'m`) and which the
        // guest, too, may write at any time: there are no references into it. The last is `tail`, borrowed for the
        // call.
        let result = unsafe { libc::readv(self.fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
        usize::try_from(result).map_err(|_| error_of(&vectors))
    }

    /// Drops the frames that wait to be read, up to [`DROPPED_MAX`] of them. Of a frame that is longer than the buffer
    /// of a read, a tap drops the rest (Linux `drivers/net/tun.c`, `tun_put_user`).
    pub fn drop_waiting(&self) {
        let mut header = [0; HEADER_LEN];
        for _ in 0..DROPPED_MAX {
            if rustix::io::read(&self.file, &mut header).is_err() {
                return;
            }
        }
    }

    /// Writes one frame with its header. At most [`BUFFERS_MAX`] buffers.
    pub fn write<'a, 'm: 'a>(&self, buffers: impl Iterator<Item = &'a Slice<'m>>) -> io::Result<usize> {
        let vectors = vectors(buffers);
        // SAFETY: each entry is a slice of guest memory, which outlives the call (`'m`); the kernel only reads it.
        let result = unsafe { libc::writev(self.fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
        usize::try_from(result).map_err(|_| error_of(&vectors))
    }
}

/// More frames than a tap queues (`txqueuelen`, 500 by default).
const DROPPED_MAX: usize = 8192;

/// Addresses of guest memory for the kernel. The pointers are good as long as `'m`: guest memory is mapped for longer
/// than any slice of it lives, and the guards of vm-memory do nothing for ordinary mappings.
fn vectors<'a, 'm: 'a>(buffers: impl Iterator<Item = &'a Slice<'m>>) -> Vec<libc::iovec> {
    let vector =
        |slice: &Slice<'m>| libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
    buffers.map(vector).collect()
}

/// The error of a system call that has just failed on `vectors`.
fn error_of(vectors: &[libc::iovec]) -> io::Error {
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EFAULT) {
        // SAFETY: each entry is guest memory or a buffer of the caller's, both still there.
        unsafe { touch_pieces(vectors) };
    }
    error
}

/// True if the error says that the tap behind a descriptor has been deleted.
pub fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn why_not_open(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "there is no /dev/net/tun; load the module with `modprobe tun`, or give the container the device"
        }
        Some(libc::EACCES | libc::EPERM) => "this user may not open /dev/net/tun; allow it to, or run as root",
        _ => "/dev/net/tun cannot be opened",
    }
}

fn why_not_attached(name: &str, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EBUSY) => "another process has it; give every VM a tap of its own".into(),
        Some(libc::EPERM) => format!(
            "it belongs to another user; make it with `ip tuntap add dev {name} mode tap user NAME`, or run with \
             CAP_NET_ADMIN"
        ),
        Some(libc::EINVAL) => {
            format!("it is no tap, or one of several queues; make one with `ip tuntap add dev {name} mode tap`")
        }
        _ => "it cannot be attached to".into(),
    }
}
