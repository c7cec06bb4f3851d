//! Packet exchange: takes packets from the guest, and gives packets to it.

use super::super::{Broken, Chain, Io};
use super::connection::{Connection, Effect, Next};
use super::header::{self, HOST_CID, Header, TYPE_STREAM, op};
use super::{RESETS_MAX, RX, TX, Vsock, host, table};

/// Packets taken from the guest, and packets given to it, in one turn: together fewer than the transport allows in one.
const PACKETS_MAX: usize = 256;

impl Vsock {
    /// Takes packets from the guest. Returns whether some are left.
    pub(super) fn take_packets(&mut self, io: &mut Io<'_>) -> Result<bool, Broken> {
        if !io.queues[TX].is_ready() {
            return Ok(false);
        }
        let failed = |source| Broken::Queue { queue: TX, source };
        io.queues[TX].disable_notification(io.memory).map_err(failed)?;
        let mut taken = 0;
        let more = loop {
            if taken == PACKETS_MAX || self.resets.len() >= RESETS_MAX {
                break true;
            }
            match io.pop(TX)? {
                Some(chain) => {
                    self.take_packet(&chain)?;
                    io.push(TX, chain.head, 0)?;
                    taken += 1;
                }
                None if io.queues[TX].enable_notification(io.memory).map_err(failed)? => {
                    io.queues[TX].disable_notification(io.memory).map_err(failed)?;
                }
                None => break false,
            }
        };
        if taken > 0 {
            io.signal(TX)?;
        }
        Ok(more)
    }

    fn take_packet(&mut self, chain: &Chain<'_>) -> Result<(), Broken> {
        let header = Header::read(&chain.readable)?;
        let data = chain.readable.part(header::LEN, header.len as usize);
        if data.len() != header.len as usize {
            return Err(Broken::Chain("a packet is longer than its buffers"));
        }
        self.counters.tx_packets_count += 1;
        if header.src_cid != u64::from(self.guest_cid) || header.dst_cid != HOST_CID {
            self.counters.packets_dropped += 1;
            return Ok(());
        }
        if header.kind != TYPE_STREAM {
            self.answer_with_reset(&header);
            return Ok(());
        }
        let token = match self.table.find(header.ports()) {
            Some(token) => token,
            None if header.op == op::REQUEST => {
                self.connect(&header);
                return Ok(());
            }
            None => {
                self.answer_with_reset(&header);
                return Ok(());
            }
        };
        if header.op == op::RST {
            self.table.remove(token);
            return Ok(());
        }
        let Some(connection) = self.table.get(token) else { return Ok(()) };
        match connection.guest_packet(&header, &data) {
            Ok(Effect::GoesOn) => {
                self.counters.tx_bytes_count += u64::from(header.len);
                if header.op == op::RESPONSE {
                    self.table.set_deadline(token, None);
                }
                self.table.note(token);
            }
            Ok(Effect::GuestClosed) => {
                self.answer_with_reset(&header);
                self.table.linger(token);
            }
            Err(_violation) => self.kill(token),
        }
        Ok(())
    }

    fn answer_with_reset(&mut self, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(header.reset());
        }
    }

    /// Connects the guest to a program.
    fn connect(&mut self, request: &Header) {
        let full = self.table.len() >= table::CONNECTIONS_MAX;
        let stream = if full { None } else { host::connect(&self.uds_path, request.dst_port).ok() };
        let added =
            stream.is_some_and(|stream| self.table.insert(Connection::connected(stream, request), None).is_ok());
        self.count_added(added);
        if !added {
            self.answer_with_reset(request);
        }
    }

    /// Gives waiting packets to the guest, as far as it has receive buffers. Returns whether packets are left for which
    /// it has buffers.
    pub(super) fn give_packets(&mut self, io: &mut Io<'_>) -> Result<bool, Broken> {
        if self.hold.is_some() || !io.queues[RX].is_ready() {
            return Ok(false);
        }
        let failed = |source| Broken::Queue { queue: RX, source };
        let mut given = 0;
        let mut more = false;
        while self.has_packets() {
            if given == PACKETS_MAX {
                more = true;
                break;
            }
            let Some(chain) = io.pop(RX)? else {
                self.rx_notified = true;
                if io.queues[RX].enable_notification(io.memory).map_err(failed)? {
                    continue;
                }
                self.counters.rx_starved_count += 1;
                break;
            };
            if std::mem::take(&mut self.rx_notified) {
                io.queues[RX].disable_notification(io.memory).map_err(failed)?;
            }
            let Some(len) = self.fill(&chain)? else {
                io.unpop(RX);
                break;
            };
            io.push(RX, chain.head, len)?;
            given += 1;
        }
        if given > 0 {
            io.signal(RX)?;
        }
        Ok(more)
    }

    fn has_packets(&self) -> bool {
        !self.resets.is_empty() || self.table.has_ready()
    }

    /// Puts the next packet into `chain`; returns its length, if there is one.
    fn fill(&mut self, chain: &Chain<'_>) -> Result<Option<u32>, Broken> {
        if chain.writable.len() < header::LEN {
            return Err(Broken::Chain("a receive buffer is too short for a packet header"));
        }
        let header = match self.resets.pop_front() {
            Some(reset) => Some(reset),
            None => self.next_packet(chain)?,
        };
        let Some(mut header) = header else { return Ok(None) };
        (header.src_cid, header.dst_cid) = (HOST_CID, u64::from(self.guest_cid));
        chain.writable.write_at(0, &header.to_bytes());
        self.counters.rx_packets_count += 1;
        self.counters.rx_bytes_count += u64::from(header.len);
        Ok(Some(header::LEN as u32 + header.len))
    }

    /// The next packet of a connection; its payload is already behind the room for its header.
    fn next_packet(&mut self, chain: &Chain<'_>) -> Result<Option<Header>, Broken> {
        let room = chain.writable.part(header::LEN, usize::MAX);
        while let Some(token) = self.table.next_ready() {
            let Some(connection) = self.table.get(token) else { continue };
            match connection.next_packet(&room)? {
                Next::Packet(header) => {
                    let awaits_reset = header.op == op::SHUTDOWN && connection.awaits_reset();
                    if awaits_reset {
                        self.table.set_deadline(token, Some(self.guest_timeout));
                    }
                    self.table.note(token);
                    return Ok(Some(header));
                }
                Next::Nothing => {}
                Next::Reset => {
                    let removed = self.table.remove(token);
                    return Ok(removed.map(|connection| Header::to_guest(connection.ports, op::RST)));
                }
            }
        }
        Ok(None)
    }
}
