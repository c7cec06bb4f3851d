//! Raw system calls, each behind a small safe owner. Nothing outside this folder maps memory, sends signals to
//! threads, or speaks an ioctl that kvm-ioctls does not have.

pub mod available_memory;
pub mod clock;
pub mod coalesced;
pub mod code;
pub mod direct_ring;
pub mod dirty_log;
pub mod idle;
pub mod inherit;
pub mod kick;
pub mod kvm_stats;
pub mod limits;
pub mod locks;
pub mod lost;
pub mod mapping;
pub mod mempolicy;
pub mod netns;
pub mod page_cache;
pub mod pagemap;
pub mod pagemap_scan;
pub mod prefault;
#[cfg(feature = "rdma")]
pub mod rdma;
pub mod resident;
pub mod shared_map;
pub mod signals;
pub mod terminal;
pub mod tie;
pub mod touch;
pub mod uffd;
pub mod verity;
pub mod wait;
pub mod watched;
