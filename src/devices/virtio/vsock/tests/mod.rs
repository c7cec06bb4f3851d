//! The device behind its real transport, and a driver for it.

mod hostile;
mod protocol;
mod reset;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};

use super::connection::BUF_ALLOC;
use super::header::{self, HOST_CID, Header, TYPE_STREAM, op, shut};
use super::*;
use crate::devices::BusDevice;
use crate::devices::virtio::MmioDevice;
use crate::sys::guest_memory::{Memory, region_bitmap};

const RAM: usize = 8 << 20;
const CID: u32 = 7;
const SIZE: u16 = 64;
/// Queue `q` has its descriptors, driver area and device area in these pages.
const QUEUES: u64 = 0x10_000;
/// Receive buffers, a page each, and the buffers of packets to send.
const RX_AT: u64 = 0x100_000;
const TX_AT: u64 = 0x200_000;
const EVENT_AT: u64 = 0x50_000;

fn memory() -> Memory {
    let builder = vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(RAM, region_bitmap(RAM));
    let region: MmapRegion<_> = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).build().unwrap();
    Memory::from_regions(vec![GuestRegionMmap::new(region, GuestAddress(0)).unwrap()]).unwrap()
}

/// A driver, with one buffer per descriptor.
struct Driver {
    device: MmioDevice,
    memory: Memory,
    added: [u16; 3],
    used: [u16; 3],
    dir: TempDir,
}

impl Driver {
    fn new(params: impl FnOnce(PathBuf) -> VsockParams) -> Driver {
        let dir = tempfile::tempdir().unwrap();
        let memory = memory();
        let vsock = Vsock::new(params(dir.path().join("v"))).unwrap();
        let device = MmioDevice::new(Box::new(vsock), memory.clone()).unwrap();
        device.go_on();
        let driver = Driver { device, memory, added: [0; 3], used: [0; 3], dir };
        driver.start();
        driver
    }

    fn booted() -> Driver {
        Driver::new(|path| VsockParams::new(CID, path))
    }

    fn start(&self) {
        self.start_with(0);
    }

    /// Starts with these of the features 0 to 31.
    fn start_with(&self, features: u32) {
        for (register, value) in [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 0), (0x20, features), (0x24, 1), (0x20, 1)] {
            self.set(register, value);
        }
        self.set(0x70, 11);
        for queue in 0..3 {
            let at = (QUEUES + u64::from(queue) * 0x10_000) as u32;
            for (register, value) in
                [(0x30, queue), (0x38, SIZE.into()), (0x80, at), (0x90, at + 0x1000), (0xa0, at + 0x2000), (0x44, 1)]
            {
                self.set(register, value);
            }
        }
        self.set(0x70, 15);
    }

    fn set(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(0x70, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn at(queue: usize, area: u64) -> u64 {
        QUEUES + queue as u64 * 0x10_000 + area * 0x1000
    }

    /// Makes one buffer available.
    fn add(&mut self, queue: usize, at: u64, len: usize, writable: bool) {
        let index = self.added[queue] % SIZE;
        let descriptor = GuestAddress(Driver::at(queue, 0) + 16 * u64::from(index));
        let words = (at, len as u32, if writable { 2u16 } else { 0 }, 0u16);
        self.memory.write_obj(words.0, descriptor).unwrap();
        self.memory.write_obj(words.1, GuestAddress(descriptor.0 + 8)).unwrap();
        self.memory.write_obj(words.2, GuestAddress(descriptor.0 + 12)).unwrap();
        self.memory.write_obj(words.3, GuestAddress(descriptor.0 + 14)).unwrap();
        let ring = Driver::at(queue, 1);
        self.memory.write_obj(index, GuestAddress(ring + 4 + 2 * u64::from(index))).unwrap();
        self.added[queue] = self.added[queue].wrapping_add(1);
        self.memory.write_obj(self.added[queue], GuestAddress(ring + 2)).unwrap();
    }

    /// Chains of a queue that the device has.
    fn outstanding(&self, queue: usize) -> u16 {
        self.added[queue].wrapping_sub(self.used_of(queue))
    }

    /// Gives `count` receive buffers of a page, or as many as the queue has room for.
    fn give(&mut self, count: u16) {
        for _ in 0..count.min(SIZE.saturating_sub(self.outstanding(RX))) {
            let at = RX_AT + u64::from(self.added[RX] % SIZE) * 4096;
            self.add(RX, at, 4096, true);
        }
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..header };
        let at = TX_AT + u64::from(self.added[TX] % SIZE) * 0x1_1000;
        self.memory.write_slice(&header.to_bytes(), GuestAddress(at)).unwrap();
        self.memory.write_slice(data, GuestAddress(at + header::LEN as u64)).unwrap();
        self.add(TX, at, header::LEN + data.len(), false);
        self.run();
    }

    /// Runs the device until it has nothing to do.
    fn run(&self) {
        for _ in 0..8 {
            self.device.look_at_all();
        }
    }

    /// The next packet: header and payload.
    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        self.run();
        let ring = Driver::at(RX, 2);
        if self.memory.read_obj::<u16>(GuestAddress(ring + 2)).unwrap() == self.used[RX] {
            return None;
        }
        let element = ring + 4 + 8 * u64::from(self.used[RX] % SIZE);
        self.used[RX] = self.used[RX].wrapping_add(1);
        let [id, len]: [u32; 2] = self.memory.read_obj(GuestAddress(element)).unwrap();
        let at = RX_AT + u64::from(id) * 4096;
        let mut bytes = [0; header::LEN];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let header = Header::from_bytes(&bytes);
        assert_eq!(len, header::LEN as u32 + header.len);
        let mut data = vec![0; header.len as usize];
        self.memory.read_slice(&mut data, GuestAddress(at + header::LEN as u64)).unwrap();
        Some((header, data))
    }

    /// The operation of the next packet, which must be for `guest` from `host`.
    fn next_op(&mut self, host: u32, guest: u32) -> Option<u16> {
        let (header, _) = self.next()?;
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, u64::from(CID)));
        assert_eq!((header.src_port, header.dst_port), (host, guest));
        Some(header.op)
    }

    fn used_of(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(Driver::at(queue, 2) + 2)).unwrap()
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    /// A connection that the guest made from port 9 to port 80, and the program's end of it.
    fn connected(&mut self, buf_alloc: u32) -> UnixStream {
        let listener = self.listen(80);
        self.give(32);
        self.send(Header { buf_alloc, ..packet(80, 9, op::REQUEST) }, &[]);
        let (program, _) = listener.accept().unwrap();
        assert_eq!(self.next_op(80, 9), Some(op::RESPONSE));
        program.set_nonblocking(true).unwrap();
        program
    }

    fn count(&self, name: &str) -> u64 {
        self.device.metrics()[name].as_u64().unwrap()
    }
}

/// A packet from the guest's port to the host's, with credit.
fn packet(host: u32, guest: u32, operation: u16) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        kind: TYPE_STREAM,
        op: operation,
        buf_alloc: 65536,
        ..Header::default()
    }
}

fn shutdown(flags: u32) -> Header {
    Header { flags, ..packet(80, 9, op::SHUTDOWN) }
}
