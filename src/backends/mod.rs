//! The places of pools and cold pools.
//!
//! Owns: the media of pools (device DAX, directories, NUMA nodes), the places of cold pools (files, page servers over
//! TCP and RDMA, object stores), the page server, and the cache of chunks. Each implements a trait of `tiering`. Must
//! not know: guest memory, KVM, or which policy made a plan. Start reading: `pool_media.rs`, then `cold/mod.rs` (naming
//! and opening a place) and `cold/file.rs` (the smallest place).

pub mod cold;
mod error;
pub(crate) mod numa;
pub mod pool_media;
#[cfg(feature = "rdma")]
pub mod verbs;

pub use error::Error;
