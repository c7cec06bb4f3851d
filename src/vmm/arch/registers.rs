//! Registers of the boot vCPU at its first instruction.

use kvm_bindings::{kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};

use super::layout;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// The entry protocol of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit boot protocol (Linux `Documentation/arch/x86/boot.rst`): long mode, RSI = boot_params.
    Linux64 { rip: u64 },
    /// PVH (Xen `docs/misc/pvh.pandoc`): 32-bit protected mode without paging, EBX = hvm_start_info.
    Pvh { rip: u64 },
}

/// A GDT as 8-byte descriptors, for the boot protocol that needs one in memory.
pub const BOOT_GDT: [u64; 4] = [
    0,
    0x00af_9b00_0000_ffff, // 0x08: 64-bit code
    0x00cf_9300_0000_ffff, // 0x10: data
    0x008f_8b00_0000_ffff, // 0x18: TSS
];

fn segment(selector: u16, type_: u8, long: bool, system: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long && !system),
        s: u8::from(!system),
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

pub fn general(entry: Entry) -> kvm_regs {
    let reserved = 2;
    match entry {
        Entry::Linux64 { rip } => kvm_regs {
            rflags: reserved,
            rip,
            rsp: layout::BOOT_STACK,
            rbp: layout::BOOT_STACK,
            rsi: layout::ZERO_PAGE,
            ..Default::default()
        },
        Entry::Pvh { rip } => kvm_regs { rflags: reserved, rip, rbx: layout::PVH_START_INFO, ..Default::default() },
    }
}

/// Changes the reset state `sregs` into the one that `entry` requires.
pub fn special(entry: Entry, sregs: &mut kvm_sregs) {
    let long = matches!(entry, Entry::Linux64 { .. });
    let code = segment(0x8, 11, long, false);
    let data = segment(0x10, 3, false, false);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: if long { 0xf_ffff } else { 0x67 }, g: 0, ..segment(0x18, 11, false, true) };
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = size_of_val(&BOOT_GDT) as u16 - 1;
    sregs.idt.base = layout::BOOT_IDT;
    sregs.idt.limit = 7;
    sregs.cr0 = CR0_PE | CR0_ET;
    if long {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::PML4;
        sregs.cr4 |= CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
    } else {
        sregs.cr4 = 0;
        sregs.efer = 0;
    }
}

/// The x87 and SSE state after `FNINIT` and reset.
pub fn fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// LINT1 is NMI, and LINT0 takes the 8259's interrupts (Intel MultiProcessor Specification 1.4, virtual wire mode). A
/// machine described by ACPI tables has no 8259: its kernel does not mask the one that KVM has, so LINT0 is masked.
pub fn set_local_interrupts(lapic: &mut kvm_lapic_state, acpi: bool) {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u32 = 4 << 8;
    const MODE_EXTINT: u32 = 7 << 8;
    const MASKED: u32 = 1 << 16;
    let lint0 = if acpi { MODE_EXTINT | MASKED } else { MODE_EXTINT };
    for (register, wanted) in [(LVT_LINT0, lint0), (LVT_LINT1, MODE_NMI)] {
        let bytes: [u8; 4] = std::array::from_fn(|i| lapic.regs[register + i] as u8);
        let value = (u32::from_le_bytes(bytes) & !0x700) | wanted;
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            lapic.regs[register + i] = byte as _;
        }
    }
}
