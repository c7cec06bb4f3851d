//! The queues and the guest memory of a device, lent to it by the transport for a piece of work.

use super::broken::Broken;
use super::chain::{Chain, Ranges};
use super::interrupt::Interrupt;
use super::queue::VirtQueue;
use crate::sys::guest_memory::Memory;

/// Resources that the transport lends a device whose driver has set `DRIVER_OK`.
pub struct Io<'a> {
    pub queues: &'a mut [VirtQueue],
    pub memory: &'a Memory,
    /// The features that the driver accepted.
    pub features: u64,
    pub(super) interrupt: &'a Interrupt,
    pub(super) config_generation: &'a mut u32,
    /// Chains that may still be popped before other devices get their turn.
    pub(super) budget: u32,
}

/// Chains that a device handles before it gives way: a driver that never stops adding some must not block the device
/// thread, or a thread that pauses the machine, for ever.
pub(super) const CHAINS_PER_TURN: u32 = 1024;

impl<'a> Io<'a> {
    /// Takes the next chain that the driver has made available in `queue`. `None` when there is none, or when this turn
    /// is over: then the transport calls again.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain<'a>>, Broken> {
        let Some(left) = self.budget.checked_sub(1) else { return Ok(None) };
        self.budget = left;
        let failed = |source| Broken::Queue { queue, source };
        match self.queues[queue].pop(self.memory).map_err(failed)? {
            Some(chain) => Chain::parse(chain, self.memory).map(Some),
            None => Ok(None),
        }
    }

    /// As [`pop`](Self::pop), for chains that name memory but are not to be read or written.
    pub fn pop_ranges(&mut self, queue: usize) -> Result<Option<Ranges>, Broken> {
        let Some(left) = self.budget.checked_sub(1) else { return Ok(None) };
        self.budget = left;
        let chain = self.queues[queue].pop(self.memory).map_err(|source| Broken::Queue { queue, source })?;
        Ok(chain.map(Ranges::parse))
    }

    /// Counts the last chain as `chains` more, because it was that much more work.
    pub fn spend(&mut self, chains: u32) {
        self.budget = self.budget.saturating_sub(chains);
    }

    /// Gives a chain back with `len` bytes of it written.
    pub fn push(&mut self, queue: usize, head: u16, len: u32) -> Result<(), Broken> {
        self.queues[queue].push(self.memory, head, len).map_err(|source| Broken::Queue { queue, source })
    }

    /// Gives chains back, heads and bytes written, so that the driver sees all of them or none.
    pub fn push_all(&mut self, queue: usize, used: &[(u16, u32)]) -> Result<(), Broken> {
        self.queues[queue].push_all(self.memory, used).map_err(|source| Broken::Queue { queue, source })
    }

    /// Undoes the last [`pop`](Self::pop): the chain will be popped again.
    pub fn unpop(&mut self, queue: usize) {
        self.queues[queue].unpop();
    }

    /// Interrupts the driver if it wants an interrupt for the chains given back (VIRTIO 1.2, 2.7.7 and 2.7.10).
    pub fn signal(&mut self, queue: usize) -> Result<(), Broken> {
        let wanted = self.queues[queue].wants_interrupt(self.memory);
        if wanted.map_err(|source| Broken::Queue { queue, source })? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Tells the driver that the configuration space has changed.
    pub fn signal_config(&mut self) {
        *self.config_generation = self.config_generation.wrapping_add(1);
        self.interrupt.config_change();
    }

    /// True if the driver accepted `feature` (a bit number).
    pub fn has_feature(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Calls `work` until the queue is empty, with the driver's notifications off in between (VIRTIO 1.2, 2.7.10).
    pub fn drain(&mut self, queue: usize, mut work: impl FnMut(&mut Self) -> Result<(), Broken>) -> Result<(), Broken> {
        self.drain_while(queue, |io| work(io).map(|()| true))
    }

    /// [`drain`](Self::drain) for a device that may have to leave chains in the queue: it stops when `work` returns
    /// false. The driver's notifications then stay off; the device looks at the queue by itself when it can go on.
    pub fn drain_while(
        &mut self,
        queue: usize,
        mut work: impl FnMut(&mut Self) -> Result<bool, Broken>,
    ) -> Result<(), Broken> {
        loop {
            let failed = |source| Broken::Queue { queue, source };
            self.queues[queue].disable_notification(self.memory).map_err(failed)?;
            if !work(self)? {
                return Ok(());
            }
            let more = self.queues[queue].enable_notification(self.memory).map_err(failed)?;
            if !more || self.budget == 0 {
                return Ok(());
            }
        }
    }
}
