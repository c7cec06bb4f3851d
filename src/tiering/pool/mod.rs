//! Pools: the pages of many snapshots in one tier, shared by all VMs of the host, or of several. `docs/pools.md` has
//! the format and its reasons.
//!
//! One writer at a time changes a pool; many readers map it meanwhile. A sealed page never changes: a writer stores new
//! pages in free space, and then publishes a new state by one write. [`lease`]s keep pages that a VM maps from being
//! freed.

pub mod add;
pub mod catalogue;
pub mod dedup;
pub mod error;
pub mod format;
pub mod fsck;
pub mod lease;
pub mod lease_record;
mod lock;
pub mod medium;
mod place;
pub mod reader;
mod readers;
mod space;
pub mod writer;

#[cfg(test)]
mod tests;

pub use error::Error;
pub use medium::{Facts, Medium};
pub use reader::{OnLost, PoolTier};
pub use space::Space;
pub use writer::Writer;
