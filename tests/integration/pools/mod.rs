//! Pools, cold pools, page servers.

mod cold_pool;
mod encrypted;
mod object_store;
mod peers;
mod pool;
mod pool_crash;
mod pool_hostile;
mod pool_media;
pub mod serve_pages;
mod serve_pages_rdma;
