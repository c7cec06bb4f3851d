//! x86-64: where things are in guest-physical memory, and what a vCPU looks like before its first instruction.

pub mod cpuid;
pub mod layout;
pub mod msr;
pub mod registers;
