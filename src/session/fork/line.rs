//! The line between the parent of a fork and its children while they start: a pair of connected stream sockets. One end
//! is the parent's, the other the standard input of all children.
//!
//! The parent gives an order to all children with one write, a byte for each child, and each child takes one byte. So
//! all children get an order or none does, at whatever moment the parent is killed. A child that reads the end of the
//! line knows that its parent has ended.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{self, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// An order of the parent to all children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Order {
    /// The fork point is sealed: restore it.
    Restore = b'f',
    /// All children are restored: run, and live on without the parent.
    Run = b'r',
    /// All children are restored: live on without the parent, and stay paused.
    StayPaused = b'p',
}

impl Order {
    /// The step of the children that take the order.
    fn of_step(self) -> Step {
        match self {
            Order::Restore => Step::Waits,
            Order::Run | Order::StayPaused => Step::Restored,
        }
    }

    fn of(byte: u8) -> Option<Order> {
        [Order::Restore, Order::Run, Order::StayPaused].into_iter().find(|order| *order as u8 == byte)
    }
}

/// A step that a child has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// The process has started, and waits for the fork point.
    Waits = b'w',
    /// The fork point is restored.
    Restored = b'd',
}

/// The step of a child whose process has the id `pid`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct News {
    pub step: Step,
    pub pid: u32,
}

/// Bytes of a message to the parent: the step, and the process's id.
const NEWS_BYTES: usize = 1 + size_of::<u32>();
/// The most messages that are read at once.
const NEWS_MAX: usize = 64;

impl News {
    fn to_bytes(self) -> [u8; NEWS_BYTES] {
        let mut bytes = [self.step as u8; NEWS_BYTES];
        bytes[1..].copy_from_slice(&self.pid.to_le_bytes());
        bytes
    }

    fn of(bytes: &[u8]) -> Option<News> {
        let (step, pid) = bytes.split_first()?;
        let step = [Step::Waits, Step::Restored].into_iter().find(|known| *known as u8 == *step)?;
        Some(News { step, pid: u32::from_le_bytes(pid.try_into().ok()?) })
    }
}

/// The parent's end.
pub struct ParentEnd {
    ours: UnixStream,
    theirs: UnixStream,
}

impl ParentEnd {
    pub fn new() -> io::Result<ParentEnd> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok(ParentEnd { ours, theirs })
    }

    /// The standard input of a child.
    pub fn child_stdin(&self) -> io::Result<Stdio> {
        Ok(OwnedFd::from(self.theirs.try_clone()?).into())
    }

    /// Gives an order to each of `children` children.
    pub fn order(&self, order: Order, children: usize) -> io::Result<()> {
        (&self.ours).write_all(&vec![order as u8; children])
    }

    /// Waits for news, or the end of a process, `limit` at most. `ends`: descriptors that are readable from the ends of
    /// processes on. Returns the index of a process that has ended.
    pub fn wait<'a>(&self, ends: impl Iterator<Item = &'a OwnedFd>, limit: Duration) -> io::Result<Option<usize>> {
        let mut awaited: Vec<PollFd<'_>> = ends.map(|end| PollFd::new(end, PollFlags::IN)).collect();
        let processes = awaited.len();
        awaited.push(PollFd::new(&self.ours, PollFlags::IN));
        let limit = Timespec::try_from(limit).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut awaited, Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(awaited[..processes].iter().position(|end| !end.revents().is_empty()))
    }

    /// The news that have come; none if there are none yet.
    pub fn news(&self) -> io::Result<Vec<News>> {
        // A child sends each message whole, so the bytes are whole messages.
        let mut bytes = [0; NEWS_MAX * NEWS_BYTES];
        match recv(&self.ours, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((count, _)) => Ok(bytes[..count].chunks_exact(NEWS_BYTES).filter_map(News::of).collect()),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A child's end: its standard input.
#[derive(Clone, Copy, Debug)]
pub struct ChildEnd;

/// The result of listening to the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    Order(Order),
    /// Nothing has been said yet.
    Nothing,
    /// The parent has ended.
    End,
}

impl ChildEnd {
    /// Tells the parent that this process has reached `step`. If the parent has ended, [`hear`](Self::hear) says so.
    pub fn tell(self, step: Step) -> io::Result<()> {
        let news = News { step, pid: process::id() };
        match send(io::stdin(), &news.to_bytes(), SendFlags::NOSIGNAL) {
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the next order, if there is one for a child that has reached `step`. An order for children that are not so
    /// far is left to them.
    pub fn hear(self, step: Step) -> io::Result<Heard> {
        match self.receive(RecvFlags::PEEK)? {
            // The order stays where it is, so the end of the line behind it cannot be read.
            Heard::Order(order) if order.of_step() != step && self.has_hung_up()? => Ok(Heard::End),
            Heard::Order(order) if order.of_step() != step => Ok(Heard::Nothing),
            Heard::Order(_) => self.receive(RecvFlags::empty()),
            heard => Ok(heard),
        }
    }

    /// Returns whether the parent has ended.
    fn has_hung_up(self) -> io::Result<bool> {
        let stdin = io::stdin();
        let mut awaited = [PollFd::new(&stdin, PollFlags::empty())];
        match poll(&mut awaited, Some(&Timespec::default())) {
            Ok(_) => Ok(awaited[0].revents().contains(PollFlags::HUP)),
            Err(error) => Err(error.into()),
        }
    }

    fn receive(self, flags: RecvFlags) -> io::Result<Heard> {
        let mut byte = [0];
        match recv(io::stdin(), &mut byte, flags | RecvFlags::DONTWAIT) {
            Ok((0, _)) | Err(Errno::CONNRESET) => Ok(Heard::End),
            Ok(_) => Ok(Order::of(byte[0]).map_or(Heard::Nothing, Heard::Order)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Heard::Nothing),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the parent says something or ends, or `other` is readable. Returns whether `other` is.
    pub fn wait(self, other: &impl AsFd) -> io::Result<bool> {
        let stdin = io::stdin();
        let mut awaited = [PollFd::new(&stdin, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
        match poll(&mut awaited, None) {
            Ok(_) => Ok(!awaited[1].revents().is_empty()),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
