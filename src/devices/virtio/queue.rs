//! A split virtqueue (VIRTIO 1.2, 2.7) and the eventfd by which the driver kicks it.

use std::io;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Memory;

/// A queue's registers and positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    pub size: u16,
    pub ready: bool,
    pub event_idx: bool,
    pub desc_table: u64,
    pub avail_ring: u64,
    pub used_ring: u64,
    pub next_avail: u16,
    pub next_used: u16,
}

/// A queue.
#[derive(Debug)]
pub struct VirtQueue {
    pub(super) queue: Queue,
    event: EventFd,
    /// Chains given back since the driver was last asked whether it wants an interrupt.
    added: Wrapping<u16>,
}

/// Avail ring: flags, index, entries of 2 bytes, `used_event` (VIRTIO 1.2, 2.7.6).
const AVAIL_HEADER: u64 = 4;
/// Used ring: flags, index, entries of 8 bytes, `avail_event` (VIRTIO 1.2, 2.7.8).
const USED_HEADER: u64 = 4;
const NO_INTERRUPT: u16 = 1;

impl VirtQueue {
    /// A queue of at most `max_size` entries, a power of two.
    pub fn new(max_size: u16) -> io::Result<Self> {
        let queue = Queue::new(max_size).map_err(io::Error::other)?;
        Ok(VirtQueue { queue, event: EventFd::new(EFD_NONBLOCK)?, added: Wrapping(0) })
    }

    /// The descriptor by which the driver's kick arrives (an ioeventfd).
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// The next chain that the driver has made available.
    pub fn pop<'m>(&mut self, memory: &'m Memory) -> Result<Option<DescriptorChain<&'m Memory>>, Error> {
        Ok(self.queue.iter(memory)?.next())
    }

    /// Undoes the last `pop`.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Chains that wait to be popped.
    pub fn waiting(&self, memory: &Memory) -> Result<u16, Error> {
        let available = self.queue.avail_idx(memory, Ordering::Acquire)?;
        Ok(available.0.wrapping_sub(self.queue.next_avail()))
    }

    pub fn push(&mut self, memory: &Memory, head: u16, len: u32) -> Result<(), Error> {
        self.push_all(memory, &[(head, len)])
    }

    /// Gives chains back, heads and bytes written, so that the driver sees all of them or none.
    pub fn push_all(&mut self, memory: &Memory, used: &[(u16, u32)]) -> Result<(), Error> {
        let Some((&(last_head, last_len), others)) = used.split_last() else { return Ok(()) };
        let size = self.queue.size();
        let mut next = Wrapping(self.queue.next_used());
        if used.len() > usize::from(size) || others.iter().any(|&(head, _)| head >= size) {
            return Err(Error::InvalidDescriptorIndex);
        }
        for &(head, len) in others {
            let slot = USED_HEADER + 8 * u64::from(next.0 % size);
            let at = at(self.queue.used_ring(), slot)?;
            memory.write_obj(u64::from(head) | u64::from(len) << 32, at).map_err(Error::GuestMemory)?;
            next += 1;
        }
        // The index, which the driver looks at, is written with the last one.
        self.queue.set_next_used(next.0);
        self.added += used.len() as u16;
        self.queue.add_used(memory, last_head, last_len)
    }

    /// True if the driver wants an interrupt for the chains given back since the last call (VIRTIO 1.2, 2.7.7).
    pub fn wants_interrupt(&mut self, memory: &Memory) -> Result<bool, Error> {
        let added = std::mem::take(&mut self.added);
        // The index must be visible before the driver's wish is read: the driver does this the other way round.
        fence(Ordering::SeqCst);
        let avail = self.queue.avail_ring();
        let load = |offset| memory.load::<u16>(at(avail, offset)?, Ordering::Relaxed).map_err(Error::GuestMemory);
        if self.queue.event_idx_enabled() {
            let event = Wrapping(load(AVAIL_HEADER + 2 * u64::from(self.queue.size()))?);
            return Ok(Wrapping(self.queue.next_used()) - event - Wrapping(1) < added);
        }
        Ok(added.0 > 0 && load(0)? & NO_INTERRUPT == 0)
    }

    /// Asks the driver to notify the device of chains beyond the next `seen`, for a device that cannot do with those;
    /// returns whether there are more already.
    pub fn ask_for_more(&mut self, memory: &Memory, seen: u16) -> Result<bool, Error> {
        let known = Wrapping(self.queue.next_avail()) + Wrapping(seen);
        self.queue.enable_notification(memory)?;
        if self.queue.event_idx_enabled() {
            let offset = USED_HEADER + 8 * u64::from(self.queue.size());
            let at = at(self.queue.used_ring(), offset)?;
            memory.store(known.0, at, Ordering::Relaxed).map_err(Error::GuestMemory)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.queue.avail_idx(memory, Ordering::Acquire)? != known)
    }

    pub fn disable_notification(&mut self, memory: &Memory) -> Result<(), Error> {
        self.queue.disable_notification(memory)
    }

    /// Returns whether chains became available before notifications were on again.
    pub fn enable_notification(&mut self, memory: &Memory) -> Result<bool, Error> {
        self.queue.enable_notification(memory)
    }

    pub(super) fn save(&self) -> QueueState {
        let state = self.queue.state();
        QueueState {
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
            next_avail: state.next_avail,
            next_used: state.next_used,
        }
    }

    /// Takes over saved registers and positions; sizes and alignments are checked.
    pub(super) fn restore(&mut self, state: &QueueState) -> Result<(), Error> {
        let state = virtio_queue::QueueState {
            max_size: self.queue.max_size(),
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        };
        self.queue = Queue::try_from(state)?;
        self.added = Wrapping(0);
        Ok(())
    }
}

fn at(ring: u64, offset: u64) -> Result<GuestAddress, Error> {
    ring.checked_add(offset).map(GuestAddress).ok_or(Error::AddressOverflow)
}
