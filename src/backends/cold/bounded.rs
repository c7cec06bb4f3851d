//! Reads and writes of a page server with a time limit for the whole, not per byte: a client that sends or takes a byte
//! now and then counts as one that stands still.

use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// Time for a client to take an answer, however small.
const ANSWER_TIME: Duration = Duration::from_secs(15);
/// A client that takes this many bytes per second is fast enough.
const SLOWEST: u64 = 256 << 10;
/// Longest wait of one call before the clock is looked at.
pub const STEP: Duration = Duration::from_secs(1);
/// Bytes passed to one `sendfile`: each 64 KiB of them may wait for [`STEP`].
const AT_ONCE: usize = 256 << 10;

fn late(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, what)
}

/// The time by which a client must have taken an answer of `len` bytes.
pub fn answered_by(len: usize) -> Instant {
    Instant::now() + ANSWER_TIME + Duration::from_secs(len as u64 / SLOWEST)
}

/// Reads all of `bytes`.
pub fn read_by(stream: &TcpStream, bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match recv(stream, &mut bytes[done..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((count, _)) => done += count,
            Err(Errno::AGAIN) => wait_readable(stream, deadline)?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if done < bytes.len() && Instant::now() >= deadline {
            return Err(late("a request takes too long to come"));
        }
    }
    Ok(())
}

/// Returns when there is something to read, and at `deadline`.
fn wait_readable(stream: &TcpStream, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
    match poll(&mut [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)], Some(&left)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Counts the bytes that `some` sends until all `left` are sent. A call that has waited for [`STEP`] in vain sends
/// none.
fn send_all(mut left: usize, deadline: Instant, mut some: impl FnMut(usize) -> Result<usize, Errno>) -> io::Result<()> {
    while left > 0 {
        match some(left) {
            Ok(0) => return Err(io::Error::other("its data object has been cut off")),
            Ok(sent) => left -= sent,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
        if left > 0 && Instant::now() >= deadline {
            return Err(late("an answer takes too long to be taken"));
        }
    }
    Ok(())
}

/// Writes all of `bytes` to a stream whose writes wait for [`STEP`].
pub fn write_by(stream: &TcpStream, bytes: &[u8], flags: SendFlags, deadline: Instant) -> io::Result<()> {
    let some = |left: usize| send(stream, &bytes[bytes.len() - left..], flags | SendFlags::NOSIGNAL);
    send_all(bytes.len(), deadline, some)
}

/// Writes `len` bytes of a file from an offset on to a stream whose writes wait for [`STEP`], from the page cache.
pub fn send_file_by(
    stream: &TcpStream,
    (file, mut offset): (&File, u64),
    len: usize,
    deadline: Instant,
) -> io::Result<()> {
    let some = |left: usize| rustix::fs::sendfile(stream, file, Some(&mut offset), left.min(AT_ONCE));
    send_all(len, deadline, some)
}
