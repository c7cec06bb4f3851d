//! Switches from the boot page tables (4 GiB in 2 MiB pages) to larger or finer ones.

use crate::alloc::{Pages, address};
use crate::arch::trap;
use tvmm_guest::cmdline::PageTables;
use tvmm_guest::memmap::MemoryMap;
use tvmm_guest::pagetable::{Plan, Table};

unsafe extern "C" {
    /// What application processors load, in 32-bit mode.
    static mut boot_cr3: u64;
}

const BOOT_REACH: u64 = 4 << 30;

/// Maps all RAM as asked. The error is for a panic.
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
    // SAFETY: just allocated, below 4 GiB and so mapped; nobody else refers to it.
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
