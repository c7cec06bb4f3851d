//! Guest RAM and everything that works on it.
//!
//! Owns: the mappings of guest RAM, the restore engine that carries out any plan, the page-fault service, background
//! loading, verification, promotion of pages in place, balloon release, rewind, trimming, spilling, access tracking,
//! the watch for memory that does not come, and usage figures.
//! Must not know: KVM's VM and vCPUs beyond what a fault needs, devices, or which policy made a plan.
//! Start reading: `guest_ram.rs`, `engine.rs` (plan to mappings), `fault_service.rs` (a lazy fault from start to end).

pub(crate) mod access;
pub mod accounting;
pub(crate) mod against_plan;
pub(crate) mod background;
pub(crate) mod balloon_release;
pub(crate) mod comparison;
pub(crate) mod ending;
pub(crate) mod engine;
mod error;
pub(crate) mod external_handler;
pub(crate) mod fault_batches;
pub(crate) mod fault_service;
pub(crate) mod files;
pub(crate) mod guest_ram;
pub(crate) mod promote;
pub(crate) mod reads;
pub(crate) mod rewind;
pub(crate) mod services;
pub(crate) mod spill;
pub mod stall;
pub(crate) mod touches;
pub(crate) mod trim;
pub mod usage;
pub(crate) mod used_pages;
pub(crate) mod verify;

pub use error::{ChangeError, Error};
