//! The vmm room.

pub mod config;
