//! `blk`: reads, writes and checks of virtio block devices.

use super::{Ctx, Reply};
use crate::alloc::address;
use crate::arch::trap;
use crate::virtio::{self, Buffer, Device, Queue};
use tvmm_guest::args::{Args, Key, Message, optional};
use tvmm_guest::digest::{Digest, mix2};
use tvmm_guest::text::Text;
use tvmm_guest::{PAGE_SIZE, message};

const BLOCK: u32 = 2;
const DISKS: usize = 4;
const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
const DEPTH_MAX: u64 = 64;
/// Header (16 bytes), status, and room for the range of a discard.
const CONTROL: u64 = 64;
const NOBODY: u16 = u16::MAX;

const FEATURE_RO: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_ZEROES: u64 = 1 << 14;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_ZEROES: u32 = 13;

pub const KEYS: &[Key] = &[
    optional("op"),
    optional("nth"),
    optional("sector"),
    optional("sectors"),
    optional("seed"),
    optional("chunk"),
    optional("segs"),
    optional("depth"),
    optional("rounds"),
    optional("irq"),
];

/// The devices, once they were found.
pub struct State {
    disks: [Option<(Device, Queue)>; DISKS],
}

impl State {
    pub const fn new() -> Self {
        Self { disks: [const { None }; DISKS] }
    }
}

/// The requested work.
#[derive(Clone, Copy)]
struct Job {
    sector: u64,
    sectors: u64,
    seed: u64,
    /// Sectors in a request.
    chunk: u64,
    /// Buffers that a request's data is cut into.
    segs: u64,
    /// Requests in flight.
    depth: u64,
    irq: bool,
}

/// The results.
#[derive(Default)]
struct Tally {
    requests: u64,
    failed: u64,
    unsupported: u64,
    /// Sectors that differ from what was written to them.
    bad: u64,
    /// Completions of no known request, or of the wrong length.
    strange: u64,
    interrupts: u64,
}

/// Memory that requests use: data for `depth` requests, then their headers.
#[derive(Clone, Copy)]
struct Memory {
    data: u64,
    control: u64,
}

/// `blk op=info|id|read|write|check|stress|flush|discard|zero nth=0 …`: `read` and `check` read, `check` and `stress`
/// compare with the data that `write` with the same seed has written. The digest of `read` is that of the bytes.
pub fn blk(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let nth = args.number_in("nth", 0..=DISKS as u64 - 1, 0)? as usize;
    let mut job = Job {
        sector: args.number("sector")?.unwrap_or(0),
        sectors: args.number_in("sectors", 0..=1 << 24, 8)?,
        seed: args.number("seed")?.unwrap_or(1),
        chunk: args.number_in("chunk", 1..=2048, 8)?,
        segs: args.number_in("segs", 1..=16, 1)?,
        depth: args.number_in("depth", 1..=DEPTH_MAX, 1)?,
        irq: args.number_in("irq", 0..=1, 0)? == 1,
    };
    let rounds = args.number_in("rounds", 1..=1 << 20, 1)?;
    if u64::from(QUEUE_SIZE) / (job.segs + 2) < job.depth {
        return Err(message!("depth={} requests of segs={} do not fit the queue", job.depth, job.segs));
    }
    find(ctx, nth)?;
    let data_bytes = job.depth * job.chunk * SECTOR;
    let count = data_bytes.div_ceil(PAGE_SIZE) + (job.depth * CONTROL).div_ceil(PAGE_SIZE);
    let run = virtio::buffers(&mut ctx.pages, count)?;
    let memory = Memory { data: address(run), control: address(run) + data_bytes.next_multiple_of(PAGE_SIZE) };
    let Some((device, queue)) = &mut ctx.blk.disks[nth] else { return Err(message!("no disk {nth}")) };
    let mut disk = Disk { device, queue, memory, slots: [NOBODY; QUEUE_SIZE as usize] };
    let kicks = disk.queue.kicks;
    let mut tally = Tally::default();
    let mut digest = Digest::new();
    let op = args.get("op").unwrap_or("info");
    let result = match op {
        "info" => Ok(()),
        "id" => return disk.id(),
        "read" => disk.transfer(job, TYPE_IN, &mut tally, &mut |_, bytes, _| digest.bytes(bytes)),
        "write" => disk.transfer(job, TYPE_OUT, &mut tally, &mut |_, _, _| {}),
        "check" => disk.check(job, &mut tally),
        "flush" => disk.single(TYPE_FLUSH, 0, 0, &mut tally),
        "discard" => disk.single(TYPE_DISCARD, job.sector, job.sectors, &mut tally),
        "zero" => disk.single(TYPE_ZEROES, job.sector, job.sectors, &mut tally),
        "stress" => (0..rounds).try_for_each(|_| {
            job.seed += 1;
            disk.transfer(job, TYPE_OUT, &mut tally, &mut |_, _, _| {})?;
            disk.check(job, &mut tally)
        }),
        other => Err(message!("no op '{}'", tvmm_guest::args::short(other))),
    };
    let keys = (disk.queue.kicks - kicks, disk.describe());
    // SAFETY: nothing is in flight, so the device has given everything back, and only this function knows the pages.
    // After an error requests may be in flight, and the pages are lost.
    result.and_then(|()| unsafe { ctx.pages.free(run) }.map_err(|e| message!("{e}")))?;
    let Tally { requests, failed, unsupported, bad, strange, interrupts } = tally;
    let (kicks, info) = keys;
    Ok(Reply::new(
        digest.finish(),
        format_args!(
            "requests={requests} failed={failed} unsupported={unsupported} bad={bad} strange={strange} kicks={kicks} \
             interrupts={interrupts} {}",
            info.as_str()
        ),
    ))
}

fn find(ctx: &mut Ctx, nth: usize) -> Result<(), Message> {
    if ctx.blk.disks[nth].is_none() {
        let features = FEATURE_RO | FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_ZEROES;
        let device = Device::find(BLOCK, nth as u32, features)?;
        let queue = device.queue(0, QUEUE_SIZE, &mut ctx.pages)?;
        device.start();
        ctx.blk.disks[nth] = Some((device, queue));
    }
    Ok(())
}

/// Word `index` of `sector` in the pattern of `write`.
fn pattern(seed: u64, sector: u64, index: u64) -> u64 {
    mix2(seed, sector * (SECTOR / 8) + index)
}

struct Disk<'a> {
    device: &'a Device,
    queue: &'a mut Queue,
    memory: Memory,
    /// The slot of the request of each head.
    slots: [u16; QUEUE_SIZE as usize],
}

impl Disk<'_> {
    fn describe(&self) -> Text<128> {
        let capacity = u64::from(self.device.config(0)) | u64::from(self.device.config(4)) << 32;
        let has = |feature| u8::from(self.device.has(feature));
        let (ro, flush, discard) = (has(FEATURE_RO), has(FEATURE_FLUSH), has(FEATURE_DISCARD));
        let changes = u8::from(self.device.acknowledge() & 2 != 0);
        Text::of(format_args!("capacity={capacity} ro={ro} flush={flush} discard={discard} changed={changes}"))
    }

    fn control(&self, slot: u64) -> u64 {
        self.memory.control + slot * CONTROL
    }

    fn set_header(&self, slot: u64, kind: u32, sector: u64) {
        let at = self.control(slot);
        // SAFETY: the slot's control block is in pages that this call owns.
        unsafe {
            (at as *mut [u32; 2]).write_volatile([kind, 0]);
            ((at + 8) as *mut u64).write_volatile(sector);
            ((at + 16) as *mut u8).write_volatile(0xff);
        }
    }

    fn status(&self, slot: u64) -> u8 {
        // SAFETY: as in `set_header`.
        unsafe { ((self.control(slot) + 16) as *const u8).read_volatile() }
    }

    fn words(&mut self, at: u64, sectors: u64) -> &mut [u64] {
        // SAFETY: data of a slot that is not in flight, in pages that this call owns.
        unsafe { core::slice::from_raw_parts_mut(at as *mut u64, (sectors * SECTOR / 8) as usize) }
    }

    fn add(&mut self, slot: u64, data: &[Buffer]) -> Result<(), Message> {
        let control = self.control(slot);
        let none = Buffer { at: 0, len: 0, write: false };
        let mut buffers = [none; 18];
        buffers[0] = Buffer { at: control, len: 16, write: false };
        buffers[1..=data.len()].copy_from_slice(data);
        buffers[data.len() + 1] = Buffer { at: control + 16, len: 1, write: true };
        let head = self.queue.add(&buffers[..data.len() + 2]).ok_or_else(|| message!("the queue is full"))?;
        self.slots[usize::from(head)] = slot as u16;
        Ok(())
    }

    /// Waits for a request; returns its slot and the number of bytes that the device reports as written.
    fn wait(&mut self, irq: bool, tally: &mut Tally) -> Result<(u64, u32), Message> {
        let mut polls = 0u64;
        loop {
            if let Some((head, len)) = self.queue.pop() {
                match core::mem::replace(&mut self.slots[usize::from(head)], NOBODY) {
                    NOBODY => tally.strange += 1,
                    slot => return Ok((u64::from(slot), len)),
                }
                continue;
            }
            if irq && polls > 0 {
                trap::halt();
                tally.interrupts += u64::from(self.device.acknowledge() != 0);
            } else if irq {
                self.queue.want_interrupt(true);
            }
            core::hint::spin_loop();
            polls += 1;
            if polls.is_multiple_of(1 << 20) && self.device.is_broken() {
                return Err(message!("the device needs a reset"));
            }
        }
    }

    fn count(&self, slot: u64, tally: &mut Tally) -> bool {
        tally.requests += 1;
        match self.status(slot) {
            0 => return true,
            1 => tally.failed += 1,
            2 => tally.unsupported += 1,
            _ => tally.strange += 1,
        }
        false
    }

    /// Reads or writes all sectors of the job, with up to `depth` requests in flight; calls `done` with each successful
    /// request's first sector, bytes, and sectors.
    fn transfer(
        &mut self,
        job: Job,
        kind: u32,
        tally: &mut Tally,
        done: &mut dyn FnMut(u64, &[u8], u64),
    ) -> Result<(), Message> {
        let end = job.sector + job.sectors;
        let mut next = job.sector;
        let mut first = [0u64; DEPTH_MAX as usize];
        let mut free: u64 = u64::MAX >> (64 - job.depth);
        let all = free;
        loop {
            let mut added = 0;
            while free != 0 && next < end {
                let slot = u64::from(free.trailing_zeros());
                let sectors = job.chunk.min(end - next);
                self.begin(job, slot, kind, next, sectors)?;
                (first[slot as usize], free) = (next, free & !(1 << slot));
                (next, added) = (next + sectors, added + 1);
            }
            self.queue.kick(added);
            if free == all {
                return Ok(());
            }
            let (slot, len) = self.wait(job.irq, tally)?;
            free |= 1 << slot;
            let sector = first[slot as usize];
            let sectors = job.chunk.min(end - sector);
            let data = if kind == TYPE_IN { sectors * SECTOR } else { 0 };
            if self.count(slot, tally) {
                tally.strange += u64::from(u64::from(len) != data + 1);
                let at = self.memory.data + slot * job.chunk * SECTOR;
                // SAFETY: the slot's data; the device has given it back.
                let bytes = unsafe { core::slice::from_raw_parts(at as *const u8, (sectors * SECTOR) as usize) };
                done(sector, bytes, sectors);
            }
        }
    }

    fn begin(&mut self, job: Job, slot: u64, kind: u32, sector: u64, sectors: u64) -> Result<(), Message> {
        let at = self.memory.data + slot * job.chunk * SECTOR;
        if kind == TYPE_OUT {
            for (index, word) in self.words(at, sectors).iter_mut().enumerate() {
                *word = pattern(job.seed, sector, index as u64);
            }
        }
        self.set_header(slot, kind, sector);
        let mut data = [Buffer { at, len: 0, write: kind == TYPE_IN }; 16];
        let bytes = sectors * SECTOR;
        let (mut offset, mut used) = (0, 0);
        while offset < bytes {
            let left = job.segs - used as u64;
            // Pieces of odd lengths: nothing says that a buffer is whole sectors.
            let len = if left == 1 { bytes - offset } else { ((bytes - offset) / left + 3).min(bytes - offset) };
            data[used] = Buffer { at: at + offset, len: len as u32, write: kind == TYPE_IN };
            (offset, used) = (offset + len, used + 1);
        }
        self.add(slot, &data[..used])
    }

    fn check(&mut self, job: Job, tally: &mut Tally) -> Result<(), Message> {
        let mut bad = 0;
        self.transfer(job, TYPE_IN, tally, &mut |sector, bytes, _| {
            for (words, sector) in bytes.chunks(SECTOR as usize).zip(sector..) {
                let words = words.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
                let same = words.zip(0..).all(|(word, index)| word == pattern(job.seed, sector, index));
                bad += u64::from(!same);
            }
        })?;
        tally.bad += bad;
        Ok(())
    }

    /// A request without data but, for discards, a range.
    fn single(&mut self, kind: u32, sector: u64, sectors: u64, tally: &mut Tally) -> Result<(), Message> {
        self.set_header(0, kind, 0);
        let range = self.control(0) + 32;
        // SAFETY: as in `set_header`.
        unsafe {
            (range as *mut u64).write_volatile(sector);
            ((range + 8) as *mut [u32; 2]).write_volatile([sectors as u32, 0]);
        }
        let data = [Buffer { at: range, len: 16, write: false }];
        self.add(0, if kind == TYPE_FLUSH { &[] } else { &data })?;
        self.queue.kick(1);
        let (slot, _) = self.wait(false, tally)?;
        self.count(slot, tally);
        Ok(())
    }

    fn id(&mut self) -> Result<Reply, Message> {
        self.set_header(0, TYPE_GET_ID, 0);
        self.add(0, &[Buffer { at: self.memory.data, len: 20, write: true }])?;
        self.queue.kick(1);
        self.wait(false, &mut Tally::default())?;
        // SAFETY: the device has given it back.
        let id = unsafe { core::slice::from_raw_parts(self.memory.data as *const u8, 20) };
        let len = id.iter().position(|&b| b == 0).unwrap_or(id.len());
        let mut digest = Digest::new();
        digest.bytes(id);
        Ok(Reply::new(digest.finish(), format_args!("id={} status={}", id[..len].escape_ascii(), self.status(0))))
    }
}
