//! The pages of this program that are mapped.

unsafe extern "C" {
    /// The start of the program, and the end of its code: set by the linker (GNU ld manual, "PROVIDE"; lld has both).
    static __executable_start: u8;
    static etext: u8;
}

/// Unmaps the program's code and constants (not the file's page cache): pages still needed are mapped again as they are
/// touched. Starting a VM touches far more of them than running one, and the kernel maps sixteen pages around each
/// touch; without this they would count as the VM's memory for as long as it lives.
pub fn unmap_until_touched() {
    let start = (&raw const __executable_start) as usize & !0xfff;
    let end = (&raw const etext) as usize & !0xfff;
    // SAFETY: the range holds only file-backed, read-only mappings of the program itself (headers, constants, code),
    // none of which is ever written; MADV_DONTNEED drops their translations, and the next access finds the same bytes.
    let result = unsafe { libc::madvise(start as *mut libc::c_void, end.saturating_sub(start), libc::MADV_DONTNEED) };
    if result != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "The program's code stays mapped");
    }
}
