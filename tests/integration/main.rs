//! Integration tests: each drives the real binary on the real /dev/kvm. One file per capability.

mod api;
mod architecture;
mod boot;
mod config;
mod console;
mod crash;
mod host;
mod hostile_snapshot;
mod restore;
mod support;
