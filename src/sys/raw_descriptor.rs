//! A file descriptor that another object owns, for calls that take `AsRawFd`.

use std::os::fd::{AsRawFd, RawFd};

/// A descriptor whose owner outlives the use of this.
#[derive(Clone, Copy, Debug)]
pub struct RawDescriptor(pub RawFd);

impl AsRawFd for RawDescriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}
