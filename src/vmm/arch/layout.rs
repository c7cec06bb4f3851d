//! The guest-physical memory map, as Firecracker and Cloud Hypervisor lay it out.
//!
//! ```text
//! 0x0000_0000  GDT, boot parameters, page tables, command line
//! 0x0009_fc00  EBDA up to 0xf_ffff: reserved. MP table, from 0xe_0000 ACPI tables, at 0xf_f000 the VM generation id
//! 0x0010_0000  kernel, RAM
//! 0xc000_0000  MMIO gap: virtio-mmio, IOAPIC 0xfec0_0000, LAPIC 0xfee0_0000, KVM TSS and identity map
//! 0x1_0000_0000  RAM again
//! ```

pub const BOOT_GDT: u64 = 0x500;
pub const BOOT_IDT: u64 = 0x520;
pub const PVH_START_INFO: u64 = 0x6000;
pub const PVH_MODULES: u64 = 0x6040;
pub const PVH_MEMMAP: u64 = 0x6800;
pub const ZERO_PAGE: u64 = 0x7000;
pub const BOOT_STACK: u64 = 0x8ff0;
pub const PML4: u64 = 0x9000;
pub const PDPTE: u64 = 0xa000;
pub const PDE: u64 = 0xb000;
pub const CMDLINE: u64 = 0x2_0000;
/// With its terminating NUL.
pub const CMDLINE_MAX: usize = 2048;
pub const EBDA: u64 = 0x9_fc00;
/// Floating pointer and configuration table: kernels look in the last KiB below 640 KiB.
pub const MP_TABLE: u64 = EBDA;
/// The RSDP, where kernels without a boot parameter for it look first, and behind it the other ACPI tables.
pub const RSDP: u64 = 0xe_0000;
/// A page that holds nothing but the VM generation id.
pub const VMGENID: u64 = 0xf_f000;
pub const HIMEM: u64 = 0x10_0000;
pub const MMIO_GAP: u64 = 0xc000_0000;
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;
/// The registers of the first virtio-mmio device; the next ones follow it.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
pub const VIRTIO_MMIO_LEN: u64 = 0x1000;
pub const IOAPIC: u64 = 0xfec0_0000;
pub const LAPIC: u64 = 0xfee0_0000;
/// Three pages that Intel CPUs without unrestricted guest need (KVM API 4.29).
pub const KVM_TSS: u64 = 0xfffb_d000;

pub const COM1: u64 = 0x3f8;
pub const COM1_LEN: u64 = 8;
pub const COM1_IRQ: u32 = 4;
pub const I8042: u64 = 0x60;
pub const I8042_LEN: u64 = 5;
/// The command and status register of the i8042, whose command 0xfe pulses the CPU's reset line.
pub const I8042_COMMAND: u64 = 0x64;
/// ACPI sleep control, then sleep status: a byte each.
pub const SLEEP: u64 = 0x600;
pub const SLEEP_LEN: u64 = 2;

/// The metadata device's selector, then its data port (QEMU's fw_cfg).
pub const FW_CFG: u64 = 0x510;
pub const FW_CFG_LEN: u64 = 2;

/// Inputs of the IOAPIC; GSI n is input n.
pub const GSI_COUNT: u32 = 24;
/// The event that the VM generation id has changed: the input that a second serial port would have.
pub const VMGENID_GSI: u32 = 3;
/// One edge-triggered input for each virtio-mmio device, from here to the last.
pub const VIRTIO_GSI_FIRST: u32 = 5;

/// The RAM ranges `(gpa, len)` in bytes of a guest with `mem_size` bytes: below the MMIO gap, and above it.
pub fn ram_ranges(mem_size: u64) -> Vec<(u64, u64)> {
    match mem_size.checked_sub(MMIO_GAP) {
        None | Some(0) => vec![(0, mem_size)],
        Some(above) => vec![(0, MMIO_GAP), (MMIO_GAP_END, above)],
    }
}

/// Alignment of persistent memory: a guest can map it in its largest pages, and it shares no section of Linux's memory
/// model with RAM.
const PMEM_STEP: u64 = 1 << 30;

/// Start of persistent memory above RAM or an image that ends at `end`.
pub fn pmem_after(end: u64) -> u64 {
    end.max(MMIO_GAP_END).next_multiple_of(PMEM_STEP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_split_around_the_mmio_gap() {
        assert_eq!(ram_ranges(512 << 20), [(0, 512 << 20)]);
        assert_eq!(ram_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ram_ranges((3 << 30) + (1 << 20)), [(0, 3 << 30), (4 << 30, 1 << 20)]);
    }
}
