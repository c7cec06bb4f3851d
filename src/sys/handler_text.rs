//! Text that a signal handler makes: it neither allocates, waits nor takes a lock (signal-safety(7)).

use std::fmt::{self, Write};
use std::os::fd::RawFd;

/// Fits into a pipe that polls as writable (pipe(7), `PIPE_BUF`).
const MAX: usize = 4096;

/// Text of bounded length in place.
pub(super) struct Text {
    bytes: [u8; MAX],
    len: usize,
}

impl Text {
    pub(super) const EMPTY: Text = Text { bytes: [0; MAX], len: 0 };

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Adds bytes; leaves out those that do not fit.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let count = bytes.len().min(MAX - self.len);
        self.bytes[self.len..self.len + count].copy_from_slice(&bytes[..count]);
        self.len += count;
    }

    /// Ends the text with a line feed, in place of its last byte if it is full.
    pub(super) fn end_line(&mut self) {
        self.len = self.len.min(MAX - 1);
        self.push(b"\n");
    }

    /// Writes the text to `fd` if that takes it at once.
    pub(super) fn write_at_once(&self, fd: RawFd) {
        let mut poll = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
        // SAFETY: poll(2) and write(2) work on a local and on `self`.
        unsafe {
            if libc::poll(&raw mut poll, 1, 0) == 1 && poll.revents & libc::POLLOUT != 0 {
                libc::write(fd, self.bytes.as_ptr().cast(), self.len);
            }
        }
    }
}

impl Write for Text {
    /// Leaves out text that does not fit.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text.as_bytes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_longer_than_its_place_is_cut_and_still_ends_its_line() {
        let mut text = Text::EMPTY;
        for _ in 0..300 {
            text.write_str("0123456789abcdef").unwrap();
        }
        assert_eq!(text.len, MAX);
        text.end_line();
        assert_eq!(text.bytes().len(), MAX);
        assert_eq!(text.bytes().last(), Some(&b'\n'));
    }
}
