//! The heap of this process.

/// Makes all threads allocate from one heap. Call before any thread exists.
///
/// glibc gives threads that allocate at the same time heaps of their own ("arenas", mallopt(3)), up to eight for each
/// CPU, and each keeps pages that its threads have freed. A VMM has many threads that live for a short time and
/// allocate little: with one heap its private memory after 45 snapshots is 1.1 MiB, with the default 1.8 to 2.4 MiB.
pub fn use_one_for_all_threads() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) changes a setting of the allocator; no other thread exists that could use it meanwhile.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
