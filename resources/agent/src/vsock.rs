//! Listens on a vsock port (vsock(7)).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const BACKLOG: i32 = 64;

/// A listening socket.
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens on `port` for any process that reaches this machine.
    pub fn bind(port: u32) -> io::Result<Self> {
        let said = |error: io::Error, what: &str| {
            let hint = match error.raw_os_error() {
                Some(libc::EAFNOSUPPORT | libc::ENODEV) => {
                    " (is there a vsock device, and is vmw_vsock_virtio_transport loaded?)"
                }
                _ => "",
            };
            io::Error::new(error.kind(), format!("cannot {what} vsock port {port}: {error}{hint}"))
        };
        // SAFETY: no pointers.
        let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })
            .map_err(|error| said(error, "make a socket for"))?;
        // SAFETY: just made, without any other owner.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all-zero is a valid sockaddr_vm.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_port = port;
        address.svm_cid = libc::VMADDR_CID_ANY;
        let len = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        // SAFETY: the address is valid for `len` bytes.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })
            .map_err(|error| said(error, "bind to"))?;
        // SAFETY: no pointers.
        check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) }).map_err(|error| said(error, "listen on"))?;
        Ok(Listener(socket))
    }

    pub fn accept(&self) -> io::Result<File> {
        let null = std::ptr::null_mut();
        // SAFETY: the address is not asked for.
        let fd = check(unsafe { libc::accept4(self.0.as_raw_fd(), null, null.cast(), libc::SOCK_CLOEXEC) })?;
        // SAFETY: just made, without any other owner.
        Ok(unsafe { File::from_raw_fd(fd) })
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
