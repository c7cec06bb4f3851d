//! One connection: a Unix stream on the host's side, credit and shutdown flags on the guest's (VIRTIO 1.2, 5.10.6).

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::net::RecvFlags;
use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};

use super::super::chain::{Slice, touch};
use super::super::{Broken, Buffers};
use super::header::{Header, Ports, op, shut};

/// Bytes that the guest may have sent and the program has not taken: the most a connection ever buffers here.
pub const BUF_ALLOC: u32 = 128 << 10;
/// The least room unknown to the guest that is reported to it: each report may cost the guest an interrupt.
const TELL_AT: u32 = BUF_ALLOC / 2;

/// The phase of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A program has connected and has not named a port yet.
    Greeting,
    /// The guest has got a request, or will get one.
    Requested,
    /// Both ends exist.
    Established,
    /// The guest's end is gone. Bytes that it sent before still go to the program.
    Lingering,
}

/// The guest has broken the rules of the protocol: the connection is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation;

/// The next thing that a connection has for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Packet(Header),
    Nothing,
    /// The connection is over: the guest gets a reset.
    Reset,
}

/// The effect of a guest's packet on its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    GoesOn,
    /// The guest will neither send nor receive: the device answers with a reset.
    GuestClosed,
}

/// The guest's receive room, as the guest reports it.
#[derive(Debug, Default)]
struct Credit {
    buf_alloc: u32,
    fwd_cnt: u32,
    sent: u32,
    /// The guest was asked for an update and has not sent one.
    asked: bool,
}

impl Credit {
    fn left(&self) -> u32 {
        // A guest that reports more bytes taken than were sent to it gets nothing.
        self.buf_alloc.saturating_sub(self.sent.wrapping_sub(self.fwd_cnt))
    }
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    pub phase: Phase,
    pub ports: Ports,
    /// The time at which the table gives it up, if nothing happens before. Only the table uses it.
    pub deadline: Option<Instant>,
    /// It is in the list of connections that have something for the guest.
    pub queued: bool,
    /// The events that it is registered for.
    pub interest: EventFlags,
    stream: UnixStream,
    /// There may be bytes to read; `false` until the kernel says so again.
    readable: bool,
    /// The program will send nothing beyond the bytes that can be read now.
    closing: bool,
    /// The program has closed its end.
    gone: bool,
    /// All bytes that the guest will be given were read.
    at_end: bool,
    /// The stream is broken.
    failed: bool,
    credit: Credit,
    /// Bytes from the guest that the program has not taken.
    waiting: VecDeque<u8>,
    /// The program takes no more bytes.
    refused: bool,
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
    credit_due: bool,
    guest_shut: u32,
    host_shut: u32,
    told_shut: u32,
    /// REQUEST or RESPONSE, if it is still to be sent.
    opening: Option<u16>,
}

impl Connection {
    /// The connection of a program that has connected.
    pub fn accepted(stream: UnixStream) -> Self {
        Connection::new(stream, Phase::Greeting, Ports { host: 0, guest: 0 })
    }

    /// The connection that the guest has asked for in `request`.
    pub fn connected(stream: UnixStream, request: &Header) -> Self {
        let mut connection = Connection::new(stream, Phase::Established, request.ports());
        connection.hear(request);
        connection.opening = Some(op::RESPONSE);
        connection
    }

    fn new(stream: UnixStream, phase: Phase, ports: Ports) -> Self {
        Connection {
            phase,
            ports,
            deadline: None,
            queued: false,
            interest: EventFlags::empty(),
            stream,
            readable: false,
            closing: false,
            gone: false,
            at_end: false,
            failed: false,
            credit: Credit::default(),
            waiting: VecDeque::new(),
            refused: false,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            credit_due: false,
            guest_shut: 0,
            host_shut: 0,
            told_shut: 0,
            opening: None,
        }
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The events to wait for.
    pub fn wanted_events(&self) -> EventFlags {
        let always = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        // OUT only while bytes wait: the kernel reports every byte that the program takes.
        if self.waiting.is_empty() { always } else { always | EventFlags::OUT }
    }

    /// Requests a connection to `ports.guest` for the program.
    pub fn request(&mut self, ports: Ports) {
        self.phase = Phase::Requested;
        self.ports = ports;
        self.opening = Some(op::REQUEST);
    }

    /// True if the guest knows of the connection, so that it must be told of its end.
    pub fn is_known(&self) -> bool {
        match self.phase {
            Phase::Greeting | Phase::Lingering => false,
            Phase::Requested => self.opening.is_none(),
            Phase::Established => true,
        }
    }

    /// True if the guest has been told that both directions are over, and is to confirm it by a reset.
    pub fn awaits_reset(&self) -> bool {
        self.phase == Phase::Established && self.told_shut == shut::BOTH
    }

    /// True if nothing is left to do here.
    pub fn is_done(&self) -> bool {
        match self.phase {
            Phase::Greeting => false,
            // The guest does not know of it yet, and need not.
            Phase::Requested => self.gone && self.opening.is_some(),
            Phase::Established => false,
            Phase::Lingering => self.waiting.is_empty() || self.failed,
        }
    }

    /// Notes the kernel's events of the stream.
    pub fn host_event(&mut self, events: EventFlags) {
        if events.intersects(EventFlags::IN | EventFlags::ERR) {
            self.readable = true;
        }
        if events.intersects(EventFlags::RDHUP | EventFlags::HUP) {
            self.readable = true;
            self.closing = true;
        }
        if events.contains(EventFlags::HUP) {
            self.gone = true;
            self.note_end();
        }
        if events.intersects(EventFlags::OUT | EventFlags::HUP) {
            self.flush();
        }
    }

    /// True if [`next_packet`](Self::next_packet) may have something.
    pub fn wants_to_send(&self) -> bool {
        match self.phase {
            Phase::Greeting | Phase::Lingering => false,
            Phase::Requested => self.opening.is_some() || self.gone,
            Phase::Established => {
                let can_read = self.may_read() && (self.credit.left() > 0 || !self.credit.asked || self.closing);
                self.opening.is_some() || self.failed || can_read || self.shut_is_due() || self.update_is_due()
            }
        }
    }

    fn may_read(&self) -> bool {
        self.readable && !self.at_end
    }

    fn shut_is_due(&self) -> bool {
        self.host_shut != self.told_shut
    }

    fn update_is_due(&self) -> bool {
        self.credit_due || self.forwarded.wrapping_sub(self.told_forwarded) >= TELL_AT
    }

    /// The next packet for the guest; its payload is already at the beginning of `room`.
    pub fn next_packet(&mut self, room: &Buffers<'_>) -> Result<Next, Broken> {
        if let Some(operation) = self.opening.take() {
            return Ok(self.packet(operation, 0));
        }
        match self.phase {
            Phase::Greeting | Phase::Lingering => return Ok(Next::Nothing),
            Phase::Requested if self.gone => return Ok(Next::Reset),
            Phase::Requested => return Ok(Next::Nothing),
            Phase::Established => {}
        }
        if self.may_read()
            && !self.failed
            && let Some(packet) = self.read_packet(room)?
        {
            return Ok(packet);
        }
        if self.failed {
            return Ok(Next::Reset);
        }
        if self.shut_is_due() {
            self.told_shut = self.host_shut;
            return Ok(self.packet(op::SHUTDOWN, 0));
        }
        if self.update_is_due() {
            return Ok(self.packet(op::CREDIT_UPDATE, 0));
        }
        Ok(Next::Nothing)
    }

    /// Reads the program's bytes, as far as the guest has room.
    fn read_packet(&mut self, room: &Buffers<'_>) -> Result<Option<Next>, Broken> {
        if room.is_empty() {
            return Err(Broken::Chain("a receive buffer has no room for data"));
        }
        let left = self.credit.left() as usize;
        if left == 0 {
            if self.closing && self.is_drained() {
                self.at_end = true;
                self.note_end();
                return Ok(None);
            }
            return Ok((!std::mem::replace(&mut self.credit.asked, true)).then(|| self.packet(op::CREDIT_REQUEST, 0)));
        }
        let mut done = 0;
        for slice in room.part(0, left).slices() {
            match io_result(self.stream.read_volatile(&mut slice.clone()), slice) {
                Ok(0) => {
                    self.at_end = true;
                    self.note_end();
                    break;
                }
                Ok(count) => {
                    done += count;
                    if count < slice.len() {
                        // All bytes were read. The end, if it came meanwhile, is still to be noticed.
                        self.readable = self.closing;
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = self.closing;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => break,
                Err(_) => {
                    self.failed = true;
                    break;
                }
            }
        }
        if done == 0 {
            return Ok(None);
        }
        self.credit.sent = self.credit.sent.wrapping_add(done as u32);
        Ok(Some(self.packet(op::RW, done as u32)))
    }

    /// True if the program sends no more and all its bytes were read.
    fn is_drained(&self) -> bool {
        matches!(rustix::net::recv(&self.stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT), Ok((0, _)))
    }

    /// Sets the shutdown flags that the guest gets after the program's end of sending.
    fn note_end(&mut self) {
        if self.at_end {
            self.host_shut |= shut::SEND;
            if self.gone || self.guest_shut & shut::SEND != 0 {
                self.host_shut = shut::BOTH;
            }
        }
    }

    fn packet(&mut self, operation: u16, len: u32) -> Next {
        self.told_forwarded = self.forwarded;
        self.credit_due = false;
        let flags = if operation == op::SHUTDOWN { self.host_shut } else { 0 };
        let header = Header::to_guest(self.ports, operation);
        Next::Packet(Header { len, flags, buf_alloc: BUF_ALLOC, fwd_cnt: self.forwarded, ..header })
    }

    /// Notes the credit that every packet of the guest's carries.
    fn hear(&mut self, header: &Header) {
        self.credit.buf_alloc = header.buf_alloc;
        self.credit.fwd_cnt = header.fwd_cnt;
        if self.credit.left() > 0 {
            self.credit.asked = false;
        }
    }

    /// Handles a packet of the guest's, other than a reset.
    pub fn guest_packet(&mut self, header: &Header, data: &Buffers<'_>) -> Result<Effect, Violation> {
        self.hear(header);
        match (self.phase, header.op) {
            (Phase::Requested, op::RESPONSE) if self.opening.is_none() => {
                self.phase = Phase::Established;
                let line = format!("OK {}\n", self.ports.host);
                // So few bytes always fit into a stream that nothing was written to.
                let written = (&self.stream).write(line.as_bytes());
                self.failed |= written.ok() != Some(line.len());
            }
            (Phase::Established, op::RW) => self.receive(data)?,
            (Phase::Established, op::CREDIT_UPDATE) => {}
            (Phase::Established, op::CREDIT_REQUEST) => self.credit_due = true,
            (Phase::Established, op::SHUTDOWN) => return Ok(self.guest_shutdown(header.flags)),
            _ => return Err(Violation),
        }
        Ok(Effect::GoesOn)
    }

    fn guest_shutdown(&mut self, flags: u32) -> Effect {
        self.guest_shut |= flags & shut::BOTH;
        if self.guest_shut & shut::RECEIVE != 0 {
            // Bytes that the program may still send have no receiver.
            self.at_end = true;
            // The program may be gone; then it need not be told.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.note_end();
        self.flush();
        if self.guest_shut == shut::BOTH { Effect::GuestClosed } else { Effect::GoesOn }
    }

    /// Passes the guest's bytes on; those that the program does not take now wait.
    fn receive(&mut self, data: &Buffers<'_>) -> Result<(), Violation> {
        let len = u32::try_from(data.len()).map_err(|_| Violation)?;
        let fits = self.waiting.len() as u64 + u64::from(len) <= u64::from(BUF_ALLOC);
        if !fits || self.guest_shut & shut::SEND != 0 {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(len);
        let mut passed = 0;
        if self.waiting.is_empty() {
            for slice in data.slices() {
                let count = match io_result(self.stream.write_volatile(slice), slice) {
                    Ok(count) => count,
                    Err(error) => {
                        self.note_write_error(&error);
                        break;
                    }
                };
                passed += count;
                if count < slice.len() {
                    break;
                }
            }
        }
        if !self.refused && passed < data.len() {
            let mut rest = vec![0; data.len() - passed];
            data.read_at(passed, &mut rest);
            self.waiting.extend(rest);
        }
        self.forwarded = self.received.wrapping_sub(self.waiting.len() as u32);
        Ok(())
    }

    /// Writes waiting bytes, as far as the program takes them now; then passes on that the guest sends no more.
    fn flush(&mut self) {
        while !self.waiting.is_empty() {
            match (&self.stream).write(self.waiting.as_slices().0) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => self.note_write_error(&error),
            }
        }
        self.forwarded = self.received.wrapping_sub(self.waiting.len() as u32);
        if self.waiting.is_empty() {
            self.waiting = VecDeque::new();
            if self.guest_shut & shut::SEND != 0 {
                // The program may be gone; then it need not be told.
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
    }

    fn note_write_error(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => return,
            // The program has closed its end, or takes no more; bytes that it sent before may still be unread.
            io::ErrorKind::BrokenPipe => self.host_shut |= shut::RECEIVE,
            _ => self.failed = true,
        }
        self.refused = true;
        self.waiting.clear();
    }

    /// The guest's end is gone. Waiting bytes stay for the program.
    pub fn linger(&mut self) {
        self.phase = Phase::Lingering;
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The error behind an access to `slice` by the kernel.
fn io_result(result: Result<usize, VolatileMemoryError>, slice: &Slice<'_>) -> io::Result<usize> {
    result.map_err(|error| match error {
        VolatileMemoryError::IOError(error) => {
            if error.raw_os_error() == Some(libc::EFAULT) {
                touch(std::iter::once(*slice));
            }
            error
        }
        other => io::Error::other(other.to_string()),
    })
}
