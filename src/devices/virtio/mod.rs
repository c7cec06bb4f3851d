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
mod broken;
mod chain;
mod device;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod doors;
mod entropy;
mod interrupt;
mod io;
mod mmio;
mod net;
mod pmem;
mod queue;
mod rate_limiter;
mod retired;
#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;
#[cfg(test)]
mod transport_tests;
mod vsock;

pub use crate::sys::guest_memory::{Memory, region_bitmap};
pub use balloon::{Balloon, BalloonParams, BalloonState};
pub use broken::Broken;
pub use chain::{Buffers, Chain, Ranges};
pub use device::{Source, VirtioDevice, id};
pub use entropy::{Entropy, EntropyState};
pub use io::Io;
pub use mmio::{MmioDevice, TransportState};
pub use net::{Net, NetOverride, NetParams, NetState};
pub use pmem::{Pmem, PmemImage, PmemParams, PmemState};
pub use queue::{QueueState, VirtQueue};
pub use rate_limiter::{BucketLimit, RateLimiter, RateLimiterState, RateLimits};
pub use vsock::{Vsock, VsockParams, VsockState};
