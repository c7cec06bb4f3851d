//! Virtio devices.

mod balloon;
mod block;
mod block_faults;
pub mod net;
mod pmem;
mod virtio;
pub mod vsock;
