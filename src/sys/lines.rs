//! Writes lines to files, pipes and terminals whose reader may be slow or gone. A line waits in a queue of bounded
//! length, and one thread writes the queue out, so that no caller ever waits in write(2). The thread exists while there
//! are lines.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::signals;

/// Bytes that may wait for a reader; a line that does not fit is dropped and counted.
const WAITING_MAX: usize = 64 << 10;
/// The thread ends when no line has come for this time.
const IDLE: Duration = Duration::from_secs(1);
/// A descriptor that polls writable takes this many bytes without blocking (pipe(7), PIPE_BUF).
const WRITE_MAX: usize = 4096;

/// The destination of a line.
#[derive(Clone, Debug)]
pub enum Target {
    StandardError,
    File(Arc<File>),
}

impl Target {
    fn with<R>(&self, work: impl FnOnce(BorrowedFd<'_>) -> R) -> R {
        match self {
            Target::StandardError => work(io::stderr().as_fd()),
            Target::File(file) => work(file.as_fd()),
        }
    }
}

/// The queue, shared by the threads that add lines and the thread that writes them.
#[derive(Debug, Default)]
pub struct Lines {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<(Target, String)>,
    waiting_bytes: usize,
    /// The thread exists.
    has_thread: bool,
    /// The thread is in write(2), without the lock.
    is_writing: bool,
    written: u64,
    dropped: u64,
    failure: Option<io::Error>,
}

/// Lines that were written, and lines that were lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineCounts {
    pub written: u64,
    pub dropped: u64,
}

impl Lines {
    /// Adds a line. Never blocks: a line that does not fit into the queue is dropped and counted.
    pub fn put(self: &Arc<Self>, target: &Target, line: String) {
        let mut state = self.lock();
        if state.waiting_bytes + line.len() > WAITING_MAX {
            state.dropped += 1;
        } else {
            self.add(state, target, line);
        }
    }

    /// Adds a line however full the queue is. For the few lines that give the reason of a process's end.
    pub fn put_always(self: &Arc<Self>, target: &Target, line: String) {
        self.add(self.lock(), target, line);
    }

    fn add(self: &Arc<Self>, mut state: MutexGuard<'_, State>, target: &Target, line: String) {
        state.waiting_bytes += line.len();
        state.waiting.push_back((target.clone(), line));
        if !state.has_thread {
            let lines = self.clone();
            let spawned = std::thread::Builder::new().name("lines".into()).stack_size(128 << 10).spawn(move || {
                signals::block_all();
                lines.write_out();
            });
            state.has_thread = spawned.is_ok();
            if spawned.is_err() {
                // The limit of threads is reached: write here as much as can be written without blocking.
                state.write_now();
            }
        }
        self.changed.notify_all();
    }

    /// Waits until all lines are written, or `patience` is over. Returns whether they are.
    pub fn flush(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        while state.is_writing || !state.waiting.is_empty() && state.has_thread {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.waiting.is_empty()
    }

    pub fn counts(&self) -> LineCounts {
        let state = self.lock();
        LineCounts { written: state.written, dropped: state.dropped }
    }

    /// Takes the error of the last line that could not be written.
    pub fn take_failure(&self) -> Option<io::Error> {
        self.lock().failure.take()
    }

    fn write_out(&self) {
        let mut state = self.lock();
        loop {
            let Some((target, line)) = state.waiting.pop_front() else {
                let (guard, wait) = self.changed.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
                state = guard;
                if wait.timed_out() && state.waiting.is_empty() {
                    state.has_thread = false;
                    return;
                }
                continue;
            };
            state.is_writing = true;
            drop(state);
            let result = target.with(|fd| write_all(fd, line.as_bytes()));
            state = self.lock();
            state.is_writing = false;
            state.waiting_bytes -= line.len();
            state.note(result);
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn note(&mut self, result: io::Result<()>) {
        match result {
            Ok(()) => self.written += 1,
            Err(error) => {
                self.dropped += 1;
                self.failure = Some(error);
            }
        }
    }

    /// Writes as much as can be written without blocking, without a thread; the rest is lost.
    fn write_now(&mut self) {
        while let Some((target, line)) = self.waiting.pop_front() {
            self.waiting_bytes -= line.len();
            let result = target.with(|fd| {
                if !is_writable(fd, Some(Duration::ZERO))? {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                write_all(fd, &line.as_bytes()[..line.len().min(WRITE_MAX)])
            });
            self.note(result);
        }
    }
}

/// Waits until a write would not block, or `patience` is over.
fn is_writable(fd: BorrowedFd<'_>, patience: Option<Duration>) -> io::Result<bool> {
    let patience = patience
        .map(|patience| Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: i64::from(patience.subsec_nanos()) });
    match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::OUT)], patience.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Writes all bytes, however long the reader takes.
fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            // Opened non-blocking, here or by a process that shares it.
            Err(Errno::AGAIN) => {
                is_writable(fd, None)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    fn pipe() -> (io::PipeReader, Target) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, Target::File(Arc::new(File::from(OwnedFd::from(writer)))))
    }

    #[test]
    fn reader_that_never_reads_costs_lines_never_time_nor_memory() {
        let (mut reader, target) = pipe();
        let lines = Arc::new(Lines::default());
        for _ in 0..10_000 {
            lines.put(&target, format!("{}\n", "x".repeat(99)));
        }
        assert!(!lines.flush(Duration::from_millis(10)));
        assert!(lines.lock().waiting_bytes <= WAITING_MAX);
        let dropped = lines.counts().dropped;
        assert!(dropped > 8000, "{dropped} dropped");
        drop(target);
        let reading = std::thread::spawn(move || {
            let mut got = String::new();
            reader.read_to_string(&mut got).unwrap();
            got
        });
        assert!(lines.flush(Duration::from_secs(60)), "a reader that reads gets what waited");
        drop(lines);
        let got = reading.join().unwrap();
        assert!(got.lines().all(|line| line.len() == 99), "no line is torn");
        assert_eq!(got.lines().count() as u64 + dropped, 10_000);
    }

    #[test]
    fn lines_to_a_reader_that_is_gone_are_counted() {
        let (reader, target) = pipe();
        drop(reader);
        let lines = Arc::new(Lines::default());
        lines.put(&target, "lost\n".to_string());
        assert!(lines.flush(Duration::from_secs(60)));
        assert_eq!(lines.counts(), LineCounts { written: 0, dropped: 1 });
        assert_eq!(lines.take_failure().unwrap().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn lines_that_come_after_a_pause_are_written_by_another_thread() {
        let (mut reader, target) = pipe();
        let lines = Arc::new(Lines::default());
        for text in ["one\n", "two\n"] {
            lines.put(&target, text.to_string());
            assert!(lines.flush(Duration::from_secs(60)));
            let mut got = [0; 4];
            reader.read_exact(&mut got).unwrap();
            assert_eq!(got, text.as_bytes());
            let deadline = Instant::now() + Duration::from_secs(60);
            while lines.lock().has_thread {
                assert!(Instant::now() < deadline, "the thread stays");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
