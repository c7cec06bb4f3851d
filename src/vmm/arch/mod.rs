//! x86-64: the guest-physical memory map, and the state of a vCPU before its first instruction.

pub mod acpi;
pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod registers;
pub mod template;

/// The place of a virtio-mmio device, as firmware tables or the kernel command line give it to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmioSlot {
    pub gpa: u64,
    pub len: u64,
    /// Edge-triggered.
    pub gsi: u32,
}

impl VirtioMmioSlot {
    /// Returns the place of device `index`; `None` if the interrupt controller has no input left for it.
    pub fn of(index: usize) -> Option<Self> {
        let index = u32::try_from(index).ok()?;
        let gsi = index.checked_add(layout::VIRTIO_GSI_FIRST).filter(|gsi| *gsi < layout::GSI_COUNT)?;
        let gpa = layout::VIRTIO_MMIO_BASE + u64::from(index) * layout::VIRTIO_MMIO_LEN;
        Some(VirtioMmioSlot { gpa, len: layout::VIRTIO_MMIO_LEN, gsi })
    }
}

/// The facts about the machine that the guest is given at boot.
#[derive(Clone, Copy, Debug)]
pub struct Platform<'a> {
    pub vcpu_count: u8,
    pub virtio: &'a [VirtioMmioSlot],
    /// True: in ACPI tables. False: only in the MP table and on the kernel command line.
    pub acpi: bool,
}
