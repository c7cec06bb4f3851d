//! The life of a VM after its restore.

mod rewind;
mod standby;
