//! The data that the boot protocol handed over. Everything is copied out here, once, before the allocator may give its
//! memory away.
//!
//! Linux: Documentation/arch/x86/zero-page.rst. Xen: include/public/arch-x86/hvm/start_info.h.

use tvmm_guest::cmdline::Config;
use tvmm_guest::memmap::{ENTRIES_MAX, MemoryMap};
use tvmm_guest::text::Text;

unsafe extern "C" {
    static boot_params_ptr: u64;
    static pvh_info_ptr: u64;
}

const CMDLINE_MAX: usize = 4096;
/// Only this much is mapped while the boot data are read.
const MAPPED: u64 = 4 << 30;

// Offsets in struct boot_params.
const EXT_CMD_LINE_PTR: u64 = 0x0c8;
const E820_ENTRIES: u64 = 0x1e8;
const CMD_LINE_PTR: u64 = 0x228;
const E820_TABLE: u64 = 0x2d0;
const E820_ENTRY_SIZE: u64 = 20;

// Offsets in struct hvm_start_info, version 1.
const PVH_MAGIC: u32 = 0x336e_c578;
const PVH_VERSION: u64 = 4;
const PVH_CMDLINE: u64 = 24;
const PVH_MEMMAP: u64 = 40;
const PVH_MEMMAP_ENTRIES: u64 = 48;
const PVH_ENTRY_SIZE: u64 = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Linux,
    Pvh,
}

impl Protocol {
    pub fn name(self) -> &'static str {
        match self {
            Self::Linux => "linux",
            Self::Pvh => "pvh",
        }
    }
}

pub struct BootInfo {
    pub protocol: Protocol,
    pub map: MemoryMap,
    pub config: Config,
}

/// A value of the boot data. Unaligned, as packed structures have it.
fn read<T: Copy + Default>(address: u64) -> T {
    if address >= MAPPED - 4096 {
        return T::default();
    }
    // SAFETY: mapped, in range by the check; any bit pattern is a T (only integers are read).
    unsafe { (address as *const T).read_unaligned() }
}

impl BootInfo {
    /// The error is for a panic.
    pub fn load() -> Result<Self, Text<96>> {
        // SAFETY: the entry code wrote both before any Rust ran.
        let (linux, pvh) = unsafe { (boot_params_ptr, pvh_info_ptr) };
        let (protocol, map, cmdline) = if pvh == 0 {
            let count = u64::from(read::<u8>(linux + E820_ENTRIES));
            let high = u64::from(read::<u32>(linux + EXT_CMD_LINE_PTR)) << 32;
            let cmdline = high | u64::from(read::<u32>(linux + CMD_LINE_PTR));
            (Protocol::Linux, entries(linux + E820_TABLE, count, E820_ENTRY_SIZE), cmdline)
        } else {
            if read::<u32>(pvh) != PVH_MAGIC || read::<u32>(pvh + PVH_VERSION) == 0 {
                return Err(Text::of(format_args!("PVH start info without a memory map")));
            }
            let count = u64::from(read::<u32>(pvh + PVH_MEMMAP_ENTRIES));
            let table = read(pvh + PVH_MEMMAP);
            (Protocol::Pvh, entries(table, count, PVH_ENTRY_SIZE), read(pvh + PVH_CMDLINE))
        };
        Ok(Self {
            protocol,
            map: map.map_err(|e| Text::of(format_args!("{e}")))?,
            config: Config::parse(command_line(cmdline))?,
        })
    }
}

fn entries(table: u64, count: u64, size: u64) -> Result<MemoryMap, tvmm_guest::memmap::Error> {
    // One too many is enough for the parser to refuse.
    let count = count.min(ENTRIES_MAX as u64 + 1);
    MemoryMap::parse((0..count).map(|i| {
        let at = table.saturating_add(i * size);
        (read(at), read(at.saturating_add(8)), read(at.saturating_add(16)))
    }))
}

fn command_line(address: u64) -> &'static [u8] {
    if address == 0 || address >= MAPPED - CMDLINE_MAX as u64 {
        return b"";
    }
    // SAFETY: mapped and in range by the check; nothing writes there before the result is dropped, which is before the
    // allocator is set up.
    let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, CMDLINE_MAX) };
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    &bytes[..end]
}
