//! A split virtqueue (VIRTIO 1.2, 2.7) and the eventfd by which the driver kicks it.

use std::io;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
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
}

impl VirtQueue {
    /// A queue of at most `max_size` entries, a power of two.
    pub fn new(max_size: u16) -> io::Result<Self> {
        let queue = Queue::new(max_size).map_err(io::Error::other)?;
        Ok(VirtQueue { queue, event: EventFd::new(EFD_NONBLOCK)? })
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
        self.queue.add_used(memory, head, len)
    }

    pub fn wants_interrupt(&mut self, memory: &Memory) -> Result<bool, Error> {
        self.queue.needs_notification(memory)
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
        Ok(())
    }
}
