//! The socket device (VIRTIO 1.2, 5.10): stream sockets between the guest and programs on the host, which reach it by
//! Unix sockets as Firecracker has them.
//!
//! ```text
//!  program ── uds_path, "CONNECT <port>" ──► Listener ─┐                            ┌─► RX queue ─► guest
//!                                                      ├─► Table of Connections ◄───┤
//!  program ◄── <uds_path>_<port> ────────── connect() ─┘                            └── TX queue ◄─ guest
//! ```
//!
//! Payload goes between stream and guest memory without a copy, except for bytes that a program does not take at once.
//! Nothing here waits: a guest without receive buffers and a program that does not read stop only their own
//! connections.

mod connection;
mod header;
mod host;
mod table;
#[cfg(test)]
mod tests;
mod traffic;

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use serde::{Deserialize, Serialize};

use super::{Broken, Chain, Io, Source, VirtioDevice, id};
use crate::devices::Error;
use crate::devices::virtio::device::decode;

use connection::{Connection, Phase};
use header::Header;
use host::{Greeting, Listener};
use table::Table;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// VIRTIO 1.2, 5.10.3.
const F_STREAM: u64 = 1;

/// VIRTIO 1.2, 5.10.6.7: the guest's connections are gone, its listeners are not.
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Time for a program to name its port: a person may be typing.
const GREETING_TIMEOUT: Duration = Duration::from_secs(60);
/// Time for the guest to answer a request, or to confirm that a connection is over. Firecracker has 2 s; a guest that
/// was just restored may have to fetch all the memory that it needs for the answer.
const GUEST_TIMEOUT: Duration = Duration::from_secs(8);
/// Time for which packets are held back for a guest that has not acknowledged the reset of its transport.
const RESET_TIMEOUT: Duration = Duration::from_secs(1);

/// Programs accepted in one go.
const ACCEPT_MAX: usize = 64;

/// The number of resets that wait for receive buffers at which no more packets are taken that could cause more.
const RESETS_MAX: usize = 256;

/// The state of the device. Connections are not part of it, because their programs are not part of the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    pub guest_cid: u32,
    /// The bytes of a path.
    pub uds_path: Vec<u8>,
    /// The next port of the host's side: the guest may still know the old ones.
    pub next_port: u32,
}

/// The parameters of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockParams {
    pub guest_cid: u32,
    /// The Unix socket that programs connect to.
    pub uds_path: PathBuf,
    next_port: u32,
    /// The guest may know connections that no longer exist.
    restored: bool,
}

impl VsockParams {
    /// The parameters for a guest that boots.
    pub fn new(guest_cid: u32, uds_path: PathBuf) -> Self {
        VsockParams { guest_cid, uds_path, next_port: Table::FIRST_PORT, restored: false }
    }

    /// The parameters for a guest that is restored.
    pub fn restored(state: VsockState) -> Result<Self, Error> {
        let possible = state.guest_cid > 2 && !state.uds_path.is_empty() && Table::is_host_port(state.next_port);
        if !possible {
            return Err(Error::State { device: "vsock device", what: "its context id, path or port is impossible" });
        }
        let uds_path = PathBuf::from(OsString::from_vec(state.uds_path));
        Ok(VsockParams { guest_cid: state.guest_cid, uds_path, next_port: state.next_port, restored: true })
    }
}

/// Counters; `rx` is to the guest, `tx` from it, as in Firecracker.
#[derive(Debug, Default, Serialize)]
struct Counters {
    rx_packets_count: u64,
    rx_bytes_count: u64,
    tx_packets_count: u64,
    tx_bytes_count: u64,
    /// The guest had no receive buffer for a waiting packet.
    rx_starved_count: u64,
    conns_added: u64,
    /// Connections removed for a time-out, or because the guest broke the protocol.
    conns_killed: u64,
    /// Connections not made: too many, no program listens, no descriptor free.
    conns_refused: u64,
    /// Packets with context ids that are not the guest's and the host's.
    packets_dropped: u64,
    /// Restored guests that acknowledged the reset of their connections.
    resets_seen: u64,
    /// Restored guests that did not within `RESET_TIMEOUT`, so that their packets waited that long.
    resets_expired: u64,
}

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u32,
    uds_path: PathBuf,
    listener: Listener,
    table: Table,
    /// Resets for connections that no longer exist. While there are many, no packets are taken from the guest.
    resets: VecDeque<Header>,
    /// A program may be waiting to be accepted.
    accepts: bool,
    /// The guest must be told that its connections are gone.
    transport_reset: bool,
    /// Set while packets for the guest wait until it has seen that: until the number of its event buffers differs from
    /// this.
    hold: Option<u16>,
    /// The driver will kick for new receive buffers.
    rx_notified: bool,
    restored: bool,
    guest_timeout: Duration,
    quiet_since: Option<Instant>,
    counters: Counters,
}

impl Vsock {
    /// The most descriptors that its connections have open.
    pub const DESCRIPTORS_MAX: u64 = table::CONNECTIONS_MAX as u64;

    /// Checks that a device can listen at `path`, and changes nothing.
    ///
    /// # Errors
    /// The path is taken or too long, or its directory is missing.
    pub fn check_path(path: &Path) -> Result<(), Error> {
        host::check_free(path)
    }

    /// Makes the device; it listens at once.
    pub fn new(params: VsockParams) -> Result<Self, Error> {
        let listener = Listener::bind(&params.uds_path)?;
        let failed = |source| Error::Event { doing: "make an epoll set", device: "vsock device", source };
        let table = Table::new(params.next_port).map_err(failed)?;
        table.watch(&listener, table::LISTENER, EventFlags::IN | EventFlags::ET).map_err(failed)?;
        Ok(Vsock {
            guest_cid: params.guest_cid,
            uds_path: params.uds_path,
            listener,
            table,
            resets: VecDeque::new(),
            accepts: false,
            transport_reset: false,
            hold: None,
            rx_notified: true,
            restored: params.restored,
            guest_timeout: GUEST_TIMEOUT,
            quiet_since: None,
            counters: Counters::default(),
        })
    }

    /// Handles the events of the host's side.
    fn take_host_events(&mut self) -> Result<(), Broken> {
        let accepts = &mut self.accepts;
        let timeout = self.guest_timeout;
        let taken = self.table.take_events(|table, token, events| {
            if token == table::LISTENER {
                *accepts = true;
                return;
            }
            let Some(connection) = table.get(token) else { return };
            connection.host_event(events);
            if connection.phase != Phase::Greeting {
                table.note(token);
                return;
            }
            match host::greeting(connection.stream()) {
                Greeting::Connect(port) => {
                    table.request(token, port);
                    table.set_deadline(token, Some(timeout));
                    table.note(token);
                }
                Greeting::Partial => {}
                Greeting::Invalid => drop(table.remove(token)),
            }
        });
        taken.map_err(host_failed("wait for events"))?;
        self.accept();
        self.expire();
        Ok(())
    }

    /// Accepts programs that have connected.
    fn accept(&mut self) {
        for _ in 0..ACCEPT_MAX {
            if !self.accepts {
                return;
            }
            let stream = match self.listener.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    self.accepts = false;
                    return;
                }
                // The program went away again, or no descriptor is free: the next event tries again.
                Err(_) => return,
            };
            let full = self.table.len() >= table::CONNECTIONS_MAX;
            let added = !full && self.table.insert(Connection::accepted(stream), Some(GREETING_TIMEOUT)).is_ok();
            self.count_added(added);
        }
        self.table.come_back();
    }

    fn count_added(&mut self, added: bool) {
        let counter = if added { &mut self.counters.conns_added } else { &mut self.counters.conns_refused };
        *counter += 1;
    }

    /// Gives up connections whose deadline has passed.
    fn expire(&mut self) {
        while let Some(token) = self.table.next_expired() {
            match token {
                table::DEVICE => self.counters.resets_expired += u64::from(self.hold.take().is_some()),
                token => self.kill(token),
            }
        }
    }

    /// Ends a connection, and tells the guest if it knows of it.
    fn kill(&mut self, token: u64) {
        if let Some(connection) = self.table.remove(token) {
            self.counters.conns_killed += 1;
            if connection.is_known() {
                self.resets.push_back(Header::to_guest(connection.ports, header::op::RST));
            }
        }
    }

    /// Moves packets in both directions, as far as possible now.
    fn work(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        if let Some(since) = self.quiet_since.take() {
            self.table.postpone(since.elapsed());
        }
        let before = self.table.len();
        self.tell_transport_reset(io)?;
        let more = self.take_packets(io)?;
        let more = self.give_packets(io)? | more;
        let is_blocked = self.resets.len() >= RESETS_MAX;
        let has_room = self.accepts && self.table.len() < before;
        if (more && !is_blocked) || has_room {
            self.table.come_back();
        }
        self.table.arm().map_err(host_failed("set a timer"))
    }

    /// Tells a restored guest that its connections are gone. Packets for the guest then wait until it has made another
    /// event buffer available, as drivers do when they have acted on an event: Linux then resets every connection it
    /// finds, and would find new ones.
    ///
    /// The buffers are counted, and the driver is asked to kick for the next one, before the event is given to it. A
    /// driver that polls acts on the event at once, and a later count would include its answer. Other event buffers
    /// wait in the queue, so the driver is asked to kick for a buffer beyond those: with EVENT_IDX it stays silent
    /// about any other.
    fn tell_transport_reset(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        let failed = |source| Broken::Queue { queue: EVENT, source };
        if !io.queues[EVENT].is_ready() {
            self.hold = None;
            return Ok(());
        }
        if self.transport_reset {
            let Some(chain) = self.event_buffer(io)? else { return Ok(()) };
            let event = EVENT_TRANSPORT_RESET.to_le_bytes();
            if chain.writable.write_at(0, &event) != event.len() {
                return Err(Broken::Chain("it is too short for an event"));
            }
            let seen = io.queues[EVENT].waiting(io.memory).map_err(failed)?;
            io.queues[EVENT].ask_for_more(io.memory, seen).map_err(failed)?;
            self.hold = self.hold.and(Some(seen));
            self.transport_reset = false;
            io.push(EVENT, chain.head, event.len() as u32)?;
            io.signal(EVENT)?;
        }
        if !self.transport_reset
            && let Some(before) = self.hold
            && io.queues[EVENT].waiting(io.memory).map_err(failed)? != before
        {
            self.hold = None;
            self.counters.resets_seen += 1;
        }
        Ok(())
    }

    /// Takes an event buffer. If there is none, asks the driver to kick for the next.
    fn event_buffer<'m>(&self, io: &mut Io<'m>) -> Result<Option<Chain<'m>>, Broken> {
        loop {
            if let Some(chain) = io.pop(EVENT)? {
                return Ok(Some(chain));
            }
            let failed = |source| Broken::Queue { queue: EVENT, source };
            let came = io.queues[EVENT].enable_notification(io.memory).map_err(failed)?;
            // At the end of its turn the transport calls the device again.
            if !came || io.budget == 0 {
                return Ok(None);
            }
        }
    }
}

fn host_failed(doing: &'static str) -> impl FnOnce(std::io::Error) -> Broken {
    move |source| Broken::Host { doing, source }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        id::VSOCK
    }

    fn name(&self) -> &str {
        "vsock"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(self.guest_cid).to_le_bytes();
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(config.iter().skip(offset)) {
            *to = *from;
        }
    }

    fn activate(&mut self, _io: &mut Io<'_>) -> Result<(), Broken> {
        if std::mem::take(&mut self.restored) {
            self.transport_reset = true;
            self.hold = Some(0);
            self.table.set_device_deadline(RESET_TIMEOUT);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.table.clear();
        self.resets.clear();
        self.transport_reset = false;
        self.hold = None;
        self.rx_notified = true;
        self.restored = false;
    }

    fn process_queue(&mut self, _queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        self.work(io)
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.table.epoll(), token: 0 }]
    }

    fn process_event(&mut self, _token: u32, io: &mut Io<'_>) -> Result<(), Broken> {
        if let Some(since) = self.quiet_since.take() {
            self.table.postpone(since.elapsed());
        }
        self.take_host_events()?;
        self.work(io)
    }

    fn quiesce(&mut self, _io: &mut Io<'_>) -> Result<(), Broken> {
        self.quiet_since = Some(Instant::now());
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, postcard::Error> {
        postcard::to_stdvec(&VsockState {
            guest_cid: self.guest_cid,
            uds_path: self.uds_path.as_os_str().as_bytes().to_vec(),
            next_port: self.table.next_port(),
        })
    }

    /// Connections end; programs that wait to be accepted are for the guest that runs next.
    fn rewind(&mut self, state: &[u8]) -> Result<(), Error> {
        let state: VsockState = decode("vsock device", state)?;
        self.reset();
        self.table.rewind(VsockParams::restored(state)?.next_port);
        self.accepts = true;
        self.restored = true;
        self.quiet_since = None;
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        let mut counters = serde_json::json!(self.counters);
        counters["conns_removed"] = self.table.removed().into();
        counters
    }
}
