//! Fuzz doors of the virtio devices (`docs/fuzzing.md`): a driver that does what the input says, behind the real
//! transport, and a host side that does so too.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;

use arbitrary::Unstructured;
use vm_memory::{Bytes, GuestAddress};

use super::block::{Block, BlockParams, Engine};
use super::testing::{BUFFERS, RAM, memory};
use super::{
    Balloon, BalloonParams, BucketLimit, Entropy, Memory, MmioDevice, Net, NetParams, Pmem, PmemParams, RateLimits,
    VirtioDevice, Vsock, VsockParams,
};
use crate::devices::BusDevice;
use crate::snapshot::doors::{OwnDir, file_of};
use crate::snapshot::{Extent, Gfn, PAGE_SIZE};
use crate::sys::guest_memory::{Outcome, ReleasePages};

/// Entries of each queue.
const SIZE: u16 = 16;
/// Queue `n` has its descriptors, its driver area and its device area in the pages from here on.
const QUEUES: u64 = 0x1000;
const QUEUE_STEP: u64 = 0x3000;
/// The most acts of one input: an input is small, and ends.
const ACTS: usize = 256;
/// Bytes of the images of drives and pmem devices.
const IMAGE: usize = 64 << 10;

type Result<T> = arbitrary::Result<T>;

/// A driver, and what it has made available.
struct Driver<'a, 'd> {
    device: MmioDevice,
    memory: Memory,
    input: &'a mut Unstructured<'d>,
    available: [u16; 8],
    next_descriptor: [u16; 8],
    next_buffer: u64,
    queues: usize,
    /// The features 0 to 31 that the driver may accept.
    known: u32,
}

impl<'a, 'd> Driver<'a, 'd> {
    fn new(device: impl VirtioDevice, input: &'a mut Unstructured<'d>) -> Option<Self> {
        Driver::knowing(u32::MAX, device, input)
    }

    fn knowing(known: u32, device: impl VirtioDevice, input: &'a mut Unstructured<'d>) -> Option<Self> {
        let memory = memory();
        let device = MmioDevice::new(Box::new(device), memory.clone()).ok()?;
        device.go_on();
        let queues = device.queue_count();
        let available = [0; 8];
        let next_descriptor = available;
        let next_buffer = BUFFERS;
        let mut driver = Driver { device, memory, input, available, next_descriptor, next_buffer, queues, known };
        driver.set_up(u32::MAX);
        Some(driver)
    }

    fn write(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    fn read(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        // A driver cannot write outside of memory either.
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    /// Goes through VIRTIO 1.2, 3.1.1, with the offered features that `wanted` has.
    fn set_up(&mut self, wanted: u32) {
        self.write(0x70, 0);
        self.available = [0; 8];
        self.next_descriptor = [0; 8];
        self.put(QUEUES, &vec![0; (QUEUE_STEP * self.queues as u64) as usize]);
        self.write(0x70, 1);
        self.write(0x70, 3);
        for (half, wanted) in [(0, wanted & self.known), (1, u32::MAX)] {
            self.write(0x14, half);
            let features = self.read(0x10) & wanted;
            self.write(0x24, half);
            self.write(0x20, features);
        }
        self.write(0x70, 11);
        for queue in 0..self.queues as u32 {
            let at = (QUEUES + QUEUE_STEP * u64::from(queue)) as u32;
            let areas = [(0x30, queue), (0x38, SIZE.into()), (0x80, at), (0x90, at + 0x1000), (0xa0, at + 0x2000)];
            areas.into_iter().chain([(0x44, 1)]).for_each(|(register, value)| self.write(register, value));
        }
        self.write(0x70, 15);
    }

    fn descriptor(&self, queue: usize, index: u16, words: (u64, u32, u16, u16)) {
        let at = QUEUES + QUEUE_STEP * queue as u64 + 16 * u64::from(index % SIZE);
        let (address, len, flags, next) = words;
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &[flags.to_le_bytes(), next.to_le_bytes()].concat());
    }

    fn make_available(&mut self, queue: usize, head: u16, count: u16) {
        let ring = QUEUES + QUEUE_STEP * queue as u64 + 0x1000;
        self.put(ring + 4 + 2 * u64::from(self.available[queue] % SIZE), &head.to_le_bytes());
        self.available[queue] = self.available[queue].wrapping_add(count);
        self.put(ring + 2, &self.available[queue].to_le_bytes());
    }

    /// A chain as a driver makes it: up to four buffers, those that the device reads with bytes of the input.
    fn chain(&mut self, queue: usize) -> Result<()> {
        let head = self.next_descriptor[queue];
        let count = self.input.int_in_range(1..=4)?;
        for index in 0..count {
            let shape: u8 = self.input.arbitrary()?;
            let is_written = shape & 1 == 1;
            let len = match shape >> 1 & 3 {
                0 => u32::from(self.input.arbitrary::<u8>()?),
                1 => 4096,
                2 => u32::from(self.input.arbitrary::<u16>()?),
                _ => u32::from(shape >> 3),
            };
            if !is_written {
                let bytes = self.input.bytes((len as usize).min(self.input.len()))?;
                self.put(self.next_buffer, bytes);
            }
            let at = self.next_descriptor[queue];
            let next = (at + 1) % SIZE;
            let flags = u16::from(index + 1 < count) | u16::from(is_written) << 1;
            self.descriptor(queue, at, (self.next_buffer, len, flags, next));
            self.next_descriptor[queue] = next;
            self.next_buffer += u64::from(len.next_multiple_of(16));
            if self.next_buffer + 0x1_0000 > RAM as u64 {
                self.next_buffer = BUFFERS;
            }
        }
        self.make_available(queue, head, 1);
        Ok(())
    }

    /// One act of the driver, or by `outside` one of the host side.
    fn act(&mut self, outside: &mut dyn FnMut(&mut Unstructured) -> Result<()>) -> Result<()> {
        let what: u8 = self.input.arbitrary()?;
        let queue = usize::from(what >> 4) % self.queues.max(1);
        match what & 15 {
            0..4 => {
                self.chain(queue)?;
                self.device.queue_kicked(queue);
            }
            4 => self.device.queue_kicked(queue),
            5 => {
                let words =
                    (self.address()?, self.input.arbitrary()?, self.input.arbitrary()?, self.input.arbitrary()?);
                let index = self.input.arbitrary()?;
                self.descriptor(queue, index, words);
            }
            6 => {
                let head = self.input.arbitrary()?;
                let count = self.input.arbitrary::<u8>()?;
                self.make_available(queue, head, count.into());
            }
            7 => {
                let register = u64::from(self.input.arbitrary::<u8>()?) * 4;
                let value = self.input.arbitrary()?;
                self.write(register, value);
            }
            8 => {
                let at: u16 = self.input.arbitrary()?;
                let len = usize::from(what >> 4).min(self.input.len());
                let bytes = self.input.bytes(len)?;
                self.device.write(u64::from(at), bytes);
                self.device.read(u64::from(at), &mut [0; 8]);
            }
            9 => {
                let at = u64::from(self.input.arbitrary::<u32>()?) % RAM as u64;
                let len = usize::from(what >> 4).min(self.input.len());
                let bytes = self.input.bytes(len)?;
                self.put(at, bytes);
            }
            10 => self.device.look_at_all(),
            11 => {
                let wanted = self.input.arbitrary()?;
                self.set_up(wanted);
            }
            12 => self.save_and_rewind()?,
            13 => {
                self.device.quiesce();
                self.device.go_on();
                self.device.look_at_all();
            }
            _ => {
                outside(self.input)?;
                self.device.look_at_all();
            }
        }
        Ok(())
    }

    fn address(&mut self) -> Result<u64> {
        Ok(match self.input.arbitrary::<u8>()? {
            0..200 => u64::from(self.input.arbitrary::<u32>()?) % RAM as u64,
            200..240 => RAM as u64 - u64::from(self.input.arbitrary::<u16>()?),
            _ => self.input.arbitrary()?,
        })
    }

    /// The state of the device, with a byte of the input in it sometimes, is the state it goes back to. A device whose
    /// state was refused is not used any more, so its driver sets it up again with a good one.
    fn save_and_rewind(&mut self) -> Result<()> {
        self.device.quiesce();
        if let Ok((transport, device)) = self.device.save() {
            let mut forged = device.clone();
            let at: u8 = self.input.arbitrary()?;
            let with: u8 = self.input.arbitrary()?;
            if let Some(byte) = forged.get_mut(usize::from(at)) {
                *byte ^= with;
            }
            let _ = self.device.rewind(&transport, &forged);
            let _ = self.device.rewind(&transport, &device);
        }
        self.device.go_on();
        self.device.look_at_all();
        Ok(())
    }

    /// Does what the input says. Afterwards the device must live: a driver can reset it and start it.
    fn run(mut self, mut outside: impl FnMut(&mut Unstructured) -> Result<()>) {
        for _ in 0..ACTS {
            if self.input.is_empty() || self.act(&mut outside).is_err() {
                break;
            }
        }
        let _ = self.device.metrics();
        self.device.quiesce();
        assert!(self.device.save().is_ok(), "a device has no state to save");
        self.device.go_on();
        self.set_up(u32::MAX);
        assert_eq!(self.read(0x70), 15, "a device does not start after a reset");
    }
}

fn limits(input: &mut Unstructured) -> RateLimits {
    match input.arbitrary::<u8>() {
        Ok(size @ 240..) => {
            let bucket = BucketLimit { size: u64::from(size), one_time_burst: 1, refill_time_ms: 1 };
            RateLimits { bandwidth: Some(bucket), ops: Some(bucket) }
        }
        _ => RateLimits::default(),
    }
}

/// The entropy device.
pub fn entropy(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(entropy) = Entropy::new(limits(&mut input)) else { return };
    if let Some(driver) = Driver::new(entropy, &mut input) {
        driver.run(|_| Ok(()));
    }
}

/// Counts the pages of memory that the balloon gives back.
struct Releaser;

impl ReleasePages for Releaser {
    fn release(&mut self, pages: Extent) -> Outcome {
        assert!(pages.pages > 0, "nothing is given back");
        let ram = Extent { first: Gfn(0), pages: RAM as u64 / PAGE_SIZE };
        let released = ram.intersection(&pages).map_or(0, |part| part.pages);
        Outcome { released, outside: pages.pages - released, refused: 0 }
    }

    fn rewind(&mut self) {}
}

/// The balloon.
pub fn balloon(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let flags: u8 = input.arbitrary().unwrap_or_default();
    let params = BalloonParams {
        amount_mib: u32::from(flags >> 4),
        deflate_on_oom: flags & 1 == 0,
        stats_polling_interval_s: u16::from(flags & 2 == 0),
        free_page_hinting: flags & 4 == 0,
        free_page_reporting: flags & 8 == 0,
    };
    let Ok(balloon) = Balloon::new(params, Box::new(Releaser)) else { return };
    if let Some(driver) = Driver::new(balloon, &mut input) {
        driver.run(|_| Ok(()));
    }
}

/// A drive, with both engines.
pub fn block(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let flags: u8 = input.arbitrary().unwrap_or_default();
    let Ok((file, path)) = file_of(&[0x5a; IMAGE]) else { return };
    let params = BlockParams {
        id: "door".to_string(),
        path,
        read_only: flags & 1 == 1,
        writeback: flags & 2 == 0,
        engine: if flags & 0x1c == 0x1c { Engine::Async } else { Engine::Sync },
        is_root: false,
        partuuid: None,
    };
    let limits = limits(&mut input);
    let Ok(block) = Block::new(params, limits) else { return };
    if let Some(driver) = Driver::new(block, &mut input) {
        driver.run(|_| Ok(()));
    }
    assert_eq!(file.metadata().map_or(0, |metadata| metadata.len()), IMAGE as u64, "a guest changes a drive's size");
    assert!(flags & 1 == 0 || is_as_made(&file), "a guest writes to a read-only drive");
}

fn is_as_made(mut file: &File) -> bool {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).is_ok() && bytes.iter().all(|byte| *byte == 0x5a)
}

/// A pmem device.
pub fn pmem(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let limits = limits(&mut input);
    let Ok((_file, path)) = file_of(&[0; IMAGE]) else { return };
    let params = PmemParams { id: "door".to_string(), path, read_only: false, is_root: false, gpa: 4 << 30 };
    let Ok(pmem) = Pmem::new(params, limits) else { return };
    if let Some(driver) = Driver::new(pmem, &mut input) {
        driver.run(|_| Ok(()));
    }
}

/// A network interface. The other end of its tap sends frames of the input, and takes some.
pub fn net(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let limits = limits(&mut input);
    let Ok((wire, tap)) = UnixDatagram::pair() else { return };
    if wire.set_nonblocking(true).is_err() || tap.set_nonblocking(true).is_err() {
        return;
    }
    let mac = Some([6, 0, 0xac, 16, 0, 2]);
    let params = NetParams {
        id: "door".to_string(),
        tap: "door".to_string(),
        mac,
        mtu: Some(1400),
        rx_limits: limits,
        tx_limits: limits,
    };
    let Ok(net) = Net::over(params, tap.into()) else { return };
    // The kernel would have to take over the work that these leave to it, and a socket does not.
    let left_to_the_tap = 1 << 1 | 0xf << 7;
    let Some(driver) = Driver::knowing(!left_to_the_tap, net, &mut input) else { return };
    driver.run(|input| {
        let len = usize::from(input.arbitrary::<u16>()?).min(input.len());
        if len % 8 == 7 {
            let _ = wire.recv(&mut [0; 70_000]);
        } else {
            let _ = wire.send(input.bytes(len)?);
        }
        Ok(())
    });
}

/// Programs of the host that listen, connect, write, read and end.
struct Programs<'a> {
    socket: &'a Path,
    listener: UnixListener,
    streams: Vec<UnixStream>,
}

impl Programs<'_> {
    fn keep(&mut self, stream: UnixStream) {
        if stream.set_nonblocking(true).is_ok() && self.streams.len() < 64 {
            self.streams.push(stream);
        }
    }

    fn act(&mut self, input: &mut Unstructured) -> Result<()> {
        if let Ok((stream, _)) = self.listener.accept() {
            self.keep(stream);
        }
        let what: u8 = input.arbitrary()?;
        let which = usize::from(what) / 8 % self.streams.len().max(1);
        if what.is_multiple_of(8) {
            let Ok(mut stream) = UnixStream::connect(self.socket) else { return Ok(()) };
            let len = usize::from(what >> 3).min(input.len());
            let line = input.bytes(len)?;
            let _ = stream.write_all(if line.is_empty() { b"CONNECT 80\n" } else { line });
            self.keep(stream);
            return Ok(());
        }
        let Some(stream) = self.streams.get_mut(which) else { return Ok(()) };
        match what % 8 {
            1 | 2 => drop(stream.write(&vec![what; usize::from(input.arbitrary::<u16>()?)])),
            3 | 4 => drop(stream.read(&mut vec![0; 70_000])),
            5 => drop(stream.shutdown(std::net::Shutdown::Write)),
            6 => drop(stream.shutdown(std::net::Shutdown::Read)),
            _ => drop(self.streams.swap_remove(which)),
        }
        Ok(())
    }
}

/// The socket device.
pub fn vsock(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Some(dir) = OwnDir::new() else { return };
    let socket = dir.path().join("v");
    let Ok(listener) = UnixListener::bind(dir.path().join("v_80")) else { return };
    if listener.set_nonblocking(true).is_err() {
        return;
    }
    let Ok(vsock) = Vsock::new(VsockParams::new(7, socket.clone())) else { return };
    let mut programs = Programs { socket: &socket, listener, streams: Vec::new() };
    if let Some(driver) = Driver::new(vsock, &mut input) {
        driver.run(|input| programs.act(input));
    }
}
