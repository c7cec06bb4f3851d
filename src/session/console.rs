//! The other end of the serial line: standard input and output, or one scripted request.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::snapshot::random_hex;
use crate::sys::clock;
use crate::sys::output::{ConsoleOutput, FdSink, Sink, Witness};
use crate::sys::terminal::RawTerminal;
use crate::sys::timeline::Moments;
use crate::vmm::machine::Environment;

const CTRL_A: u8 = 1;
/// Bytes read at once. Bytes that the guest has not taken wait here, so this bounds them too.
const READ_MAX: usize = 4096;

/// Input of a person that is not for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typed {
    /// Ctrl-A X.
    Quit,
    /// Standard input has ended.
    End,
    /// None of these.
    Nothing,
}

/// Bytes on their way to the guest.
#[derive(Debug, Default)]
pub struct Input {
    pending: VecDeque<u8>,
    terminal: Option<RawTerminal>,
    after_ctrl_a: bool,
    /// Standard input is read, and has not ended.
    pub stdin_open: bool,
    /// Standard input was emptied since it was found readable, so a read might block.
    was_emptied: bool,
}

impl Input {
    /// Standard input; a terminal is put into raw mode until this is dropped.
    pub fn stdin() -> io::Result<Self> {
        Ok(Input { terminal: RawTerminal::enter()?, ..Input::default() })
    }

    /// Fixed bytes.
    pub fn script(bytes: &[u8]) -> Self {
        Input { pending: bytes.iter().copied().collect(), ..Input::default() }
    }

    /// Returns whether more should be read: the guest has taken all bytes so far. A terminal is read ahead of the
    /// guest, so that Ctrl-A X ends a machine whose guest takes nothing.
    pub fn wants_more(&self) -> bool {
        self.pending.is_empty() || self.terminal.is_some() && self.pending.len() < READ_MAX
    }

    /// Reads standard input once. Called when it is readable.
    pub fn read(&mut self) -> io::Result<Typed> {
        let mut buffer = [0; READ_MAX];
        if std::mem::take(&mut self.was_emptied) && !is_readable(io::stdin().as_fd())? {
            return Ok(Typed::Nothing);
        }
        // Not through `Stdin`: bytes held in its buffer would not make the descriptor readable.
        let count = match rustix::io::read(io::stdin(), &mut buffer) {
            Ok(0) => return Ok(Typed::End),
            Ok(count) => count,
            // EAGAIN: another process made it non-blocking and took the bytes.
            Err(Errno::INTR | Errno::AGAIN) => return Ok(Typed::Nothing),
            // EIO: the terminal went away.
            Err(Errno::IO) => return Ok(Typed::End),
            Err(error) => return Err(error.into()),
        };
        Ok(self.take(&buffer[..count]))
    }

    /// Forgets the bytes that the guest has not taken: those read so far, and those that wait in standard input now.
    pub fn discard(&mut self) -> io::Result<()> {
        self.pending.clear();
        self.after_ctrl_a = false;
        // A device that cannot tell has none that wait (/dev/null).
        let waiting = if self.stdin_open { rustix::io::ioctl_fionread(io::stdin()).unwrap_or(0) } else { 0 };
        let mut left = waiting as usize;
        let mut buffer = [0; READ_MAX];
        while left > 0 {
            self.was_emptied = true;
            match rustix::io::read(io::stdin(), &mut buffer[..left.min(READ_MAX)]) {
                Ok(0) | Err(Errno::AGAIN | Errno::IO) => return Ok(()),
                Ok(count) => left -= count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Filters a terminal's Ctrl-A sequences: X ends tvmm, A or Ctrl-A sends Ctrl-A.
    fn take(&mut self, bytes: &[u8]) -> Typed {
        if self.terminal.is_none() {
            self.pending.extend(bytes);
            return Typed::Nothing;
        }
        for &byte in bytes {
            match (std::mem::take(&mut self.after_ctrl_a), byte) {
                (true, b'x' | b'X') => return Typed::Quit,
                (true, b'a' | b'A' | CTRL_A) => self.pending.push_back(CTRL_A),
                (true, other) => self.pending.extend([CTRL_A, other]),
                (false, CTRL_A) => self.after_ctrl_a = true,
                (false, other) => self.pending.push_back(other),
            }
        }
        Typed::Nothing
    }

    /// Passes the guest as many bytes as its FIFO takes. `receive` takes a first part of the bytes and returns its
    /// length.
    pub fn feed<E>(&mut self, mut receive: impl FnMut(&[u8]) -> Result<usize, E>) -> Result<(), E> {
        while !self.pending.is_empty() {
            let taken = receive(self.pending.as_slices().0)?;
            if taken == 0 {
                break;
            }
            self.pending.drain(..taken);
        }
        Ok(())
    }
}

fn is_readable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut poll = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(rustix::event::poll(&mut poll, Some(&now))? > 0)
}

/// Notes the time of the first byte of output, and passes all bytes on.
pub struct TimedSink<S> {
    pub inner: S,
    pub moments: Arc<Moments>,
}

impl<S: Sink> Sink for TimedSink<S> {
    fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.moments.guest_wrote();
        self.inner.write_now(bytes)
    }
}

/// The answer to a scripted request, once it has come.
#[derive(Debug)]
pub struct Answer {
    event: EventFd,
    got: Mutex<Option<(String, u64)>>,
    failure: Mutex<Option<String>>,
}

impl Answer {
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Answer { event: EventFd::new(EFD_NONBLOCK)?, got: Mutex::new(None), failure: Mutex::new(None) }))
    }

    /// Readable when the answer has come, or will not come.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The answer line, and the time of its last byte in ns of CLOCK_MONOTONIC.
    pub fn get(&self) -> Option<(String, u64)> {
        self.got.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The reason why no answer will come.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn fail(&self, why: String) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        let _ = self.event.write(1);
    }

    pub(crate) fn set(&self, line: String) {
        let now = clock::monotonic_ns();
        self.got.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert((line, now));
        let _ = self.event.write(1);
    }
}

/// Longest answer line kept; a guest that writes a longer one has not answered.
const ANSWER_MAX: usize = 4096;

/// Returns a name for one request that no request of another process has: a VM that was saved in the middle of a
/// request answers that one first when it is restored.
pub fn request_id(kind: &str) -> String {
    format!("{kind}-{}", random_hex(4))
}

/// Looks for the answer line of one request in the output.
pub struct AnswerWatch {
    id: String,
    line: Vec<u8>,
    answer: Arc<Answer>,
}

impl AnswerWatch {
    /// Waits for `ok <id> …` or `err <id> …`.
    pub fn new(id: &str, answer: Arc<Answer>) -> Self {
        AnswerWatch { id: id.to_string(), line: Vec::new(), answer }
    }
}

impl Witness for AnswerWatch {
    fn see(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte != b'\n' {
                if self.line.len() < ANSWER_MAX {
                    self.line.push(byte);
                }
                continue;
            }
            let line = String::from_utf8_lossy(&self.line).trim_end_matches('\r').to_string();
            self.line.clear();
            let mut words = line.split(' ');
            if matches!(words.next(), Some("ok" | "err")) && words.next() == Some(&self.id) {
                self.answer.set(line);
            }
        }
    }
}

/// Connects a machine's console to standard output. `watched`: the id of a request, and the place for its answer.
///
/// # Errors
/// Those of dup(2) and eventfd(2).
pub fn to_stdout(
    watched: Option<(&str, &Arc<Answer>)>,
    fault_timeout: Duration,
) -> io::Result<(Environment, Arc<Moments>)> {
    let moments = Arc::new(Moments::default());
    let stdout = io::stdout().as_fd().try_clone_to_owned()?;
    let timed = TimedSink { inner: FdSink::new(stdout), moments: moments.clone() };
    let witness = watched.map(|(id, answer)| Box::new(AnswerWatch::new(id, answer.clone())) as Box<dyn Witness>);
    let output = Arc::new(ConsoleOutput::watched(Box::new(timed), witness)?);
    Ok((Environment { output, fault_timeout, moments: moments.clone() }, moments))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_line_with_the_id_is_the_answer() {
        let answer = Answer::new().unwrap();
        let mut watch = AnswerWatch::new("r1", answer.clone());
        for chunk in ["ready 0.1\nok r", "2 x\nokr1\nok r10 y\n", "ok r1 00ff 12 a=b\r"] {
            watch.see(chunk.as_bytes());
            assert!(answer.get().is_none(), "{chunk}");
        }
        watch.see(b"\nerr r1 late\n");
        assert_eq!(answer.get().unwrap().0, "ok r1 00ff 12 a=b");
        assert!(answer.event().read().is_ok());
    }

    #[test]
    fn input_without_a_terminal_is_passed_as_it_is() {
        let mut input = Input::default();
        assert_eq!(input.take(b"\x01x"), Typed::Nothing);
        assert_eq!(input.pending, [1, b'x']);
    }
}
