//! Booting a machine, its console, its CPUs, and what it tells about itself.

mod boot;
mod config;
mod config_load;
mod console;
mod cycles;
mod generation;
mod guest_elf;
mod host;
mod jail;
mod jailer;
mod large;
mod metadata;
pub mod platform;
mod prefault;
mod report;
mod smp;
mod system_calls;
mod threads;
mod unread;
