//! x86-64: where things are in guest-physical memory, and what a vCPU looks like before its first instruction.

pub mod acpi;
pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod registers;
pub mod template;

/// Where a virtio-mmio device is, as firmware tables or the kernel command line tell the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmioSlot {
    pub gpa: u64,
    pub len: u64,
    /// Edge-triggered.
    pub gsi: u32,
}

impl VirtioMmioSlot {
    /// The place of device `index`; none if the interrupt controller has no input left for it.
    pub fn of(index: usize) -> Option<Self> {
        let index = u32::try_from(index).ok()?;
        let gsi = index.checked_add(layout::VIRTIO_GSI_FIRST).filter(|gsi| *gsi < layout::GSI_COUNT)?;
        let gpa = layout::VIRTIO_MMIO_BASE + u64::from(index) * layout::VIRTIO_MMIO_LEN;
        Some(VirtioMmioSlot { gpa, len: layout::VIRTIO_MMIO_LEN, gsi })
    }
}

/// What the guest is told about the machine it is on.
#[derive(Clone, Copy, Debug)]
pub struct Platform<'a> {
    pub vcpu_count: u8,
    pub virtio: &'a [VirtioMmioSlot],
    /// Tell by ACPI tables; otherwise by the MP table and the kernel command line alone.
    pub acpi: bool,
}
