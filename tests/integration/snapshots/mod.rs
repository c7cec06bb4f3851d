//! Snapshots: taking, merging, verifying, and refusing damaged ones.

pub mod crash;
mod diff;
pub mod golden;
mod hostile_snapshot;
mod identify;
mod images;
mod inspect;
mod kept;
pub mod live;
mod memory_lost;
mod read_back;
mod signed;
mod verify;
