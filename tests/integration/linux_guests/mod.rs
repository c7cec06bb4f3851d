//! Linux guests, where the host can run them.

pub mod agent;
mod linux;
mod linux_block;
mod linux_guest;
mod linux_memory;
mod linux_net;
mod linux_vsock;
