//! ACPI tables (ACPI Specification 6.5): a hardware-reduced machine whose devices are all in the DSDT.
//!
//! A hardware-reduced machine has no PIC, PM timer or SCI. Events come through a generic event device, power off and
//! reset through registers that the FADT names.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::{Platform, VirtioMmioSlot, layout};
use crate::devices::{PULSE_RESET, SLEEP_TYPE_OFF};

const OEM_ID: [u8; 6] = *b"TVMM  ";
const OEM_TABLE_ID: [u8; 8] = *b"TVMMVM  ";
const OEM_REVISION: u32 = 1;
/// Tables begin at multiples of this, as readers map them.
const ALIGN: u64 = 16;

/// FADT IA-PC boot architecture flags (ACPI 6.5, 5.2.9.3). Without the keyboard controller's flag, kernels do not probe
/// for one.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_MSI: u16 = 1 << 3;
const BOOT_ARCH_NO_RTC: u16 = 1 << 5;

/// All tables as one block for [`layout::RSDP`], where the RSDP stands first.
pub fn tables(platform: Platform<'_>) -> Vec<u8> {
    let mut block = Block(vec![0; Rsdp::len()]);
    let dsdt = block.append(&bytes_of(&dsdt(platform.virtio)));
    let fadt = block.append(&bytes_of(&fadt(dsdt)));
    let madt = block.append(&bytes_of(&madt(platform.vcpu_count)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = block.append(&bytes_of(&xsdt));
    let Block(mut bytes) = block;
    bytes[..Rsdp::len()].copy_from_slice(&bytes_of(&Rsdp::new(OEM_ID, xsdt)));
    bytes
}

/// Tables one after the other, from [`layout::RSDP`] on.
struct Block(Vec<u8>);

impl Block {
    /// Appends a table. Returns its guest-physical address.
    fn append(&mut self, table: &[u8]) -> u64 {
        let offset = (self.0.len() as u64).next_multiple_of(ALIGN);
        self.0.resize(offset as usize, 0);
        self.0.extend_from_slice(table);
        layout::RSDP + offset
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |address| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address);
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // A set flag means: no such button in the fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_MSI | BOOT_ARCH_NO_RTC).into();
    fadt.reset_reg = port(layout::I8042_COMMAND);
    fadt.reset_value = PULSE_RESET;
    fadt.sleep_control_reg = port(layout::SLEEP);
    fadt.sleep_status_reg = port(layout::SLEEP + 1);
    fadt.finalize()
}

/// One local APIC per vCPU, whose ids are the vCPUs' indices, and the IOAPIC. Nothing overrides the identity of ISA
/// interrupts and its inputs, which is how KVM routes them.
fn madt(vcpu_count: u8) -> MADT {
    let lapic = LocalInterruptController::Address(layout::LAPIC as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, lapic);
    for index in 0..vcpu_count {
        madt.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC as u32, 0));
    madt
}

fn dsdt(virtio: &[VirtioMmioSlot]) -> Sdt {
    let mut aml = Vec::new();
    serial(&mut aml);
    vm_generation(&mut aml);
    metadata(&mut aml);
    for (index, slot) in virtio.iter().enumerate() {
        virtio_mmio(index, slot, &mut aml);
    }
    let mut body = Scope::raw("\\_SB_".into(), aml);
    // Power off is the only sleep state: `SLP_TYP`, and three values that only fixed hardware uses.
    Name::new("\\_S5_".into(), &Package::new(vec![&SLEEP_TYPE_OFF, &0_u8, &0_u8, &0_u8])).to_aml_bytes(&mut body);
    const HEADER: u32 = 36;
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// Edge-triggered, active high, not shared.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// COM1 as a 16550A (`PNP0501`): a hardware-reduced kernel looks for no legacy ports.
fn serial(aml: &mut Vec<u8>) {
    let resources =
        (IO::new(layout::COM1 as u16, layout::COM1 as u16, 0, layout::COM1_LEN as u8), edge(layout::COM1_IRQ));
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&resources.0, &resources.1])),
        ],
    )
    .to_aml_bytes(aml);
}

/// The metadata device (QEMU `docs/specs/fw_cfg.rst`), which Linux' qemu_fw_cfg driver finds as `QEMU0002`.
fn metadata(aml: &mut Vec<u8>) {
    /// Present, enabled, working, not to be shown.
    const STATUS: u8 = 0xb;
    let ports = IO::new(layout::FW_CFG as u16, layout::FW_CFG as u16, 1, layout::FW_CFG_LEN as u8);
    Device::new(
        "FWCF".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0002"),
            &Name::new("_STA".into(), &STATUS),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports])),
        ],
    )
    .to_aml_bytes(aml);
}

/// The VM generation id (Microsoft, "Virtual Machine Generation ID", 2012) and the event device (ACPI 6.5, 5.6.9) that
/// signals its change.
fn vm_generation(aml: &mut Vec<u8>) {
    /// The notification value of the id's specification.
    const CHANGED: u8 = 0x80;
    let address = Package::new(vec![&(layout::VMGENID as u32), &((layout::VMGENID >> 32) as u32)]);
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"TVMM0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &address),
        ],
    )
    .to_aml_bytes(aml);
    let vgen = Path::new("\\_SB_.VGEN");
    let which = Arg(0);
    let is_change = Equal::new(&which, &layout::VMGENID_GSI);
    let notify = Notify::new(&vgen, &CHANGED);
    let tell = If::new(&is_change, vec![&notify]);
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge(layout::VMGENID_GSI)])),
            &Method::new("_EVT".into(), 1, true, vec![&tell]),
        ],
    )
    .to_aml_bytes(aml);
}

/// A virtio-mmio transport, which Linux' virtio_mmio driver finds as `LNRO0005`.
fn virtio_mmio(index: usize, slot: &VirtioMmioSlot, aml: &mut Vec<u8>) {
    let memory = Memory32Fixed::new(true, slot.gpa as u32, slot.len as u32);
    let name = format!("V{index:03}");
    Device::new(
        name.as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(index as u32)),
            &Name::new("_CCA".into(), &ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory, &edge(slot.gsi)])),
        ],
    )
    .to_aml_bytes(aml);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(bytes: &[u8], at: u64, len: usize) -> u64 {
        bytes[at as usize..][..len].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
    }

    /// The table at a guest-physical address, whole.
    fn table(block: &[u8], gpa: u64) -> &[u8] {
        let offset = gpa - layout::RSDP;
        let len = number(block, offset + 4, 4) as usize;
        let table = &block[offset as usize..][..len];
        assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
        table
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_its_checksum_is_right() {
        let virtio: Vec<VirtioMmioSlot> = (0..).map_while(VirtioMmioSlot::of).collect();
        assert_eq!((virtio.len(), virtio[18].gpa, virtio[18].gsi), (19, 0xd001_2000, 23));
        let block = tables(Platform { vcpu_count: 32, virtio: &virtio, acpi: true });
        assert!(layout::RSDP + block.len() as u64 <= layout::VMGENID);
        assert_eq!(&block[..8], b"RSD PTR ");
        assert_eq!((sum(&block[..20]), sum(&block[..36])), (0, 0));
        let xsdt = table(&block, number(&block, 24, 8));
        let fadt = table(&block, number(xsdt, 36, 8));
        let madt = table(&block, number(xsdt, 44, 8));
        assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
        assert_eq!(fadt.len(), 276);
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        let dsdt = table(&block, number(fadt, 140, 8));
        assert_eq!(dsdt.windows(8).filter(|name| name == b"LNRO0005").count(), 19);
    }
}
