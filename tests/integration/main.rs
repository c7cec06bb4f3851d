//! Integration tests: each drives the real binary on the real /dev/kvm. One file per capability.

mod architecture;
mod boot;
mod cycles;
mod diff;
mod golden;
mod guest_elf;
mod large;
mod report;
mod restore;
mod smp;
mod support;
