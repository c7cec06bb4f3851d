//! The vmm room.

pub mod config;
pub mod control;
