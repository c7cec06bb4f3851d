//! Everything that is x86: instructions Rust has no name for, the local APIC, CPUID.

pub mod apic;
pub mod cpuid;
pub mod exception;
pub mod mem;
pub mod port;
pub mod trap;
