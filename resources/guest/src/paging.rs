//! Switches from the boot page tables (4 GiB in 2 MiB pages) to larger or finer ones.

use crate::alloc::{Pages, address};
use crate::arch::trap;
use tvmm_guest::cmdline::PageTables;
use tvmm_guest::memmap::MemoryMap;
use tvmm_guest::pagetable::{Plan, Table};

unsafe extern "C" {
    /// The tables that application processors load, in 32-bit mode.
    static mut boot_cr3: u64;
}

const BOOT_REACH: u64 = 4 << 30;
const GIB: u64 = 1 << 30;
const BLOCK: u64 = 2 << 20;
/// One table of the third level reaches this far.
const REACH: u64 = 512 << 30;
const TABLE: u64 = 0x27; // P W U A
const LARGE_PAGE: u64 = 0xe7; // P W U A D PS

/// Maps all RAM in pages of `kind`. The error is for a panic.
pub fn init(map: &MemoryMap, kind: PageTables, pages: &mut Pages) -> Result<(), &'static str> {
    let split = kind == PageTables::FourKib;
    if !split && map.end() <= BOOT_REACH {
        return Ok(());
    }
    let plan = Plan::new(map, split).ok_or("RAM above 512 GiB")?;
    let count = plan.tables();
    let run = pages.alloc(count).map_err(|_| "no memory for page tables")?;
    let at = address(run);
    if at + count * size_of::<Table>() as u64 > BOOT_REACH {
        return Err("no memory for page tables below 4 GiB");
    }
    // SAFETY: just allocated, below 4 GiB and so mapped; nothing else refers to it.
    let tables = unsafe { core::slice::from_raw_parts_mut(at as *mut Table, count as usize) };
    plan.build(tables, at);
    // SAFETY: the new tables map the first 4 GiB like the old ones, and never go away. No other CPU
    // runs yet.
    unsafe {
        (&raw mut boot_cr3).write_volatile(at);
        trap::set_cr3(at);
    }
    Ok(())
}

/// Clears the accessed and dirty bits of the last-level entries for `size` bytes at `start`; returns the number of
/// entries.
pub fn unmark(start: u64, size: u64) -> u64 {
    const ADDRESS: u64 = 0xf_ffff_ffff_f000;
    const PAGE_SIZE_BIT: u64 = 1 << 7;
    const MARKS: u64 = 3 << 5;
    // SAFETY: as in `map`.
    let pml4 = unsafe { (&raw const boot_cr3).read_volatile() };
    let (mut at, mut count) = (start, 0);
    while at < start + size {
        let mut table = pml4;
        for shift in [39, 30, 21, 12] {
            let entry = ((table & ADDRESS) + (at >> shift & 511) * 8) as *mut u64;
            // SAFETY: an entry of a table that is in use, mapped onto itself like all RAM; only marks change.
            let value = unsafe { entry.read_volatile() };
            if shift == 12 || value & PAGE_SIZE_BIT != 0 && shift != 39 {
                // SAFETY: as above.
                unsafe { entry.write_volatile(value & !MARKS) };
                (at, count) = (((at >> shift) + 1) << shift, count + 1);
                break;
            }
            table = value;
        }
    }
    // SAFETY: the same tables, read anew.
    unsafe { trap::set_cr3(pml4) };
    count
}

/// Maps `size` bytes at `start` onto themselves, in 2 MiB pages, where the tables have nothing yet. The error is for a
/// message.
pub fn map(start: u64, size: u64, pages: &mut Pages) -> Result<(), &'static str> {
    if start.checked_add(size).is_none_or(|end| end > REACH) {
        return Err("it lies above 512 GiB");
    }
    // SAFETY: `boot_cr3` is written before this, by the first CPU only; the tables lie in RAM that is mapped onto
    // itself.
    let pml4 = unsafe { (&raw const boot_cr3).read_volatile() };
    // SAFETY: the first entry is always there: RAM begins at 0.
    let third = unsafe { *(pml4 as *const u64) } & !0xfff;
    for gib in start / GIB..(start + size).div_ceil(GIB) {
        let entry = (third + gib * 8) as *mut u64;
        // SAFETY: an entry of that table: the index is below 512.
        if unsafe { entry.read_volatile() } != 0 {
            continue;
        }
        let run = pages.alloc(1).map_err(|_| "no memory for page tables")?;
        for i in 0..512 {
            let block = gib * GIB + i * BLOCK;
            // SAFETY: inside the page just allocated, which has no other user.
            unsafe { ((address(run) + i * 8) as *mut u64).write_volatile(block | LARGE_PAGE) };
        }
        // SAFETY: as above; existing mappings stay as they are.
        unsafe { entry.write_volatile(address(run) | TABLE) };
    }
    // SAFETY: the same tables: they are read anew.
    unsafe { trap::set_cr3(pml4) };
    Ok(())
}
