//! The host's page cache of one file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Drops the clean cached pages of `file` (posix_fadvise(2), `POSIX_FADV_DONTNEED`). Dirty pages stay: fsync first.
pub fn evict(file: &File) -> io::Result<()> {
    advise(file, libc::POSIX_FADV_DONTNEED)
}

fn advise(file: &File, advice: i32) -> io::Result<()> {
    // SAFETY: the call takes no pointer; the descriptor is open for as long as `file` is borrowed.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
