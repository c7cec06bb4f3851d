//! Virtio devices.

mod balloon;
mod block;
mod block_faults;
mod net;
mod pmem;
mod virtio;
pub mod vsock;
