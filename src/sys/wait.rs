//! Waiting for one of two descriptors.

use std::io;
use std::os::fd::AsRawFd;

/// Returns when `a` or `b` is readable (or at its end). Signals do not end the wait.
pub fn either_readable(a: &impl AsRawFd, b: &impl AsRawFd) -> io::Result<()> {
    let poll_in = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll_in(a.as_raw_fd()), poll_in(b.as_raw_fd())];
    loop {
        // SAFETY: `fds` is an array of two valid pollfds; both descriptors are open while their owners are borrowed.
        if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
