//! The parts of the tiny guest kernel that touch no hardware. They are a library of their own so
//! that `cargo test --lib` runs them on the host.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

#[cfg(feature = "functions")]
extern crate alloc;

pub mod args;
pub mod cmdline;
pub mod digest;
pub mod frames;
pub mod line;
pub mod memmap;
pub mod pagetable;
pub mod permute;
#[cfg(feature = "functions")]
pub mod size_class;
pub mod text;
#[cfg(feature = "functions")]
pub mod workloads;

/// The allocation and transfer unit everywhere in this kernel.
pub const PAGE_SIZE: u64 = 4096;
/// 64-bit words in a page.
pub const PAGE_WORDS: u64 = PAGE_SIZE / 8;
