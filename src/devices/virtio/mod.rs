//! Virtio devices over MMIO (Virtual I/O Device specification 1.2, "VIRTIO").
//!
//! [`MmioDevice`] is the transport: registers, queues, interrupt, life cycle. A [`VirtioDevice`] lies behind it. A
//! device never owns a queue or guest memory: the transport lends it both, as [`Io`], for each piece of work.
//!
//! ```text
//!  vCPU exit ──► MmioDevice ──► VirtioDevice::{read_config, activate, reset}
//!  queue eventfd ─► device thread ─► MmioDevice ─► VirtioDevice::process_queue ─► files, sockets, taps
//!  device's own descriptors ───────────────────► VirtioDevice::process_event
//! ```

mod balloon;
pub mod block;
mod chain;
mod entropy;
mod mmio;
mod net;
mod pmem;
mod queue;
mod rate_limiter;
#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod transport_tests;
mod vsock;

use std::any::Any;
use std::os::fd::RawFd;

use serde::de::DeserializeOwned;

use crate::devices::Error;

pub use crate::sys::guest_memory::{Memory, region_bitmap};
pub use balloon::{Balloon, BalloonParams, BalloonState};
pub use chain::{Buffers, Chain, Ranges};
pub use entropy::{Entropy, EntropyState};
pub use mmio::{MmioDevice, TransportState};
pub use net::{Net, NetOverride, NetParams, NetState};
pub use pmem::{Pmem, PmemImage, PmemParams, PmemState};
pub use queue::{QueueState, VirtQueue};
pub use rate_limiter::{BucketLimit, RateLimiter, RateLimiterState, RateLimits};
pub use vsock::{Vsock, VsockParams, VsockState};

use mmio::Interrupt;

/// Device ids (VIRTIO 1.2, 5).
pub mod id {
    pub const NET: u32 = 1;
    pub const BLOCK: u32 = 2;
    pub const ENTROPY: u32 = 4;
    pub const BALLOON: u32 = 5;
    pub const VSOCK: u32 = 19;
    pub const PMEM: u32 = 27;
}

/// Decodes the state that `device` saved; bytes left over are an error.
fn decode<T: DeserializeOwned>(device: &'static str, state: &[u8]) -> Result<T, Error> {
    match postcard::take_from_bytes(state) {
        Ok((state, [])) => Ok(state),
        _ => Err(Error::State { device, what: "it cannot be decoded" }),
    }
}

/// A fault after which a device cannot go on: an error of the driver, or of the host. The transport answers with
/// `DEVICE_NEEDS_RESET` (VIRTIO 1.2, 2.1.2).
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    #[error("Queue {queue} is not usable: {source}")]
    Queue { queue: usize, source: virtio_queue::Error },
    #[error("A descriptor chain is not valid: {0}")]
    Chain(&'static str),
    #[error("Guest memory cannot be reached: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("Cannot {doing}: {source}")]
    Host { doing: &'static str, source: std::io::Error },
}

/// A descriptor of the device's own that the device thread waits for, edge-triggered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    pub fd: RawFd,
    /// Passed to [`VirtioDevice::process_event`].
    pub token: u32,
}

/// Resources that the transport lends a device whose driver has set `DRIVER_OK`.
pub struct Io<'a> {
    pub queues: &'a mut [VirtQueue],
    pub memory: &'a Memory,
    /// The features that the driver accepted.
    pub features: u64,
    interrupt: &'a Interrupt,
    config_generation: &'a mut u32,
    /// Chains that may still be popped before other devices get their turn.
    budget: u32,
}

/// Chains that a device handles before it gives way: a driver that never stops adding some must not block the device
/// thread, or a thread that pauses the machine, for ever.
const CHAINS_PER_TURN: u32 = 1024;

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

/// A virtio device behind its transport. The transport calls it with its lock held, so one call at a time: from vCPU
/// threads (`read_config`, `write_config`, `activate`, `reset`), from the device thread (`process_…`) and, while no
/// vCPU runs, from the main thread (`quiesce`, `save`).
pub trait VirtioDevice: Any + Send {
    /// The device id, see [`id`].
    fn device_type(&self) -> u32;

    /// The name in errors and metrics: the id in the config.
    fn name(&self) -> &str;

    /// The largest size of each queue: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Device-specific features offered; the transport adds its own.
    fn features(&self) -> u64;

    /// Reads the configuration space. `data` comes zeroed; the device leaves bytes outside of the space alone.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space. Most devices have no writable field.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Called when the driver is ready: for the first time, after a reset, or in a restored snapshot. Earlier events of
    /// the device's own are lost, so the device must look at its sources itself.
    fn activate(&mut self, _io: &mut Io<'_>) -> Result<(), Broken> {
        Ok(())
    }

    /// Called when the driver resets the device, which must not touch its buffers any more.
    fn reset(&mut self);

    /// Called when the driver has made chains available in `queue`, or may have: the device must look at all of them.
    fn process_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken>;

    /// Returns the descriptors to wait for. Called once, when the device thread starts.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// Called when a source is readable, or may be, while the driver is ready.
    fn process_event(&mut self, _token: u32, _io: &mut Io<'_>) -> Result<(), Broken> {
        Ok(())
    }

    /// Must end all requests in flight: until the next call nothing writes guest memory. Called while no vCPU runs.
    fn quiesce(&mut self, _io: &mut Io<'_>) -> Result<(), Broken> {
        Ok(())
    }

    /// Returns the device's own state, encoded; the transport saves queues and registers. Called after `quiesce`.
    fn save(&self) -> Result<Vec<u8>, postcard::Error>;

    /// Goes back to the snapshot that the guest was restored from: forgets everything since, buffers and connections
    /// included, and takes on `state`, which `save` wrote there. Host-side settings (paths, addresses) stay as the
    /// restore left them. Called after `quiesce`; the transport then restores queues and registers and calls
    /// `activate`.
    ///
    /// # Errors
    /// The state is not one of this device, or a host-side resource cannot be had again.
    fn rewind(&mut self, state: &[u8]) -> Result<(), Error>;

    /// Returns counters for the metrics file.
    fn metrics(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}
