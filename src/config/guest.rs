//! The built-in guests: a small kernel that speaks the function protocol on COM1 (`resources/guest/README.md`), without
//! and with the functions of `docs/functions.md`.

use super::Guest;

/// Its ELF image, built by `build.rs` from `resources/guest/`.
pub static ELF: &[u8] = include_bytes!(env!("TVMM_GUEST_ELF"));
/// The same with the functions.
pub static FUNCTIONS_ELF: &[u8] = include_bytes!(env!("TVMM_FUNCTIONS_ELF"));

impl Guest {
    /// Its ELF image, and its name in messages.
    pub fn elf(self) -> (&'static [u8], &'static str) {
        match self {
            Guest::Tiny => (ELF, "built-in guest"),
            Guest::Functions => (FUNCTIONS_ELF, "built-in functions guest"),
        }
    }
}
