//! A driver for tests: it drives a device through the real transport and real guest memory.

use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};

use super::{Memory, MmioDevice, VirtioDevice, region_bitmap};
use crate::devices::BusDevice;

/// Entries of the queue.
pub const SIZE: u16 = 64;
/// Guest memory. The queue takes the first 16 KiB.
pub const RAM: usize = 4 << 20;
/// The first address for buffers.
pub const BUFFERS: u64 = 0x1_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

/// A buffer: address, length, whether the device writes it.
pub type Buffer = (u64, u32, bool);

pub fn memory() -> Memory {
    let builder = vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(RAM, region_bitmap(RAM));
    let region: MmapRegion<_> = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).build().unwrap();
    Memory::from_regions(vec![GuestRegionMmap::new(region, GuestAddress(0)).unwrap()]).unwrap()
}

/// A device with one queue, its driver, and guest memory.
pub struct Driver {
    pub device: MmioDevice,
    pub memory: Memory,
    available: u16,
    used: u16,
    next_descriptor: u16,
}

impl Driver {
    /// Starts the device with all the features it has.
    pub fn start(device: impl VirtioDevice) -> Self {
        let memory = memory();
        let device = MmioDevice::new(Box::new(device), memory.clone()).unwrap();
        device.go_on();
        let mut driver = Driver { device, memory, available: 0, used: 0, next_descriptor: 0 };
        driver.set_up();
        driver
    }

    /// A device that takes over another one's saved state and memory; and the number of chains it was given.
    pub fn take_over(self, device: impl VirtioDevice) -> Self {
        let (state, _) = self.device.save().unwrap();
        let device = MmioDevice::new(Box::new(device), self.memory.clone()).unwrap();
        device.restore(&state).unwrap();
        device.go_on();
        device.look_at_all();
        Driver { device, ..self }
    }

    pub fn write_register(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    pub fn read_register(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn features(&self) -> u64 {
        let half = |sel| {
            self.write_register(0x14, sel);
            u64::from(self.read_register(0x10))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device and starts it again (VIRTIO 1.2, 3.1.1), without EVENT_IDX, so that every kick counts.
    pub fn set_up(&mut self) {
        self.write_register(0x70, 0);
        (self.available, self.used, self.next_descriptor) = (0, 0, 0);
        self.memory.write_slice(&[0; 0x3000], GuestAddress(DESCRIPTORS)).unwrap();
        self.write_register(0x70, 1);
        self.write_register(0x70, 3);
        let features = self.features() & !(1 << 29);
        for half in 0..2 {
            self.write_register(0x24, half);
            self.write_register(0x20, (features >> (32 * half)) as u32);
        }
        self.write_register(0x70, 11);
        let queue = [(0x38, u64::from(SIZE)), (0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED), (0x44, 1)];
        queue.into_iter().for_each(|(register, value)| self.write_register(register, value as u32));
        self.write_register(0x70, 15);
        assert_eq!(self.read_register(0x70), 15);
    }

    /// Makes a chain available; its head.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (index, &(address, len, write)) in buffers.iter().enumerate() {
            let next = (self.next_descriptor + 1) % SIZE;
            let more = index + 1 < buffers.len();
            let flags = u16::from(more) | u16::from(write) << 1;
            let at = DESCRIPTORS + 16 * u64::from(self.next_descriptor);
            self.memory.write_obj(address, GuestAddress(at)).unwrap();
            self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
            self.next_descriptor = next;
        }
        let entry = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
        head
    }

    pub fn kick(&self) {
        self.device.queue_kicked(0);
    }

    /// The next chain that came back: its head, and how many bytes were written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() == self.used {
            return None;
        }
        let at = USED + 4 + 8 * u64::from(self.used % SIZE);
        self.used = self.used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        Some((head as u16, self.memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    /// Waits for the next chain as the device thread does: by looking at the device's sources.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            if let Some(used) = self.used() {
                return used;
            }
            assert!(std::time::Instant::now() < deadline, "no chain comes back");
            self.device.look_at_all();
        }
    }

    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }
}
