//! All connections of a device, and their registrations with the kernel.
//!
//! One epoll descriptor holds everything that the device waits for. The device thread waits for that descriptor,
//! edge-triggered. All its members are edge-triggered too and every round takes all events, so that the next one is an
//! edge; flags keep the content of an edge until it has been handled.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::header::Ports;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// The most connections, including those whose guest end does not exist yet or any more (as Firecracker).
pub const CONNECTIONS_MAX: usize = 1023;

/// Ports of the host's end of connections that programs make (as Firecracker).
const HOST_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;

/// The subject of an event: one of these, or a connection from `FIRST` on. Numbers are not used twice.
pub const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const MORE: u64 = 2;
/// The device's own entry in the list of deadlines.
pub const DEVICE: u64 = 3;
const FIRST: u64 = 16;

/// Events taken at once.
const EVENTS: usize = 64;

/// The connections.
#[derive(Debug)]
pub struct Table {
    epoll: OwnedFd,
    timer: OwnedFd,
    /// Wakes the device thread again.
    more: OwnedFd,
    connections: HashMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    /// Connections that have something for the guest, each once, in turn.
    ready: VecDeque<u64>,
    deadlines: BTreeSet<(Instant, u64)>,
    armed: Option<Instant>,
    next: u64,
    next_port: u32,
    removed: u64,
}

impl Table {
    /// An empty table; `next_port` is the next host port.
    pub fn new(next_port: u32) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let more = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let table = Table {
            epoll,
            timer,
            more,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            deadlines: BTreeSet::new(),
            armed: None,
            next: FIRST,
            next_port,
            removed: 0,
        };
        table.watch(&table.timer, TIMER, EventFlags::IN | EventFlags::ET)?;
        table.watch(&table.more, MORE, EventFlags::IN | EventFlags::ET)?;
        Ok(table)
    }

    /// The first of the ports that programs' connections get.
    pub const FIRST_PORT: u32 = HOST_PORTS.start;

    pub fn is_host_port(port: u32) -> bool {
        HOST_PORTS.contains(&port)
    }

    pub fn next_port(&self) -> u32 {
        self.next_port
    }

    pub fn epoll(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    pub fn watch(&self, fd: impl AsFd, token: u64, events: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token), events)?)
    }

    /// Wakes the device thread again soon.
    pub fn come_back(&self) {
        // A full counter has the same effect.
        let _ = rustix::io::write(&self.more, &1u64.to_ne_bytes());
    }

    /// The number of connections removed so far.
    pub fn removed(&self) -> u64 {
        self.removed
    }

    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Takes all events, and calls `each` with them.
    pub fn take_events(&mut self, mut each: impl FnMut(&mut Self, u64, EventFlags)) -> io::Result<()> {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&now)) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                match event.data.u64() {
                    TIMER => {
                        self.armed = None;
                        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                    }
                    MORE => drop(rustix::io::read(&self.more, &mut [0; 8])),
                    token => each(self, token, event.flags),
                }
            }
            if events.len() < EVENTS {
                return Ok(());
            }
        }
    }

    /// Adds a connection.
    pub fn insert(&mut self, mut connection: Connection, timeout: Option<Duration>) -> io::Result<u64> {
        let token = self.next;
        self.next += 1;
        connection.interest = connection.wanted_events();
        self.watch(&connection, token, connection.interest)?;
        if connection.is_known() {
            self.by_ports.insert(connection.ports, token);
        }
        self.connections.insert(token, connection);
        self.set_deadline(token, timeout);
        self.note(token);
        Ok(token)
    }

    pub fn get(&mut self, token: u64) -> Option<&mut Connection> {
        self.connections.get_mut(&token)
    }

    /// The connection with these ends.
    pub fn find(&self, ports: Ports) -> Option<u64> {
        self.by_ports.get(&ports).copied()
    }

    /// Gives the connection `token` a port on the host's side and asks for `port` of the guest's.
    pub fn request(&mut self, token: u64, port: u32) {
        let free = |host: &u32| !self.by_ports.contains_key(&Ports { host: *host, guest: port });
        let ports = (self.next_port..HOST_PORTS.end).chain(HOST_PORTS.start..self.next_port);
        // There are more ports than connections.
        let Some(host) = ports.into_iter().find(free) else { return };
        self.next_port = if host + 1 == HOST_PORTS.end { HOST_PORTS.start } else { host + 1 };
        let ports = Ports { host, guest: port };
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.request(ports);
            self.by_ports.insert(ports, token);
        }
    }

    /// Removes and returns a connection, and deregisters its stream.
    pub fn remove(&mut self, token: u64) -> Option<Connection> {
        self.set_deadline(token, None);
        let connection = self.connections.remove(&token)?;
        self.removed += 1;
        self.forget_ports(&connection.ports, token);
        if connection.queued {
            self.ready.retain(|other| *other != token);
        }
        Some(connection)
    }

    fn forget_ports(&mut self, ports: &Ports, token: u64) {
        if self.by_ports.get(ports) == Some(&token) {
            self.by_ports.remove(ports);
        }
    }

    /// The guest's end of a connection is gone: its ports are free.
    pub fn linger(&mut self, token: u64) {
        self.set_deadline(token, None);
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.linger();
            let ports = connection.ports;
            self.forget_ports(&ports, token);
        }
        self.note(token);
    }

    pub fn clear(&mut self) {
        self.removed += self.connections.len() as u64;
        self.connections.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.deadlines.clear();
    }

    /// As [`clear`](Self::clear); the next port of the host's side is `next_port`.
    pub fn rewind(&mut self, next_port: u32) {
        self.clear();
        self.next_port = next_port;
    }

    /// Updates a connection after an event: its entry in the list, the events it waits for, and its removal if it is
    /// over.
    pub fn note(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if connection.is_done() {
            self.remove(token);
            return;
        }
        if !connection.queued && connection.wants_to_send() {
            connection.queued = true;
            self.ready.push_back(token);
        }
        let wanted = connection.wanted_events();
        if wanted != connection.interest {
            connection.interest = wanted;
            // The stream is registered, and nothing else can fail.
            let _ = epoll::modify(&self.epoll, &*connection, EventData::new_u64(token), wanted);
        }
    }

    /// Takes the next connection that has something for the guest.
    pub fn next_ready(&mut self) -> Option<u64> {
        let token = self.ready.pop_front()?;
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.queued = false;
        }
        Some(token)
    }

    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Sets or clears the deadline of a connection.
    pub fn set_deadline(&mut self, token: u64, timeout: Option<Duration>) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if let Some(old) = connection.deadline.take() {
            self.deadlines.remove(&(old, token));
        }
        if let Some(timeout) = timeout {
            let at = Instant::now() + timeout;
            connection.deadline = Some(at);
            self.deadlines.insert((at, token));
        }
    }

    /// Sets the device's own deadline.
    pub fn set_device_deadline(&mut self, timeout: Duration) {
        self.deadlines.insert((Instant::now() + timeout, DEVICE));
    }

    /// The next connection whose time is up; removes its deadline.
    pub fn next_expired(&mut self) -> Option<u64> {
        let (at, token) = *self.deadlines.first()?;
        if at > Instant::now() {
            return None;
        }
        self.deadlines.pop_first();
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.deadline = None;
        }
        Some(token)
    }

    /// Moves all deadlines, because time has stood still for the guest.
    pub fn postpone(&mut self, by: Duration) {
        self.deadlines = std::mem::take(&mut self.deadlines).into_iter().map(|(at, token)| (at + by, token)).collect();
        for connection in self.connections.values_mut() {
            connection.deadline = connection.deadline.map(|at| at + by);
        }
    }

    /// Sets the timer to the first deadline.
    pub fn arm(&mut self) -> io::Result<()> {
        let first = self.deadlines.first().map(|(at, _)| *at);
        // A timer that fires too early does no harm.
        if first.is_none() || self.armed.is_some_and(|armed| first >= Some(armed)) {
            return Ok(());
        }
        let left = first.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()));
        // Zero would disarm it.
        let left = left.max(Duration::from_nanos(1));
        let value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let setting = Itimerspec { it_interval: interval, it_value: value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting)?;
        self.armed = first;
        Ok(())
    }
}
