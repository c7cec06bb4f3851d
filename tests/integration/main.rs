//! Integration tests: each drives the real binary on the real /dev/kvm. One file per capability.

mod api;
mod architecture;
mod balloon;
mod boot;
mod config;
mod console;
mod crash;
mod cycles;
mod diff;
mod golden;
mod guest_elf;
mod hanging;
mod host;
mod hostile_snapshot;
mod large;
mod metadata;
mod plans;
mod pmem;
mod profile;
mod report;
mod restore;
mod smp;
mod support;
mod uffd_handler;
mod virtio;
