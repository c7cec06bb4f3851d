//! Descriptors that a parent process has left open for this one.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// The connected Unix socket with this number.
///
/// Call once, early: the number must be one that this process has not opened itself. 0 to 2 are refused.
pub fn stream(fd: RawFd) -> io::Result<UnixStream> {
    let refused = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("descriptor {fd} {what}"));
    if fd <= 2 {
        return Err(refused("is standard input, output or error, or none"));
    }
    // SAFETY: only asked about here; a number that is not open makes the calls below fail with EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = fcntl_getfd(borrowed).map_err(|_| refused("is not open"))?;
    // A descriptor that this process opened is close-on-exec; an inherited one cannot be.
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(refused("was not inherited"));
    }
    fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    if rustix::net::getpeername(borrowed).is_err() {
        return Err(refused("is not a connected socket"));
    }
    // SAFETY: it is open, it was inherited, and the flag above keeps a second call from taking it again.
    Ok(UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Keeps all open descriptors but standard input, output and error from programs that this process starts. Libraries
/// make some, such as eventfds, that a program would inherit.
pub fn keep_all() -> io::Result<()> {
    // SAFETY: close_range(2) with this flag changes a flag of descriptors, and touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Closes all descriptors but standard input, output and error, and `kept`. To be called before this process opens any.
pub fn close_others(kept: Option<RawFd>) -> io::Result<()> {
    let close = |first: u32, last: u32| {
        // SAFETY: descriptors that nothing in this process has opened yet are closed, so no owner is left with one.
        let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0_u32) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    match kept.and_then(|fd| u32::try_from(fd).ok()).filter(|fd| *fd > 2) {
        Some(kept) => {
            if kept > 3 {
                close(3, kept - 1)?;
            }
            close(kept + 1, u32::MAX)
        }
        None => close(3, u32::MAX),
    }
}
