//! A virtio socket device from the driver's side (VIRTIO 1.2, 5.10): packets in, packets out.

use crate::alloc::{Pages, address};
use crate::arch::trap;
use crate::virtio::{self, Buffer, Device, Queue};
use tvmm_guest::PAGE_SIZE;
use tvmm_guest::args::Message;
use tvmm_guest::message;

const VSOCK: u32 = 19;
const HOST_CID: u64 = 2;
const TYPE_STREAM: u16 = 1;

pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RST: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const RW: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;

pub const SHUT_SEND: u32 = 2;
pub const SHUT_BOTH: u32 = 3;

const HEADER: u64 = 44;
/// Receive buffers of a page each, as Linux has them.
const RX_BUFFERS: u16 = 128;
const TX_SLOTS: u16 = 16;
/// Most payload of a packet sent.
pub const PAYLOAD_MAX: u64 = 64 << 10;
const EVENT_BUFFERS: u16 = 4;

/// The variable fields of a packet's header.
#[derive(Clone, Copy, Default)]
pub struct Header {
    pub host: u32,
    pub guest: u32,
    pub len: u32,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

/// An event or packet from the device.
pub enum Came {
    /// A packet; its payload is at this address until [`Vsock::recycle`].
    Packet(Header, u64, u16),
    /// All connections are gone.
    TransportReset,
    Nothing,
}

/// The driver.
pub struct Vsock {
    device: Device,
    rx: Queue,
    tx: Queue,
    events: Queue,
    cid: u64,
    /// Buffers of the queues, by the number of their only (or first) descriptor.
    rx_at: u64,
    tx_headers: u64,
    tx_at: u64,
    events_at: u64,
    /// Slots that the device has not given back.
    tx_busy: u32,
    /// The slot of each chain that was sent, by its head.
    slot_of: [u8; 64],
    pub interrupts: u64,
}

impl Vsock {
    pub fn find(pages: &mut Pages) -> Result<Self, Message> {
        let device = Device::find(VSOCK, 0, 0)?;
        let rx = device.queue(0, RX_BUFFERS, pages)?;
        let tx = device.queue(1, 2 * TX_SLOTS, pages)?;
        let events = device.queue(2, EVENT_BUFFERS, pages)?;
        let mut page = |count| virtio::buffers(pages, count).map(address);
        let rx_at = page(u64::from(RX_BUFFERS))?;
        let (tx_headers, events_at) = (page(1)?, page(1)?);
        let tx_at = page(u64::from(TX_SLOTS) * PAYLOAD_MAX / PAGE_SIZE)?;
        let cid = u64::from(device.config(0));
        device.start();
        let mut vsock = Self {
            device,
            rx,
            tx,
            events,
            cid,
            rx_at,
            tx_headers,
            tx_at,
            events_at,
            tx_busy: 0,
            slot_of: [0; 64],
            interrupts: 0,
        };
        for i in 0..vsock.rx.size() {
            vsock.recycle(i);
        }
        for i in 0..vsock.events.size() {
            vsock.recycle_event(i);
        }
        Ok(vsock)
    }

    pub fn kicks(&self) -> u64 {
        self.rx.kicks + self.tx.kicks + self.events.kicks
    }

    /// The next event or packet. Its free descriptor is taken again at once, so a buffer of one descriptor keeps its
    /// number.
    pub fn receive(&mut self) -> Came {
        if let Some((head, _)) = self.events.pop() {
            self.recycle_event(head);
            return Came::TransportReset;
        }
        match self.rx.pop() {
            Some((head, _)) => {
                let at = self.rx_at + u64::from(head) * PAGE_SIZE;
                Came::Packet(read_header(at), at + HEADER, head)
            }
            None => Came::Nothing,
        }
    }

    /// Gives a receive buffer to the device.
    pub fn recycle(&mut self, buffer: u16) {
        let at = self.rx_at + u64::from(buffer) * PAGE_SIZE;
        self.rx.add(&[Buffer { at, len: PAGE_SIZE as u32, write: true }]);
        self.rx.kick(1);
    }

    fn recycle_event(&mut self, buffer: u16) {
        self.events.add(&[Buffer { at: self.events_at + u64::from(buffer) * 8, len: 8, write: true }]);
        self.events.kick(1);
    }

    /// Sends a packet, whose payload `fill` writes. Waits for a free slot by polling: the device is quick.
    pub fn send(&mut self, header: &Header, fill: impl FnOnce(&mut [u8])) -> Result<(), Message> {
        let slot = self.free_slot()?;
        let at = self.tx_headers + u64::from(slot) * 64;
        let payload = self.tx_at + u64::from(slot) * PAYLOAD_MAX;
        // SAFETY: the slot's own memory, `PAYLOAD_MAX` bytes of it, which the device has given back.
        fill(unsafe { core::slice::from_raw_parts_mut(payload as *mut u8, header.len as usize) });
        self.write_header(at, header);
        let first = Buffer { at, len: HEADER as u32, write: false };
        let rest = Buffer { at: payload, len: header.len, write: false };
        let head = if header.len == 0 { self.tx.add(&[first]) } else { self.tx.add(&[first, rest]) };
        let head = head.ok_or_else(|| message!("no descriptor is free"))?;
        self.slot_of[usize::from(head) % 64] = slot as u8;
        self.tx_busy |= 1 << slot;
        self.tx.kick(1);
        Ok(())
    }

    fn free_slot(&mut self) -> Result<u32, Message> {
        let mut polls = 0u64;
        loop {
            while let Some((head, _)) = self.tx.pop() {
                self.tx_busy &= !(1 << self.slot_of[usize::from(head) % 64]);
            }
            let slot = self.tx_busy.trailing_ones();
            if slot < u32::from(TX_SLOTS) {
                return Ok(slot);
            }
            polls += 1;
            if polls.is_multiple_of(1 << 20) && self.device.is_broken() {
                return Err(message!("the device needs a reset"));
            }
        }
    }

    /// Waits until the device may have something: with `irq` halted, else not at all. Returns at other interrupts too.
    pub fn wait(&mut self, irq: bool) {
        if !irq {
            core::hint::spin_loop();
            return;
        }
        self.rx.want_interrupt(true);
        self.events.want_interrupt(true);
        if !self.rx.has_used() && !self.events.has_used() {
            trap::halt();
        }
        self.rx.want_interrupt(false);
        if self.device.acknowledge() != 0 {
            self.interrupts += 1;
        }
    }

    fn write_header(&self, at: u64, header: &Header) {
        let words: [u32; 11] = [
            self.cid as u32,
            (self.cid >> 32) as u32,
            HOST_CID as u32,
            0,
            header.guest,
            header.host,
            header.len,
            u32::from(TYPE_STREAM) | u32::from(header.op) << 16,
            header.flags,
            header.buf_alloc,
            header.fwd_cnt,
        ];
        // SAFETY: a header's place, which the device has given back.
        unsafe { (at as *mut [u32; 11]).write_volatile(words) }
    }
}

fn read_header(at: u64) -> Header {
    // SAFETY: the beginning of a receive buffer, which the device has given back.
    let words = unsafe { (at as *const [u32; 11]).read_volatile() };
    Header {
        host: words[4],
        guest: words[5],
        len: words[6].min((PAGE_SIZE - HEADER) as u32),
        op: (words[7] >> 16) as u16,
        flags: words[8],
        buf_alloc: words[9],
        fwd_cnt: words[10],
    }
}
