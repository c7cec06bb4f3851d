//! Loading a kernel into guest memory, and the parameters it is entered with.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io::{Cursor, Read, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability, start_info};
use linux_loader::loader::{self, KernelLoader, bootparam, load_cmdline};
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use super::arch::layout;
use super::arch::registers::{BOOT_GDT, Entry};
use super::config::{BootProtocol, BootSource};
use super::error::Error;
use super::guest;
use super::memory::GuestRam;
use crate::devices::virtio::Memory;
use crate::snapshot::MemoryLayout;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Loads the kernel of `source` and writes everything its boot protocol wants into `ram`. Returns how the boot vCPU
/// enters it.
pub fn load(source: &BootSource, protocol: BootProtocol, ram: &GuestRam) -> Result<Entry, Error> {
    let (name, loaded) = match &source.kernel_image_path {
        Some(path) => (path.display().to_string(), load_file(path, ram.view())?),
        None => {
            let name = "built-in guest".to_string();
            let loaded = load_elf(&name, &mut Cursor::new(guest::ELF), ram.view())?;
            (name, loaded)
        }
    };
    check_end(&name, loaded.end, ram.layout())?;
    write_cmdline(source.boot_args_or_default(), ram.view())?;
    let entry = choose_entry(&name, protocol, &loaded)?;
    match entry {
        Entry::Linux64 { .. } => write_linux64(source.boot_args_or_default(), ram)?,
        Entry::Pvh { .. } => write_pvh(ram)?,
    }
    Ok(entry)
}

struct Loaded {
    linux64: u64,
    pvh: Option<u64>,
    /// The first address behind it, memory that it wants zeroed and the file does not have included.
    end: u64,
}

/// The loader has written what is in the file; a kernel runs only if the rest of it is memory too.
fn check_end(name: &str, end: u64, memory: &MemoryLayout) -> Result<(), Error> {
    let ram_end = memory.ranges().first().map_or(0, |range| range.gpa + range.len);
    if end > ram_end { Err(Error::KernelTooLarge { name: name.to_string(), end, ram_end }) } else { Ok(()) }
}

fn load_file(path: &Path, memory: &Memory) -> Result<Loaded, Error> {
    // A FIFO is refused when it is read, not waited for when it is opened.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let mut file = opened.map_err(|source| Error::KernelOpen { path: path.to_owned(), source })?;
    load_elf(&path.display().to_string(), &mut file, memory)
}

fn load_elf<F: Read + ReadVolatile + Seek>(name: &str, image: &mut F, memory: &Memory) -> Result<Loaded, Error> {
    let failed = |what: String| Error::KernelLoad { name: name.to_string(), what };
    let loaded = Elf::load(memory, None, image, Some(GuestAddress(layout::HIMEM)))
        .map_err(|error| failed(load_problem(&error)))?;
    let pvh = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Some(entry.0),
        _ => None,
    };
    Ok(Loaded { linux64: loaded.kernel_load.0, pvh, end: loaded.kernel_end })
}

fn load_problem(error: &loader::Error) -> String {
    match error {
        loader::Error::Elf(loader::elf::Error::ReadKernelImage) => {
            "it is cut short, or a segment of it lies outside guest memory".to_string()
        }
        other => other.to_string(),
    }
}

fn choose_entry(name: &str, protocol: BootProtocol, loaded: &Loaded) -> Result<Entry, Error> {
    match (protocol, loaded.pvh) {
        (BootProtocol::Auto | BootProtocol::Pvh, Some(rip)) => Ok(Entry::Pvh { rip }),
        (BootProtocol::Pvh, None) => Err(Error::BootProtocol {
            name: name.to_string(),
            protocol: "PVH",
            what: "it has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)",
        }),
        (BootProtocol::Auto | BootProtocol::Linux64, _) => Ok(Entry::Linux64 { rip: loaded.linux64 }),
    }
}

fn write_cmdline(args: &str, memory: &Memory) -> Result<(), Error> {
    if args.len() >= layout::CMDLINE_MAX {
        return Err(Error::CmdlineTooLong { len: args.len() });
    }
    let text = CString::new(args).ok().filter(|_| args.is_ascii()).ok_or(Error::CmdlineCharacters)?;
    let mut cmdline = linux_loader::cmdline::Cmdline::new(layout::CMDLINE_MAX)
        .map_err(|error| Error::KernelLoad { name: "command line".into(), what: error.to_string() })?;
    cmdline
        .insert_str(text.to_str().unwrap_or_default())
        .map_err(|error| Error::KernelLoad { name: "command line".into(), what: error.to_string() })?;
    load_cmdline(memory, GuestAddress(layout::CMDLINE), &cmdline)
        .map_err(|error| Error::KernelLoad { name: "command line".into(), what: error.to_string() })
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
fn write_linux64(args: &str, ram: &GuestRam) -> Result<(), Error> {
    const LOADER_UNDEFINED: u8 = 0xff;
    const BOOT_FLAG: u16 = 0xaa55;
    const HEADER: u32 = 0x5372_6448;
    const KERNEL_ALIGNMENT: u32 = 0x0100_0000;
    let mut params = bootparam::boot_params::default();
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = args.len() as u32 + 1;
    for (entry, (addr, size, r#type)) in params.e820_table.iter_mut().zip(e820(ram.layout())) {
        *entry = bootparam::boot_e820_entry { addr, size, r#type };
        params.e820_entries += 1;
    }
    let boot_params = BootParams::new(&params, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&boot_params, ram.view())
        .map_err(|error| Error::KernelLoad { name: "boot parameters".into(), what: error.to_string() })?;
    write_gdt(ram)?;
    write_page_tables(ram)
}

fn write_gdt(ram: &GuestRam) -> Result<(), Error> {
    for (index, descriptor) in BOOT_GDT.iter().enumerate() {
        write_u64(ram, "GDT", layout::BOOT_GDT + 8 * index as u64, *descriptor)?;
    }
    write_u64(ram, "IDT", layout::BOOT_IDT, 0)
}

fn write_page_tables(ram: &GuestRam) -> Result<(), Error> {
    const PRESENT_WRITABLE: u64 = 3;
    const HUGE: u64 = 1 << 7;
    write_u64(ram, "PML4", layout::PML4, layout::PDPTE | PRESENT_WRITABLE)?;
    write_u64(ram, "PDPT", layout::PDPTE, layout::PDE | PRESENT_WRITABLE)?;
    for index in 0..512u64 {
        write_u64(ram, "page directory", layout::PDE + 8 * index, index << 21 | HUGE | PRESENT_WRITABLE)?;
    }
    Ok(())
}

fn write_u64(ram: &GuestRam, what: &'static str, gpa: u64, value: u64) -> Result<(), Error> {
    ram.view().write_obj(value, GuestAddress(gpa)).map_err(|source| Error::GuestAccess { what, gpa, source })
}

/// PVH: start info and memory map; the GDT is only a convenience, segments are loaded by KVM.
fn write_pvh(ram: &GuestRam) -> Result<(), Error> {
    let map: Vec<hvm_memmap_table_entry> = e820(ram.layout())
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 })
        .collect();
    let start = hvm_start_info {
        magic: start_info::XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: layout::CMDLINE,
        memmap_paddr: layout::PVH_MEMMAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&start, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&map, GuestAddress(layout::PVH_MEMMAP));
    PvhBootConfigurator::write_bootparams(&params, ram.view())
        .map_err(|error| Error::KernelLoad { name: "PVH start info".into(), what: error.to_string() })?;
    write_gdt(ram)
}
