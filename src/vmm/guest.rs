//! The built-in guest: a small kernel that speaks the function protocol on COM1 (`resources/guest/README.md`).

/// Its ELF image, built by `build.rs` from `resources/guest/`.
pub static ELF: &[u8] = include_bytes!(env!("TVMM_GUEST_ELF"));
