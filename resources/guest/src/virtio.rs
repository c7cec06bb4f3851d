//! Virtio devices over MMIO, from the driver's side (VIRTIO 1.2, 2.7 and 4.2): modern transport, split queues.
//!
//! A device is looked for when a function first needs it, so that booting costs nothing. Requests are either polled for
//! or waited for by interrupt; a driver that polls asks for none.

use crate::alloc::{Pages, address};
use crate::arch::{apic, trap};
use core::sync::atomic::{Ordering, fence};
use tvmm_guest::args::Message;
use tvmm_guest::frames::Run;
use tvmm_guest::{PAGE_SIZE, message};

/// The addresses of tvmm's device registers, and the interrupt lines.
const FIRST: u64 = 0xd000_0000;
const STEP: u64 = 0x1000;
const FIRST_LINE: u32 = 5;
const DEVICES: u32 = 19;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");

const REG_MAGIC: u64 = 0x00;
const REG_VERSION: u64 = 0x04;
const REG_DEVICE_ID: u64 = 0x08;
const REG_DEVICE_FEATURES: u64 = 0x10;
const REG_DEVICE_FEATURES_SEL: u64 = 0x14;
const REG_DRIVER_FEATURES: u64 = 0x20;
const REG_DRIVER_FEATURES_SEL: u64 = 0x24;
const REG_QUEUE_SEL: u64 = 0x30;
const REG_QUEUE_NUM_MAX: u64 = 0x34;
const REG_QUEUE_NUM: u64 = 0x38;
const REG_QUEUE_READY: u64 = 0x44;
const REG_QUEUE_NOTIFY: u64 = 0x50;
const REG_INTERRUPT_STATUS: u64 = 0x60;
const REG_INTERRUPT_ACK: u64 = 0x64;
const REG_STATUS: u64 = 0x70;
const REG_QUEUE_DESC: u64 = 0x80;
const REG_QUEUE_DRIVER: u64 = 0x90;
const REG_QUEUE_DEVICE: u64 = 0xa0;
const REG_CONFIG: u64 = 0x100;

const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_NEEDS_RESET: u32 = 64;

const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;

fn store(address: u64, value: u32) {
    // SAFETY: only called for registers of a device that `find` has seen, and for the probed addresses, which are no
    // RAM.
    unsafe { (address as *mut u32).write_volatile(value) }
}

fn load(address: u64) -> u32 {
    // SAFETY: as in `store`.
    unsafe { (address as *const u32).read_volatile() }
}

/// A device's registers.
#[derive(Clone, Copy)]
pub struct Device {
    base: u64,
    line: u32,
    features: u64,
}

impl Device {
    /// The `nth` device of type `id`, reset and waiting for [`start`](Self::start), with the features of `wanted` that
    /// it offers.
    pub fn find(id: u32, nth: u32, wanted: u64) -> Result<Self, Message> {
        let there = |base: u64| load(base + REG_MAGIC) == MAGIC && load(base + REG_VERSION) == 2;
        let slots = (0..DEVICES).map(|i| (FIRST + u64::from(i) * STEP, FIRST_LINE + i));
        let mut found = slots.filter(|(base, _)| there(*base) && load(base + REG_DEVICE_ID) == id);
        let (base, line) = found.nth(nth as usize).ok_or_else(|| message!("no virtio device {id} number {nth}"))?;
        let mut device = Self { base, line, features: 0 };
        store(base + REG_STATUS, 0);
        store(base + REG_STATUS, STATUS_ACKNOWLEDGE);
        store(base + REG_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            store(base + REG_DEVICE_FEATURES_SEL, half);
            offered |= u64::from(load(base + REG_DEVICE_FEATURES)) << (32 * half);
        }
        device.features = offered & (wanted | VERSION_1 | EVENT_IDX);
        for half in 0..2 {
            store(base + REG_DRIVER_FEATURES_SEL, half);
            store(base + REG_DRIVER_FEATURES, (device.features >> (32 * half)) as u32);
        }
        let status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
        store(base + REG_STATUS, status);
        match load(base + REG_STATUS) == status {
            true => Ok(device),
            false => Err(message!("virtio device {id} refuses features {:#x}", device.features)),
        }
    }

    /// True if `feature` (a bit) was agreed on.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Makes queue `index` with at most `size` entries; before [`start`](Self::start).
    pub fn queue(&self, index: u32, size: u16, pages: &mut Pages) -> Result<Queue, Message> {
        store(self.base + REG_QUEUE_SEL, index);
        let max = load(self.base + REG_QUEUE_NUM_MAX);
        let size = u32::from(size).min(max) as u16;
        if size == 0 {
            return Err(message!("no queue {index}"));
        }
        // Descriptors, driver area and device area, each on pages of its own.
        let bytes = [16 * u64::from(size), 6 + 2 * u64::from(size), 6 + 8 * u64::from(size)];
        let count = bytes.iter().map(|len| len.div_ceil(PAGE_SIZE)).sum();
        let run = pages.alloc(count).map_err(|e| message!("{e}"))?;
        // SAFETY: just allocated and mapped, without any other user.
        unsafe { core::ptr::write_bytes(address(run) as *mut u8, 0, (count * PAGE_SIZE) as usize) };
        let desc = address(run);
        let avail = desc + bytes[0].next_multiple_of(PAGE_SIZE);
        let used = avail + bytes[1].next_multiple_of(PAGE_SIZE);
        store(self.base + REG_QUEUE_NUM, u32::from(size));
        for (register, at) in [(REG_QUEUE_DESC, desc), (REG_QUEUE_DRIVER, avail), (REG_QUEUE_DEVICE, used)] {
            store(self.base + register, at as u32);
            store(self.base + register + 4, (at >> 32) as u32);
        }
        store(self.base + REG_QUEUE_READY, 1);
        let event_idx = self.has(EVENT_IDX);
        let notify = self.base + REG_QUEUE_NOTIFY;
        let mut queue =
            Queue { index, size, desc, avail, used, notify, event_idx, free: 0, next_avail: 0, next_used: 0, kicks: 0 };
        queue.link_free();
        queue.want_interrupt(false);
        Ok(queue)
    }

    /// Lets the device work; its interrupt wakes this CPU.
    pub fn start(&self) {
        apic::route_isa(self.line, apic::VECTOR_WAKE);
        let status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK;
        store(self.base + REG_STATUS, status);
    }

    /// Starts the device with queue 0 outside memory, which breaks it until the next reset.
    pub fn start_broken(&self) {
        store(self.base + REG_QUEUE_SEL, 0);
        store(self.base + REG_QUEUE_NUM, 16);
        for register in [REG_QUEUE_DESC, REG_QUEUE_DRIVER, REG_QUEUE_DEVICE] {
            store(self.base + register, 0);
            store(self.base + register + 4, 0xffff);
        }
        store(self.base + REG_QUEUE_READY, 1);
        let status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK;
        store(self.base + REG_STATUS, status);
    }

    /// Acknowledges the interrupt and returns its causes; 1: used buffers, 2: the configuration changed.
    pub fn acknowledge(&self) -> u32 {
        let status = load(self.base + REG_INTERRUPT_STATUS);
        if status != 0 {
            store(self.base + REG_INTERRUPT_ACK, status);
        }
        status
    }

    pub fn is_broken(&self) -> bool {
        load(self.base + REG_STATUS) & STATUS_NEEDS_RESET != 0
    }

    /// A 32-bit field of the configuration space.
    pub fn config(&self, offset: u64) -> u32 {
        load(self.base + REG_CONFIG + offset)
    }

    /// Writes a 32-bit field of the configuration space.
    pub fn set_config(&self, offset: u64, value: u32) {
        store(self.base + REG_CONFIG + offset, value);
    }

    /// A byte of the configuration space.
    pub fn config_byte(&self, offset: u64) -> u8 {
        // SAFETY: as in `load`.
        unsafe { ((self.base + REG_CONFIG + offset) as *const u8).read_volatile() }
    }
}

/// A buffer of a request: physical address, length, and whether the device writes it.
#[derive(Clone, Copy)]
pub struct Buffer {
    pub at: u64,
    pub len: u32,
    pub write: bool,
}

/// A split queue.
pub struct Queue {
    index: u32,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    notify: u64,
    event_idx: bool,
    /// Head of the list of free descriptors; `size` when there is none.
    free: u16,
    next_avail: u16,
    next_used: u16,
    /// The number of notifications sent to the device.
    pub kicks: u64,
}

impl Queue {
    pub fn size(&self) -> u16 {
        self.size
    }

    fn link_free(&mut self) {
        for i in 0..self.size {
            self.set(self.desc + 16 * u64::from(i) + 14, i + 1);
        }
    }

    fn set(&self, at: u64, value: u16) {
        // SAFETY: inside the queue's own pages.
        unsafe { (at as *mut u16).write_volatile(value) }
    }

    fn get(&self, at: u64) -> u16 {
        // SAFETY: inside the queue's own pages.
        unsafe { (at as *const u16).read_volatile() }
    }

    /// Makes a chain available and returns its head; `None` when too few descriptors are free.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let head = self.free;
        for (i, buffer) in buffers.iter().enumerate() {
            if self.free >= self.size {
                self.free = head;
                return None;
            }
            let at = self.desc + 16 * u64::from(self.free);
            let more = if i + 1 < buffers.len() { DESC_NEXT } else { 0 };
            // SAFETY: a descriptor of this queue.
            unsafe {
                (at as *mut u64).write_volatile(buffer.at);
                ((at + 8) as *mut u32).write_volatile(buffer.len);
            }
            self.set(at + 12, more | if buffer.write { DESC_WRITE } else { 0 });
            self.free = self.get(at + 14);
        }
        self.set(self.avail + 4 + 2 * u64::from(self.next_avail % self.size), head);
        self.next_avail = self.next_avail.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.set(self.avail + 2, self.next_avail);
        Some(head)
    }

    /// Notifies the device of `added` new chains, unless it has turned notifications off.
    pub fn kick(&mut self, added: u16) {
        fence(Ordering::SeqCst);
        let wanted = match self.event_idx {
            true => {
                let event = self.get(self.used + 4 + 8 * u64::from(self.size));
                self.next_avail.wrapping_sub(event).wrapping_sub(1) < added
            }
            false => self.get(self.used) & 1 == 0,
        };
        if wanted {
            self.kicks += 1;
            store(self.notify, self.index);
        }
    }

    /// True if a chain has been given back.
    pub fn has_used(&self) -> bool {
        self.get(self.used + 2) != self.next_used
    }

    /// A chain that the device has given back: its head, and the number of bytes written.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        if self.get(self.used + 2) == self.next_used {
            return None;
        }
        fence(Ordering::SeqCst);
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        // SAFETY: an element of this queue's used ring.
        let (head, len) = unsafe { ((at as *const u32).read_volatile(), ((at + 4) as *const u32).read_volatile()) };
        self.next_used = self.next_used.wrapping_add(1);
        let head = (head as u16).min(self.size - 1);
        let mut last = head;
        while self.get(self.desc + 16 * u64::from(last) + 12) & DESC_NEXT != 0 {
            last = self.get(self.desc + 16 * u64::from(last) + 14);
        }
        self.set(self.desc + 16 * u64::from(last) + 14, self.free);
        self.free = head;
        Some((head, len))
    }

    /// Asks the device to interrupt, or not to, when it gives the next chain back.
    pub fn want_interrupt(&mut self, wanted: bool) {
        match self.event_idx {
            // An index half the ring of numbers away is not reached before it is set again.
            true => {
                let event = if wanted { self.next_used } else { self.next_used.wrapping_add(0x8000) };
                self.set(self.avail + 4 + 2 * u64::from(self.size), event);
            }
            false => self.set(self.avail, u16::from(!wanted)),
        }
        fence(Ordering::SeqCst);
    }

    /// Waits for a chain to come back, by polling or by interrupt.
    pub fn wait(&mut self, device: &Device, interrupt: bool) -> Result<(u16, u32), Message> {
        let mut polls = 0u64;
        loop {
            if interrupt {
                self.want_interrupt(true);
            }
            if let Some(done) = self.pop() {
                if interrupt {
                    device.acknowledge();
                }
                return Ok(done);
            }
            if interrupt {
                trap::halt();
                continue;
            }
            core::hint::spin_loop();
            polls += 1;
            if polls.is_multiple_of(1 << 20) && device.is_broken() {
                return Err(message!("the device needs a reset"));
            }
        }
    }
}

/// Allocates `pages` pages for buffers.
pub fn buffers(pages: &mut Pages, count: u64) -> Result<Run, Message> {
    pages.alloc(count).map_err(|e| message!("{e}"))
}
