//! Boot parameters: memory map, command line, initrd, ACPI.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam;
use linux_loader::loader::elf::start_info::{self, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress};

use super::super::arch::layout;
use super::super::arch::registers::BOOT_GDT;
use super::super::error::Error;
use super::image::Image;
use super::initrd::Initrd;
use crate::memory::guest_ram::GuestRam;
use crate::snapshot::MemoryLayout;
use crate::vmm::boot::BootError;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The parameters of both protocols.
pub struct MachineParams {
    pub initrd: Option<Initrd>,
    /// There is an RSDP.
    pub acpi: bool,
    /// Without its NUL.
    pub cmdline_len: u32,
}

impl MachineParams {
    fn rsdp(&self) -> u64 {
        if self.acpi { layout::RSDP } else { 0 }
    }
}

/// The e820 map `(gpa, len, type)`: RAM without the EBDA and what lies above it up to 1 MiB.
fn e820(memory: &MemoryLayout) -> Vec<(u64, u64, u32)> {
    let mut map = vec![(0, layout::EBDA, E820_RAM), (layout::EBDA, layout::HIMEM - layout::EBDA, E820_RESERVED)];
    for range in memory.ranges() {
        let start = range.gpa.max(layout::HIMEM);
        let end = range.gpa + range.len;
        if end > start {
            map.push((start, end - start, E820_RAM));
        }
    }
    map
}

/// 64-bit boot protocol: zero page, GDT, identity page tables for the first GiB.
pub fn write_linux64(image: &Image, machine: &MachineParams, ram: &GuestRam) -> Result<(), Error> {
    let mut params = bootparam::boot_params { hdr: image.setup.unwrap_or_else(elf_header), ..Default::default() };
    const LOADER_UNDEFINED: u8 = 0xff;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    // A bzImage states the longest command line that it accepts.
    let most = image.setup.map_or(layout::CMDLINE_MAX as u32, |setup| setup.cmdline_size);
    if machine.cmdline_len > most {
        return Err(
            BootError::Cmdline(format!("the kernel takes {most} bytes and it has {}", machine.cmdline_len)).into()
        );
    }
    params.hdr.cmdline_size = machine.cmdline_len + 1;
    if let Some(initrd) = machine.initrd {
        params.hdr.ramdisk_image = initrd.gpa;
        params.hdr.ramdisk_size = initrd.len;
    }
    params.acpi_rsdp_addr = machine.rsdp();
    for (entry, (addr, size, r#type)) in params.e820_table.iter_mut().zip(e820(ram.layout())) {
        *entry = bootparam::boot_e820_entry { addr, size, r#type };
        params.e820_entries += 1;
    }
    let boot_params = BootParams::new(&params, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&boot_params, ram.boot_view()?)
        .map_err(|error| BootError::KernelLoad { name: "boot parameters".into(), what: error.to_string() })?;
    write_gdt(ram)?;
    write_page_tables(ram)?;
    Ok(())
}

/// A setup header for an ELF kernel, which has none.
fn elf_header() -> bootparam::setup_header {
    const BOOT_FLAG: u16 = 0xaa55;
    const HEADER: u32 = u32::from_le_bytes(*b"HdrS");
    const KERNEL_ALIGNMENT: u32 = 0x0100_0000;
    bootparam::setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..Default::default()
    }
}

fn write_gdt(ram: &GuestRam) -> Result<(), BootError> {
    for (index, descriptor) in BOOT_GDT.iter().enumerate() {
        write_u64(ram, "GDT", layout::BOOT_GDT + 8 * index as u64, *descriptor)?;
    }
    write_u64(ram, "IDT", layout::BOOT_IDT, 0)
}

fn write_page_tables(ram: &GuestRam) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const HUGE: u64 = 1 << 7;
    write_u64(ram, "PML4", layout::PML4, layout::PDPTE | PRESENT_WRITABLE)?;
    write_u64(ram, "PDPT", layout::PDPTE, layout::PDE | PRESENT_WRITABLE)?;
    for index in 0..512u64 {
        write_u64(ram, "page directory", layout::PDE + 8 * index, index << 21 | HUGE | PRESENT_WRITABLE)?;
    }
    Ok(())
}

fn write_u64(ram: &GuestRam, what: &'static str, gpa: u64, value: u64) -> Result<(), BootError> {
    ram.view().write_obj(value, GuestAddress(gpa)).map_err(|source| BootError::GuestAccess { what, gpa, source })
}

/// PVH: start info, memory map and modules. The GDT is optional, because KVM loads the segments.
pub fn write_pvh(machine: &MachineParams, ram: &GuestRam) -> Result<(), Error> {
    let map: Vec<hvm_memmap_table_entry> = e820(ram.layout())
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 })
        .collect();
    let modules: Vec<hvm_modlist_entry> = machine
        .initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: u64::from(initrd.gpa),
            size: u64::from(initrd.len),
            ..Default::default()
        })
        .collect();
    let start = hvm_start_info {
        magic: start_info::XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { layout::PVH_MODULES },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: machine.rsdp(),
        memmap_paddr: layout::PVH_MEMMAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&start, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&map, GuestAddress(layout::PVH_MEMMAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(layout::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, ram.boot_view()?)
        .map_err(|error| BootError::KernelLoad { name: "PVH start info".into(), what: error.to_string() })?;
    write_gdt(ram)?;
    Ok(())
}
