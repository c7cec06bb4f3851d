//! Reads lent memory: several RDMA reads under way at once, into registered memory, completed in order.

use std::io;
use std::net::IpAddr;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use rdma_mummy_sys::{ibv_access_flags, ibv_qp_attr_mask as Mask, ibv_qp_state, ibv_sge, ibv_wc_status};
use sideway::ibverbs::AccessFlags;
use sideway::ibverbs::memory_region::MemoryRegion;
use sideway::ibverbs::protection_domain::ProtectionDomain;

use super::connection::{accept, new_sequence, queue_pair};
use super::port::Port;
use super::queue_pair::{Channel, Pair, Queue, told};
use crate::backends::cold::wire::{Attached, Endpoint};
use crate::sys::mapping::Buffer;

/// A packet that is not acknowledged within 4.096 µs · 2^16 (0.27 s) is sent again, `RETRIES` times; then the
/// connection is lost. (Soft-RoCE takes 7 for ever.)
const ACKNOWLEDGE_TIMEOUT: u8 = 16;
const RETRIES: u8 = 6;

/// Registered memory that reads go to.
struct Slots {
    /// Dropped before the memory that it registers.
    region: Arc<MemoryRegion>,
    /// Start of the memory.
    base: *mut u8,
    _memory: Buffer,
    /// Bytes of one slot.
    len: usize,
    count: usize,
}

// SAFETY: the address is of memory that the object owns.
unsafe impl Send for Slots {}
// SAFETY: as above; only `Reader::bytes` hands out references to the memory.
unsafe impl Sync for Slots {}

/// The outcome of waiting for a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The oldest read is complete.
    Read,
    /// The other descriptor is readable, or at its end.
    Other,
    /// The time was over first.
    Neither,
}

/// A connection to lent memory.
pub struct Reader {
    /// The queue pair, with the memory that its reads go to.
    pair: Pair<Option<Slots>>,
    queue: Arc<Queue>,
    domain: Arc<ProtectionDomain>,
    port: Port,
    sequence: u32,
    depth: usize,
    /// The lent memory, once it is known.
    lent: Option<Attached>,
    /// Counts of reads begun, complete, and with a free slot again: `freed <= complete <= begun`.
    begun: u64,
    complete: u64,
    freed: u64,
}

impl Reader {
    /// A reader that is not connected yet, for up to `depth` concurrent reads.
    pub fn new(port: &Port, depth: usize) -> io::Result<Reader> {
        let domain = port.context.alloc_pd().map_err(|error| told("make a protection domain", &error))?;
        let queue = Arc::new(Queue::told_by(Channel::new(&port.context)?, depth as u32)?);
        let pair = queue_pair(&domain, &queue, port, ibv_access_flags(0), depth as u32, None)?;
        let port = port.clone();
        let sequence = new_sequence()?;
        Ok(Reader { pair, queue, domain, port, sequence, depth, lent: None, begun: 0, complete: 0, freed: 0 })
    }

    /// This end's endpoint, for the lender.
    pub fn endpoint(&self) -> Endpoint {
        let mtu = self.port.mtu;
        let reads = self.port.makes;
        Endpoint { queue_pair: self.pair.number(), sequence: self.sequence, mtu, reads }
    }

    /// Connects to the lender at `address`.
    pub fn connect(&mut self, address: IpAddr, lent: Attached) -> io::Result<()> {
        accept(&mut self.pair, &self.port, address, lent.endpoint)?;
        let reads = self.port.makes.min(lent.endpoint.reads);
        let sequence = self.sequence;
        self.pair.modify("start a queue pair", |set| {
            (set.qp_state, set.sq_psn, set.max_rd_atomic) = (ibv_qp_state::IBV_QPS_RTS, sequence, reads);
            (set.timeout, set.retry_cnt, set.rnr_retry) = (ACKNOWLEDGE_TIMEOUT, RETRIES, RETRIES);
            let patience = Mask::IBV_QP_TIMEOUT | Mask::IBV_QP_RETRY_CNT | Mask::IBV_QP_RNR_RETRY;
            Mask::IBV_QP_STATE | Mask::IBV_QP_SQ_PSN | Mask::IBV_QP_MAX_QP_RD_ATOMIC | patience
        })?;
        self.lent = Some(lent);
        Ok(())
    }

    /// Registers memory for `count` reads of up to `len` bytes each, or for as many as may be under way. Returns the
    /// number.
    ///
    /// # Errors
    /// Reads are under way; the limit for locked memory.
    pub fn prepare(&mut self, count: usize, len: usize) -> io::Result<usize> {
        if self.freed != self.begun {
            return Err(io::Error::other("earlier reads are still under way"));
        }
        let count = count.clamp(1, self.depth);
        if let Some(slots) = self.pair.as_ref().filter(|slots| slots.count >= count && slots.len >= len) {
            return Ok(slots.count);
        }
        // The old slots are freed first: both together might exceed the limit.
        *self.pair = None;
        let mut memory = Buffer::new(count * len)?;
        let base = memory.bytes_mut().as_mut_ptr();
        // SAFETY: the memory outlives its region, which outlives the reads into it (see `Pair`).
        let region = unsafe { self.domain.reg_mr(base as usize, count * len, AccessFlags::LocalWrite) };
        let doing = "register memory with the device (RLIMIT_MEMLOCK limits that without CAP_IPC_LOCK)";
        let region = region.map_err(|error| told(doing, &error))?;
        *self.pair = Some(Slots { region, base, _memory: memory, len, count });
        Ok(count)
    }

    /// Begins to read `range` of the lent memory.
    ///
    /// # Errors
    /// No free slot; a range that is longer than one or lies outside; errors of the driver.
    pub fn begin(&mut self, range: &Range<u64>) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        let (Some(slots), Some(lent)) = (&*self.pair, &self.lent) else {
            return Err(io::Error::other("nothing is lent"));
        };
        let is_free = self.begun - self.freed < slots.count as u64;
        if !is_free || len == 0 || len > slots.len as u64 || range.end > lent.len {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let at = (self.begun % slots.count as u64) as usize * slots.len;
        let to = slots.base as u64 + at as u64;
        let lkey = slots.region.lkey();
        let to = ibv_sge { addr: to, length: len as u32, lkey };
        // SAFETY: the slot is registered, as long as the range, and not otherwise used until the read is complete and
        // the slot is freed.
        unsafe { self.pair.read(self.begun, lent.key, lent.address + range.start, to)? };
        self.begun += 1;
        Ok(())
    }

    /// Waits until the oldest read is complete, `other` is readable, or the time is over.
    ///
    /// # Errors
    /// A read failed: the connection cannot be used any more.
    pub fn wait(&mut self, other: BorrowedFd<'_>, time: Duration) -> io::Result<Waited> {
        if self.is_complete()? {
            return Ok(Waited::Read);
        }
        self.queue.request()?;
        // Reads may have completed before the device was asked to notify.
        if self.is_complete()? {
            return Ok(Waited::Read);
        }
        let poll_in = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // -1 is no descriptor (poll(2)).
        let channel = self.queue.descriptor().map_or(-1, |channel| channel.as_raw_fd());
        let mut fds = [poll_in(channel), poll_in(other.as_raw_fd())];
        let millis = time.as_millis().clamp(1, 60_000) as libc::c_int;
        // SAFETY: `fds` is an array of two valid pollfds; both descriptors are open while their owners are borrowed.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, millis) } < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(Waited::Neither) } else { Err(error) };
        }
        self.queue.take_event();
        if self.is_complete()? {
            return Ok(Waited::Read);
        }
        Ok(if fds[1].revents != 0 { Waited::Other } else { Waited::Neither })
    }

    /// Returns whether the oldest read is complete.
    fn is_complete(&mut self) -> io::Result<bool> {
        if self.complete > self.freed {
            return Ok(true);
        }
        while let Some((id, status)) = self.queue.poll()? {
            match (status, id) {
                (ibv_wc_status::IBV_WC_SUCCESS, id) if id == self.complete => self.complete += 1,
                (ibv_wc_status::IBV_WC_SUCCESS, id) => {
                    return Err(io::Error::other(format!("read {id} completed before read {}", self.complete)));
                }
                (status, _) => return Err(io::Error::other(failure(status))),
            }
        }
        Ok(self.complete > self.freed)
    }

    /// The first `len` bytes of the oldest complete read; `None` if there is none, or the slots are shorter.
    pub fn bytes(&self, len: usize) -> Option<&[u8]> {
        let slots = self.pair.as_ref().filter(|slots| self.complete > self.freed && len <= slots.len)?;
        let at = (self.freed % slots.count as u64) as usize * slots.len;
        // SAFETY: the slot lies within the memory; its read is complete, so that the device does not write to it until
        // it is freed, which needs `self` exclusively. The other slots, which it writes to, are not part of the slice.
        Some(unsafe { std::slice::from_raw_parts(slots.base.add(at), len) })
    }

    /// Frees the slot of the oldest complete read.
    pub fn free(&mut self) {
        self.freed = self.complete.min(self.freed + 1);
    }
}

/// The reason for a failed read (the status of a work completion).
fn failure(status: u32) -> String {
    match status {
        ibv_wc_status::IBV_WC_RETRY_EXC_ERR => "its device does not answer reads any more".to_string(),
        ibv_wc_status::IBV_WC_REM_ACCESS_ERR => "its device does not permit the read".to_string(),
        ibv_wc_status::IBV_WC_REM_INV_REQ_ERR => "its device does not understand the read".to_string(),
        ibv_wc_status::IBV_WC_REM_OP_ERR => "its device could not carry out the read".to_string(),
        ibv_wc_status::IBV_WC_LOC_PROT_ERR => "the device of this host may not write to the memory for it".to_string(),
        status => format!("a read failed with status {status} of a work completion"),
    }
}
