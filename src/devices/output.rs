//! Where a console's bytes go: never blocks a vCPU, never grows without bound.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes kept for a reader who is slower than the guest. What comes on top is dropped and counted.
const BACKLOG_MAX: usize = 64 * 1024;

/// A destination that can say whether a write would block.
pub trait Sink: Send {
    /// Writes what it can without blocking; `WouldBlock` if that is nothing.
    fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize>;
}

/// A file descriptor as sink. It may be shared with other processes, so it is asked before each write instead of
/// being set non-blocking.
#[derive(Debug)]
pub struct FdSink(File);

impl FdSink {
    pub fn new(fd: OwnedFd) -> Self {
        let file = File::from(fd);
        FdSink(if file.is_terminal() { reopened(&file).unwrap_or(file) } else { file })
    }
}

/// A terminal polls writable when it takes one byte, and makes a write of more wait for its reader. Opened again, it is
/// non-blocking for this process alone. A terminal of another user cannot be opened again and is used as it is.
fn reopened(terminal: &File) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", terminal.as_raw_fd());
    OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// A pipe polls writable only if this much fits (pipe(7), PIPE_BUF), so a write of no more cannot block.
const WRITE_MAX: usize = 4096;

impl Sink for FdSink {
    fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut poll = [rustix::event::PollFd::from_borrowed_fd(self.0.as_fd(), rustix::event::PollFlags::OUT)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        if rustix::event::poll(&mut poll, Some(&now))? == 0 {
            return Err(io::Error::from(io::ErrorKind::WouldBlock));
        }
        self.0.write(&bytes[..bytes.len().min(WRITE_MAX)])
    }
}

struct State {
    sink: Box<dyn Sink>,
    backlog: VecDeque<u8>,
    written: u64,
    dropped: u64,
    gone: bool,
}

/// A console's way out. Bytes go straight to the sink while it takes them; otherwise they wait in a bounded backlog
/// and `backlog_event` asks the main loop to call [`drain`](Self::drain) when the sink is writable again.
pub struct ConsoleOutput {
    state: Mutex<State>,
    backlog_event: EventFd,
}

impl ConsoleOutput {
    pub fn new(sink: Box<dyn Sink>) -> io::Result<Self> {
        let state = State { sink, backlog: VecDeque::new(), written: 0, dropped: 0, gone: false };
        Ok(ConsoleOutput { state: Mutex::new(state), backlog_event: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Readable when bytes began to wait.
    pub fn backlog_event(&self) -> &EventFd {
        &self.backlog_event
    }

    /// Takes bytes from the guest. Never blocks, never fails: lost bytes are counted.
    pub fn put(&self, mut bytes: &[u8]) {
        let mut state = self.lock();
        while !bytes.is_empty() && !state.gone && state.backlog.is_empty() {
            match state.sink.write_now(bytes) {
                Ok(count @ 1..) => {
                    state.written += count as u64;
                    bytes = &bytes[count..];
                }
                Err(error) if would_block(&error) => {
                    // The counter cannot overflow: it is read each time the backlog is drained.
                    let _ = self.backlog_event.write(1);
                    break;
                }
                Ok(_) | Err(_) => state.lose(0),
            }
        }
        let room = if state.gone { 0 } else { BACKLOG_MAX - state.backlog.len() };
        let (kept, lost) = bytes.split_at(bytes.len().min(room));
        state.backlog.extend(kept);
        state.dropped += lost.len() as u64;
    }

    /// Writes what waits, as far as the sink takes it now. Returns true if bytes still wait.
    pub fn drain(&self) -> bool {
        let _ = self.backlog_event.read();
        let mut guard = self.lock();
        let state = &mut *guard;
        while !state.backlog.is_empty() {
            match state.sink.write_now(state.backlog.as_slices().0) {
                Ok(count @ 1..) => {
                    state.backlog.drain(..count);
                    state.written += count as u64;
                }
                Err(error) if would_block(&error) => return true,
                Ok(_) | Err(_) => {
                    let waiting = state.backlog.len() as u64;
                    state.backlog.clear();
                    state.lose(waiting);
                }
            }
        }
        false
    }

    /// Bytes written, and bytes dropped because nobody read them.
    pub fn counts(&self) -> (u64, u64) {
        let state = self.lock();
        (state.written, state.dropped)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl State {
    /// The reader is gone for good: count the bytes and stop asking.
    fn lose(&mut self, bytes: u64) {
        self.dropped += bytes;
        self.gone = true;
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_reader_that_stops_reading_costs_bytes_but_never_blocks() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = ConsoleOutput::new(Box::new(FdSink::new(OwnedFd::from(writer)))).unwrap();
        let total = 300_000u64;
        for index in 0..total {
            output.put(&[index as u8]);
        }
        assert!(output.backlog_event().read().is_ok());
        let (written, dropped) = output.counts();
        assert!(written > 0 && dropped > 0);
        assert_eq!(written + dropped + BACKLOG_MAX as u64, total);
        let mut got = Vec::new();
        let mut buffer = [0; 4096];
        while (got.len() as u64) < written + BACKLOG_MAX as u64 {
            let count = reader.read(&mut buffer).unwrap();
            got.extend_from_slice(&buffer[..count]);
            output.drain();
        }
        assert!(got.iter().enumerate().all(|(index, &byte)| byte == index as u8), "order kept, nothing torn");
    }

    #[test]
    fn a_reader_that_is_gone_is_counted_not_asked_again() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output = ConsoleOutput::new(Box::new(FdSink::new(OwnedFd::from(writer)))).unwrap();
        output.put(&[1]);
        output.put(&[2]);
        assert_eq!(output.counts(), (0, 2));
        assert!(!output.drain());
    }
}
