//! Calls from CPL3 to the few privileged instructions in boot.s, by `int3`.
//!
//! `int3` because it works on every KVM: `syscall` does not on KVM_PVM, and `int 0x80` is slower.

use core::arch::asm;
use core::arch::x86_64::CpuidResult;

// Indices of `trap_table` in boot.s.
const HALT: u32 = 0;
const RDMSR: u32 = 1;
const WRMSR: u32 = 2;
const SET_CR3: u32 = 3;
const STI: u32 = 4;
const CLI: u32 = 5;
const CPUID: u32 = 6;
const TRIPLE_FAULT: u32 = 7;
const STORES: u32 = 8;

/// # Safety
/// `function` must be one of the above and its arguments must keep Rust's world intact.
unsafe fn trap(function: u32, rdi: u64, ecx: u32) -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: the gate switches to the CPU's own CPL0 stack, so this stack and its red zone stay
    // untouched; the stubs change rax and rdx only, and restore the flags by iretq.
    unsafe {
        asm!("int3", inout("rax") u64::from(function) => low, in("rdi") rdi, in("rcx") u64::from(ecx),
             out("rdx") high);
    }
    high << 32 | low & 0xffff_ffff
}

/// Waits for an interrupt with interrupts enabled. CPL3 runs with IF=0, and `sti; hlt` at CPL0 is
/// one step, so an interrupt between the caller's last look at its condition and the halt is not
/// lost: it ends the halt at once.
pub fn halt() {
    // SAFETY: the interrupt stubs only count and acknowledge.
    unsafe { trap(HALT, 0, 0) };
}

/// # Safety
/// The MSR must exist.
pub unsafe fn read_msr(msr: u32) -> u64 {
    // SAFETY: reading has no side effects in the MSRs this kernel knows; it exists (caller).
    unsafe { trap(RDMSR, 0, msr) }
}

/// # Safety
/// The MSR must exist and the value must be valid in it; memory it points to must be set aside.
pub unsafe fn write_msr(msr: u32, value: u64) {
    // SAFETY: by the caller.
    unsafe { trap(WRMSR, value, msr) };
}

/// # Safety
/// `pml4` must be the physical address of tables that map all memory in use onto itself.
pub unsafe fn set_cr3(pml4: u64) {
    // SAFETY: by the caller: no address changes its meaning.
    unsafe { trap(SET_CR3, pml4, 0) };
}

/// Lets interrupts in while this CPU runs on.
pub fn enable_interrupts() {
    // SAFETY: as in `halt`.
    unsafe { trap(STI, 0, 0) };
}

/// Back to the normal state of CPL3: no interrupts but in [`halt`].
pub fn disable_interrupts() {
    // SAFETY: holding interrupts back harms no memory.
    unsafe { trap(CLI, 0, 0) };
}

/// CPUID at CPL0. At CPL3 the instruction does not exit on KVM_PVM and tells of the host, not of
/// this machine; nothing in this kernel may use it there.
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    let (eax, ebx, ecx, edx);
    // SAFETY: as in `trap`; CPUID has no side effects, and its stub changes these registers only.
    unsafe {
        asm!("int3", inout("eax") CPUID => eax, inout("edi") leaf => _, inout("ecx") subleaf => ecx,
             out("esi") ebx, out("edx") edx);
    }
    CpuidResult { eax, ebx, ecx, edx }
}

/// Stores at CPL0 to the two pages at `pages`; `which` selects the stores (boot.s).
///
/// # Safety
/// Nothing else refers to the pages.
pub unsafe fn kernel_stores(pages: u64, which: u32) {
    // SAFETY: by the caller.
    unsafe { trap(STORES, pages, which) };
}

/// Shuts the machine down by a triple fault.
pub fn triple_fault() -> ! {
    loop {
        // SAFETY: it does not come back.
        unsafe { trap(TRIPLE_FAULT, 0, 0) };
    }
}
