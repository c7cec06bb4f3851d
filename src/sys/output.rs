//! Console output: never blocks a vCPU, never grows without bound.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::FileType;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes kept for a reader that is slower than the guest. Bytes beyond are dropped and counted.
const BACKLOG_MAX: usize = 64 * 1024;

/// The destination of a console's bytes. Called by [`ConsoleOutput`], under its lock.
pub trait Sink: Send {
    /// Must write as many bytes as it can without blocking, and return their number; `WouldBlock` if it can write none.
    fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize>;
}

/// Sees all bytes of a console's output, also dropped bytes and those that wait for the reader.
pub trait Witness: Send {
    /// Called with the bytes of each write of the guest, in order, after the sink took as many as it could.
    fn see(&mut self, bytes: &[u8]);
}

/// A file descriptor as sink. Other processes and threads may write to the same pipe, so no write may rely on space
/// that was free a moment before.
#[derive(Debug)]
pub struct FdSink {
    file: File,
    kind: FdKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FdKind {
    /// Opened again, non-blocking for this process alone.
    NonBlocking,
    Socket,
    /// A file; or another user's pipe or terminal, which cannot be opened again and is polled before each write.
    Asked,
}

impl FdSink {
    pub fn new(fd: OwnedFd) -> Self {
        let file = File::from(fd);
        let file_type =
            rustix::fs::fstat(&file).map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode));
        match file_type {
            FileType::Socket => FdSink { file, kind: FdKind::Socket },
            FileType::Fifo => FdSink::reopen(file),
            FileType::CharacterDevice if file.is_terminal() => FdSink::reopen(file),
            _ => FdSink { file, kind: FdKind::Asked },
        }
    }

    fn reopen(file: File) -> Self {
        match reopened(&file) {
            Ok(file) => FdSink { file, kind: FdKind::NonBlocking },
            Err(_) => FdSink { file, kind: FdKind::Asked },
        }
    }
}

/// Opens a pipe or terminal again, non-blocking. A terminal polls writable when it takes one byte, and makes a write of
/// more wait for its reader; a pipe may be filled by another writer between the question and the write.
fn reopened(file: &File) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// A pipe polls writable only if this much fits (pipe(7), PIPE_BUF), so a write of no more cannot block.
const WRITE_MAX: usize = 4096;

impl Sink for FdSink {
    fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = &bytes[..bytes.len().min(WRITE_MAX)];
        match self.kind {
            FdKind::NonBlocking => self.file.write(bytes),
            FdKind::Socket => {
                let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
                Ok(rustix::net::send(&self.file, bytes, flags)?)
            }
            FdKind::Asked => {
                let mut poll =
                    [rustix::event::PollFd::from_borrowed_fd(self.file.as_fd(), rustix::event::PollFlags::OUT)];
                let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
                if rustix::event::poll(&mut poll, Some(&now))? == 0 {
                    return Err(io::Error::from(io::ErrorKind::WouldBlock));
                }
                self.file.write(bytes)
            }
        }
    }
}

struct State {
    sink: Box<dyn Sink>,
    witness: Option<Box<dyn Witness>>,
    backlog: VecDeque<u8>,
    /// The last byte was no end of a line.
    is_in_line: bool,
    written: u64,
    dropped: u64,
    /// Set when the sink takes nothing any more: the reason.
    gone: Option<io::Error>,
}

/// The output side of a console. Bytes go straight to the sink while it takes them; otherwise they wait in a bounded
/// backlog and `backlog_event` asks the main loop to call [`drain`](Self::drain) when the sink is writable again.
pub struct ConsoleOutput {
    state: Mutex<State>,
    backlog_event: EventFd,
}

impl ConsoleOutput {
    pub fn new(sink: Box<dyn Sink>) -> io::Result<Self> {
        ConsoleOutput::watched(sink, None)
    }

    /// As `new`, with a witness.
    pub fn watched(sink: Box<dyn Sink>, witness: Option<Box<dyn Witness>>) -> io::Result<Self> {
        let state =
            State { sink, witness, backlog: VecDeque::new(), is_in_line: false, written: 0, dropped: 0, gone: None };
        Ok(ConsoleOutput { state: Mutex::new(state), backlog_event: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Readable when bytes have begun to wait.
    pub fn backlog_event(&self) -> &EventFd {
        &self.backlog_event
    }

    /// Takes bytes from the guest. Never blocks, never fails: lost bytes are counted.
    pub fn put(&self, bytes: &[u8]) {
        self.put_locked(self.lock(), bytes);
    }

    /// Ends a line that has begun: the bytes that follow come from another guest.
    pub fn end_line(&self) {
        let state = self.lock();
        if state.is_in_line {
            self.put_locked(state, b"\n");
        }
    }

    fn put_locked(&self, mut state: MutexGuard<'_, State>, bytes: &[u8]) {
        state.is_in_line = bytes.last().map_or(state.is_in_line, |last| *last != b'\n');
        let mut rest = bytes;
        while !rest.is_empty() && state.gone.is_none() && state.backlog.is_empty() {
            match state.sink.write_now(rest) {
                Ok(count @ 1..) => {
                    state.written += count as u64;
                    rest = &rest[count..];
                }
                Err(error) if would_block(&error) => {
                    // The counter cannot overflow: it is read each time the backlog is drained.
                    let _ = self.backlog_event.write(1);
                    break;
                }
                result => state.lose(result),
            }
        }
        let room = if state.gone.is_some() { 0 } else { BACKLOG_MAX - state.backlog.len() };
        let (kept, lost) = rest.split_at(rest.len().min(room));
        state.backlog.extend(kept);
        state.dropped += lost.len() as u64;
        if let Some(witness) = &mut state.witness {
            witness.see(bytes);
        }
    }

    /// Writes waiting bytes, as far as the sink takes them now. Returns true if bytes still wait.
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
                result => state.lose(result),
            }
        }
        false
    }

    /// Drops the bytes that wait for their reader, and counts them.
    pub fn discard(&self) {
        let mut state = self.lock();
        state.dropped += state.backlog.len() as u64;
        state.backlog.clear();
    }

    /// True if bytes wait for their reader.
    pub fn has_backlog(&self) -> bool {
        !self.lock().backlog.is_empty()
    }

    /// A description of the bytes that did not reach the reader; `None` if all did.
    pub fn loss(&self) -> Option<String> {
        let state = self.lock();
        let waiting = state.backlog.len() as u64;
        match (&state.gone, state.dropped + waiting) {
            (_, 0) => None,
            (Some(error), lost) => Some(format!("{lost} bytes were lost: {error}")),
            (None, lost) => Some(format!("{lost} bytes were lost: its reader does not read")),
        }
    }

    /// Bytes written, and bytes dropped because the reader did not read them.
    pub fn counts(&self) -> (u64, u64) {
        let state = self.lock();
        (state.written, state.dropped)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The reader is gone for good: counts waiting bytes as lost, and does not call the sink again.
    fn lose(&mut self, result: io::Result<usize>) {
        self.dropped += self.backlog.len() as u64;
        self.backlog.clear();
        self.gone = Some(result.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into()));
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
        assert!(output.loss().unwrap().starts_with("2 bytes were lost: Broken pipe"));
        assert!(!output.drain());
    }

    #[test]
    fn bytes_that_wait_can_be_dropped_and_are_counted() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = ConsoleOutput::new(Box::new(FdSink::new(OwnedFd::from(writer)))).unwrap();
        (0..100_000).for_each(|_| output.put(b"x"));
        let (written, _) = output.counts();
        output.discard();
        assert_eq!(output.counts(), (written, 100_000 - written));
        let mut got = vec![0; written as usize];
        reader.read_exact(&mut got).unwrap();
        output.put(b"y");
        reader.read_exact(&mut got[..1]).unwrap();
        assert_eq!(got[0], b'y');
    }

    #[test]
    fn a_line_that_has_begun_is_ended_once() {
        let seen = std::sync::Arc::new(Mutex::new(Vec::new()));
        let (_reader, writer) = io::pipe().unwrap();
        let sink = Box::new(FdSink::new(OwnedFd::from(writer)));
        let output = ConsoleOutput::watched(sink, Some(Box::new(Recorder(seen.clone())))).unwrap();
        output.end_line();
        output.put(b"whole\n");
        output.end_line();
        output.put(b"hal");
        output.end_line();
        output.end_line();
        output.put(b"");
        assert_eq!(*seen.lock().unwrap(), b"whole\nhal\n");
    }

    struct Recorder(std::sync::Arc<Mutex<Vec<u8>>>);

    impl Witness for Recorder {
        fn see(&mut self, bytes: &[u8]) {
            self.0.lock().unwrap().extend(bytes);
        }
    }

    #[test]
    fn witness_sees_bytes_that_no_reader_gets() {
        for has_reader in [true, false] {
            let (reader, writer) = io::pipe().unwrap();
            let _reader = has_reader.then_some(reader);
            let recorder = Recorder(Default::default());
            let all = recorder.0.clone();
            let sink = Box::new(FdSink::new(OwnedFd::from(writer)));
            let output = ConsoleOutput::watched(sink, Some(Box::new(recorder))).unwrap();
            let bytes: Vec<u8> = (0..300_000u32).map(|index| index as u8).collect();
            bytes.chunks(1000).for_each(|chunk| output.put(chunk));
            assert!(output.loss().is_some());
            assert_eq!(*all.lock().unwrap(), bytes);
        }
    }

    /// A pipe or socket whose other users find it as blocking as before, and that is full.
    fn full_and_shared(writer: OwnedFd) {
        let mut shared = File::from(writer.try_clone().unwrap());
        let mut sink = FdSink::new(writer);
        while sink.write_now(&[0; 4096]).is_ok_and(|count| count > 0) {}
        // However little is free now, and whichever writer takes it, a write that does not fit fails at once.
        assert!(would_block(&sink.write_now(&[0; 4096]).unwrap_err()));
        assert!(!rustix::fs::fcntl_getfl(&shared).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
        assert_ne!(sink.kind, FdKind::Asked);
        let _ = shared.flush();
    }

    #[test]
    fn sink_never_blocks_and_leaves_other_users_of_its_descriptor_alone() {
        let (_reader, writer) = io::pipe().unwrap();
        full_and_shared(writer.into());
        let (_peer, socket) = std::os::unix::net::UnixStream::pair().unwrap();
        full_and_shared(socket.into());
    }
}
