//! Integration tests: each drives the real binary on the real /dev/kvm. One folder per capability.

mod devices;
mod lifecycle;
mod linux_guests;
mod machine;
mod pools;
mod restores;
mod services;
mod snapshots;
mod soak;
mod source;
mod support;

use support::skip;
