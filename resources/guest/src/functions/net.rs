//! `net_…`: raw frames through a virtio network device (VIRTIO 1.2, 5.1), and answers to ARP, ICMP echo and UDP.
//!
//! Frames that guests send each other have the EtherType for local experiments, a sequence number and a pattern.

use super::{Ctx, Reply};
use crate::alloc::{Pages, address};
use crate::clock;
use crate::virtio::{self, Buffer, Device, Queue};
use tvmm_guest::PAGE_SIZE;
use tvmm_guest::args::{Args, Message};
use tvmm_guest::digest::{Digest, mix2};
use tvmm_guest::message;
use tvmm_guest::text::Text;

const NET: u32 = 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_GUEST_ANNOUNCE: u64 = 1 << 21;
const STATUS_ANNOUNCE: u8 = 2;

const RX: u32 = 0;
const TX: u32 = 1;
const CONTROL: u32 = 2;

const SLOTS: usize = 64;
const RX_SLOT: u64 = PAGE_SIZE / 2;
const TX_SLOT: u64 = 4 * PAGE_SIZE;
const HEADER: u64 = 12;
const NUM_BUFFERS: u64 = 10;

const ETHERNET: u64 = 14;
const EXPERIMENT: u16 = 0x88b5;
const SEQUENCE_END: u64 = ETHERNET + 8;
const SIZE_MAX: u64 = 9014;

/// The device, once it was found.
pub struct State {
    card: Option<Card>,
}

impl State {
    pub const fn new() -> Self {
        Self { card: None }
    }
}

struct Card {
    device: Device,
    rx: Queue,
    tx: Queue,
    control: Option<Queue>,
    mac: [u8; 6],
    /// The buffer of each descriptor.
    rx_at: [u64; SLOTS],
    tx_slot: [u8; SLOTS],
    /// Free transmit slots.
    free: [u8; SLOTS],
    free_len: usize,
    tx_base: u64,
    command: u64,
    interrupts: u64,
}

fn byte(at: u64) -> u8 {
    // SAFETY: only called for buffers that this file allocated.
    unsafe { (at as *const u8).read_volatile() }
}

fn set(at: u64, value: u8) {
    // SAFETY: as in `byte`.
    unsafe { (at as *mut u8).write_volatile(value) }
}

fn half(at: u64) -> u16 {
    u16::from_be_bytes([byte(at), byte(at + 1)])
}

fn bytes<const N: usize>(at: u64) -> [u8; N] {
    core::array::from_fn(|i| byte(at + i as u64))
}

fn put(at: u64, data: &[u8]) {
    data.iter().zip(at..).for_each(|(value, at)| set(at, *value));
}

fn swap(a: u64, b: u64, len: u64) {
    for i in 0..len {
        let (x, y) = (byte(a + i), byte(b + i));
        set(a + i, y);
        set(b + i, x);
    }
}

impl Card {
    fn open(pages: &mut Pages) -> Result<Self, Message> {
        let wanted = F_MTU | F_MAC | F_MRG_RXBUF | F_STATUS | F_CTRL_VQ | F_GUEST_ANNOUNCE;
        let device = Device::find(NET, 0, wanted)?;
        let rx = device.queue(RX, SLOTS as u16, pages)?;
        let tx = device.queue(TX, SLOTS as u16, pages)?;
        let control = if device.has(F_CTRL_VQ) { Some(device.queue(CONTROL, 4, pages)?) } else { None };
        let rx_base = address(virtio::buffers(pages, SLOTS as u64 * RX_SLOT / PAGE_SIZE)?);
        let tx_base = address(virtio::buffers(pages, SLOTS as u64 * TX_SLOT / PAGE_SIZE)?);
        let command = address(virtio::buffers(pages, 1)?);
        let mut card = Self {
            device,
            rx,
            tx,
            control,
            mac: [2, 0, 0, 0, 0, 1],
            rx_at: [0; SLOTS],
            tx_slot: [0; SLOTS],
            free: core::array::from_fn(|i| i as u8),
            free_len: SLOTS,
            tx_base,
            command,
            interrupts: 0,
        };
        for slot in 0..SLOTS as u64 {
            card.offer(rx_base + slot * RX_SLOT);
        }
        card.device.start();
        card.rx.kick(SLOTS as u16);
        card.refresh();
        Ok(card)
    }

    /// Reads the configuration, and announces this address if the device asks for it. Returns whether it did.
    fn refresh(&mut self) -> bool {
        if self.device.has(F_MAC) {
            self.mac = core::array::from_fn(|i| self.device.config_byte(i as u64));
        }
        if !self.device.has(F_GUEST_ANNOUNCE) || self.device.config_byte(6) & STATUS_ANNOUNCE == 0 {
            return false;
        }
        // A gratuitous frame from this address is all that bridges need.
        if let Some((slot, at)) = self.take_slot() {
            self.put_ethernet(at, [0xff; 6]);
            self.send(slot, 60);
        }
        let Some(control) = &mut self.control else { return false };
        put(self.command, &[3, 0, 0xff]);
        control.add(&[
            Buffer { at: self.command, len: 2, write: false },
            Buffer { at: self.command + 2, len: 1, write: true },
        ]);
        control.kick(1);
        control.wait(&self.device, false).is_ok() && byte(self.command + 2) == 0
    }

    fn offer(&mut self, at: u64) {
        if let Some(head) = self.rx.add(&[Buffer { at, len: RX_SLOT as u32, write: true }]) {
            self.rx_at[usize::from(head)] = at;
        }
    }

    fn put_ethernet(&self, frame: u64, to: [u8; 6]) {
        put(frame, &to);
        put(frame + 6, &self.mac);
        put(frame + 12, &EXPERIMENT.to_be_bytes());
    }

    fn take_back(&mut self) {
        while let Some((head, _)) = self.tx.pop() {
            self.free[self.free_len] = self.tx_slot[usize::from(head)];
            self.free_len += 1;
        }
    }

    fn is_all_sent(&mut self) -> bool {
        self.take_back();
        self.free_len == SLOTS
    }

    /// Called in loops that wait for the device, which may be broken.
    fn poll(&self, polls: &mut u64) -> Result<(), Message> {
        *polls += 1;
        match polls.is_multiple_of(1 << 20) && self.device.is_broken() {
            true => Err(message!("the network device needs a reset")),
            false => Ok(()),
        }
    }

    /// A free transmit buffer: its slot, and the address of the frame.
    fn take_slot(&mut self) -> Option<(u8, u64)> {
        self.take_back();
        self.free_len = self.free_len.checked_sub(1)?;
        let slot = self.free[self.free_len];
        let at = self.tx_base + u64::from(slot) * TX_SLOT;
        put(at, &[0; HEADER as usize]);
        Some((slot, at + HEADER))
    }

    /// Makes the frame of `len` bytes in `slot` available.
    fn queue_frame(&mut self, slot: u8, len: u64) {
        let at = self.tx_base + u64::from(slot) * TX_SLOT;
        if let Some(head) = self.tx.add(&[Buffer { at, len: (HEADER + len) as u32, write: false }]) {
            self.tx_slot[usize::from(head)] = slot;
        }
    }

    fn send(&mut self, slot: u8, len: u64) {
        self.queue_frame(slot, len);
        self.tx.kick(1);
    }

    /// Waits for a frame until `deadline_ns`: its buffers and its length without the header. With `irq` the deadline is
    /// checked only after an interrupt.
    fn receive(&mut self, irq: bool, deadline_ns: u64) -> Option<Frame> {
        let mut polls = 0u32;
        loop {
            if irq {
                self.rx.want_interrupt(true);
            }
            if let Some((head, len)) = self.rx.pop() {
                return Some(self.gather(head, len));
            }
            if irq {
                crate::arch::trap::halt();
                self.interrupts += u64::from(self.device.acknowledge() != 0);
            }
            polls += 1;
            if (irq || polls.is_multiple_of(1 << 10)) && clock::now_ns(0) >= deadline_ns {
                return None;
            }
            core::hint::spin_loop();
        }
    }

    fn gather(&mut self, head: u16, len: u32) -> Frame {
        let first = self.rx_at[usize::from(head)];
        let wanted = u16::from_le_bytes(bytes(first + NUM_BUFFERS)).clamp(1, PARTS as u16);
        let mut frame = Frame { parts: [(0, 0); PARTS], count: 1 };
        frame.parts[0] = (first, u64::from(len));
        while frame.count < usize::from(wanted) {
            // All buffers of a frame show at once.
            let Some((head, len)) = self.rx.pop() else { break };
            frame.parts[frame.count] = (self.rx_at[usize::from(head)], u64::from(len));
            frame.count += 1;
        }
        frame
    }

    /// Gives a frame's buffers back to the device.
    fn done(&mut self, frame: &Frame) {
        frame.parts[..frame.count].iter().for_each(|part| self.offer(part.0));
        self.rx.kick(frame.count as u16);
    }
}

const PARTS: usize = 8;

/// A frame in its buffers: the address and bytes of each; the first begins with the header.
struct Frame {
    parts: [(u64, u64); PARTS],
    count: usize,
}

impl Frame {
    /// Address of the frame, and the number of its bytes in the first buffer.
    fn head(&self) -> (u64, u64) {
        (self.parts[0].0 + HEADER, self.parts[0].1.saturating_sub(HEADER))
    }

    fn len(&self) -> u64 {
        self.parts[..self.count].iter().map(|part| part.1).sum::<u64>().saturating_sub(HEADER)
    }

    fn sequence(&self) -> Option<u64> {
        let (at, len) = self.head();
        (len >= SEQUENCE_END && half(at + 12) == EXPERIMENT).then(|| u64::from_le_bytes(bytes(at + ETHERNET)))
    }

    /// True if everything after the sequence number is the pattern.
    fn is_intact(&self, seed: u64, sequence: u64) -> bool {
        let mut offset = 0;
        for (index, (at, len)) in self.parts[..self.count].iter().enumerate() {
            let skip = if index == 0 { HEADER } else { 0 };
            for i in skip..*len {
                if offset >= SEQUENCE_END && byte(at + i) != pattern(seed, sequence, offset) {
                    return false;
                }
                offset += 1;
            }
        }
        true
    }
}

fn pattern(seed: u64, sequence: u64, offset: u64) -> u8 {
    (mix2(seed, sequence).wrapping_add(offset) >> (offset % 8)) as u8
}

fn card<'a>(state: &'a mut State, pages: &mut Pages) -> Result<&'a mut Card, Message> {
    if state.card.is_none() {
        state.card = Some(Card::open(pages)?);
    }
    match &mut state.card {
        Some(card) if card.device.is_broken() => Err(message!("the network device needs a reset")),
        Some(card) => Ok(card),
        None => Err(message!("no network device")),
    }
}

struct Wait {
    irq: bool,
    deadline_ns: u64,
}

fn wait(args: &Args) -> Result<Wait, Message> {
    let irq = args.number_in("irq", 0..=1, 0)? == 1;
    let ms = args.number_in("ms", 1..=3_600_000, 10_000)?;
    Ok(Wait { irq, deadline_ns: clock::now_ns(0) + ms * 1_000_000 })
}

fn hex(mac: [u8; 6]) -> Text<24> {
    let [a, b, c, d, e, f] = mac;
    Text::of(format_args!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"))
}

/// `net_info`: the device's present state; announces this address if the device asks for it.
pub fn info(_: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let card = card(&mut ctx.net, &mut ctx.pages)?;
    let changes = card.device.acknowledge() >> 1;
    let status = card.device.config_byte(6);
    let announced = u8::from(card.refresh());
    let mtu = u16::from_le_bytes([card.device.config_byte(10), card.device.config_byte(11)]);
    let mac = hex(card.mac);
    Ok(Reply::named(
        "net_info",
        format_args!("mac={} status={status} mtu={mtu} announced={announced} changes={changes}", mac.as_str()),
    ))
}

/// `net_answer ip=0x0a000002 frames=N ms=10000 irq=0`: answers ARP and ICMP echo requests for `ip`, and sends UDP
/// datagrams back to their sender, until `frames` frames other than ARP were answered.
pub fn answer(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let ip = args.number_in("ip", 0..=u64::from(u32::MAX), 0)? as u32;
    let frames = args.number_in("frames", 1..=u64::MAX, 1)?;
    let wait = wait(args)?;
    let card = card(&mut ctx.net, &mut ctx.pages)?;
    let (mut answered, mut other) = ([0u64; 3], 0u64);
    let (kicks, interrupts) = (card.rx.kicks + card.tx.kicks, card.interrupts);
    while answered[1] + answered[2] < frames {
        let Some(frame) = card.receive(wait.irq, wait.deadline_ns) else { break };
        match turn_round(card, &frame, ip.to_be_bytes()) {
            Some(kind) => answered[kind] += 1,
            None => other += 1,
        }
        card.done(&frame);
    }
    let (kicks, interrupts) = (card.rx.kicks + card.tx.kicks - kicks, card.interrupts - interrupts);
    let [arp, icmp, udp] = answered;
    Ok(Reply::named(
        "net_answer",
        format_args!("arp={arp} icmp={icmp} udp={udp} other={other} kicks={kicks} interrupts={interrupts}"),
    ))
}

/// Sends the answer to a frame, if it is one that has an answer: 0 ARP, 1 ICMP, 2 UDP.
fn turn_round(card: &mut Card, frame: &Frame, ip: [u8; 4]) -> Option<usize> {
    let (from, len) = frame.head();
    let l3 = ETHERNET;
    let is_arp = len >= 42 && half(from + 12) == 0x0806 && half(from + l3 + 6) == 1 && bytes(from + l3 + 24) == ip;
    let is_ip = len >= 42 && half(from + 12) == 0x0800 && byte(from + l3) == 0x45 && bytes(from + l3 + 16) == ip;
    let kind = match byte(from + l3 + 9) {
        _ if is_arp => 0,
        1 if is_ip && byte(from + l3 + 20) == 8 => 1,
        17 if is_ip => 2,
        _ => return None,
    };
    let (slot, at) = loop {
        if let Some(slot) = card.take_slot() {
            break slot;
        }
    };
    // SAFETY: `len` bytes of a receive buffer that the device has given back, into a transmit buffer that is larger.
    unsafe { core::ptr::copy_nonoverlapping(from as *const u8, at as *mut u8, len as usize) };
    swap(at, at + 6, 6);
    put(at + 6, &card.mac);
    match kind {
        0 => {
            put(at + l3 + 6, &2u16.to_be_bytes());
            swap(at + l3 + 8, at + l3 + 18, 10);
            put(at + l3 + 8, &card.mac);
        }
        // Swapping addresses and ports changes no checksum.
        _ => swap(at + l3 + 12, at + l3 + 16, 4),
    }
    match kind {
        1 => {
            set(at + l3 + 20, 0);
            // The type was 8 and is 0: the one's complement sum grows by 0x0800 (RFC 1624).
            let (sum, carry) = half(at + l3 + 22).overflowing_add(0x0800);
            put(at + l3 + 22, &(sum + u16::from(carry)).to_be_bytes());
        }
        2 => swap(at + l3 + 20, at + l3 + 22, 2),
        _ => {}
    }
    card.send(slot, len);
    Some(kind)
}

/// `net_send count=N size=1514 batch=16 seed=0`: broadcast frames. The digest is that of their numbers.
pub fn send(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let count = args.number_in("count", 1..=u64::MAX, 1)?;
    let size = args.number_in("size", 60..=SIZE_MAX, 1514)?;
    let batch = args.number_in("batch", 1..=SLOTS as u64, 16)?;
    let seed = args.number_in("seed", 0..=u64::MAX, 0)?;
    let card = card(&mut ctx.net, &mut ctx.pages)?;
    let (before, start) = (card.tx.kicks, clock::now_ns(0));
    let mut digest = Digest::new();
    let (mut sequence, mut polls) = (0, 0u64);
    while sequence < count {
        let mut added = 0;
        while added < batch.min(count - sequence) {
            let Some((slot, at)) = card.take_slot() else {
                card.poll(&mut polls)?;
                continue;
            };
            card.put_ethernet(at, [0xff; 6]);
            put(at + ETHERNET, &sequence.to_le_bytes());
            (SEQUENCE_END..size).for_each(|offset| set(at + offset, pattern(seed, sequence, offset)));
            card.queue_frame(slot, size);
            digest.word(sequence);
            sequence += 1;
            added += 1;
        }
        card.tx.kick(added as u16);
    }
    while !card.is_all_sent() {
        card.poll(&mut polls)?;
    }
    let (kicks, ns) = (card.tx.kicks - before, clock::now_ns(0) - start);
    Ok(Reply::new(digest.finish(), format_args!("frames={count} bytes={} kicks={kicks} ns={ns}", count * size)))
}

/// `net_receive count=N ms=10000 irq=0 seed=0`: frames of `net_send`, until there were `count` or the time is over. The
/// digest is that of their numbers; `lost` counts numbers that were skipped.
pub fn receive(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let count = args.number_in("count", 1..=u64::MAX, 1)?;
    let seed = args.number_in("seed", 0..=u64::MAX, 0)?;
    let wait = wait(args)?;
    let card = card(&mut ctx.net, &mut ctx.pages)?;
    let (kicks, interrupts) = (card.rx.kicks, card.interrupts);
    let (mut frames, mut total, mut lost, mut bad, mut next) = (0u64, 0u64, 0u64, 0u64, 0u64);
    let (mut digest, mut first_ns, mut last_ns) = (Digest::new(), 0, 0);
    while frames < count {
        let Some(frame) = card.receive(wait.irq, wait.deadline_ns) else { break };
        if let Some(sequence) = frame.sequence() {
            last_ns = clock::now_ns(0);
            first_ns = if frames == 0 { last_ns } else { first_ns };
            bad += u64::from(sequence < next || !frame.is_intact(seed, sequence));
            lost += sequence.saturating_sub(next);
            next = sequence.wrapping_add(1);
            digest.word(sequence);
            frames += 1;
            total += frame.len();
        }
        card.done(&frame);
    }
    let (kicks, interrupts, ns) = (card.rx.kicks - kicks, card.interrupts - interrupts, last_ns - first_ns);
    Ok(Reply::new(
        digest.finish(),
        format_args!(
            "frames={frames} bytes={total} lost={lost} bad={bad} kicks={kicks} interrupts={interrupts} ns={ns}"
        ),
    ))
}
