//! Identity page tables, built into a block of memory that will hold them.
//!
//! All entries have A and D preset, so that the page walker never writes a table (a snapshot would
//! see those writes as dirty pages, and KVM needs A=1 to prefetch translations).
//! Intel SDM vol. 3 section 4.5.4, tables 4-15 to 4-20.

use crate::memmap::{MemoryMap, Range};
use crate::{PAGE_SIZE, PAGE_WORDS};

/// One 4 KiB table.
pub type Table = [u64; PAGE_WORDS as usize];

const TABLE_FLAGS: u64 = 0x27; // P W U A
const PAGE_FLAGS: u64 = 0x67; // P W U A D
const LARGE: u64 = 0x80;
const UNCACHED: u64 = 0x18; // PWT PCD
const GIB: u64 = 1 << 30;
const BLOCK: u64 = 2 << 20;
/// One PDPT reaches this far.
pub const REACH_MAX: u64 = 512 * GIB;
/// The first 4 GiB are always mapped: IOAPIC and local APIC live there.
const REACH_MIN: u64 = 4 * GIB;
const IOAPIC_BLOCK: u64 = 0xfec0_0000;
const LAPIC_BLOCK: u64 = 0xfee0_0000;

/// The assignment of a table to each mapped 4 KiB-split block and each GiB: in address order after the PML4 and the
/// PDPT.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    map: &'a MemoryMap,
    split: bool,
}

impl<'a> Plan<'a> {
    /// Maps the first 4 GiB and every GiB with RAM; `split`: RAM in 4 KiB pages.
    /// None when RAM reaches further than one PDPT.
    pub fn new(map: &'a MemoryMap, split: bool) -> Option<Self> {
        (map.end() <= REACH_MAX).then_some(Self { map, split })
    }

    /// The number of tables that [`Self::build`] needs.
    pub fn tables(&self) -> u64 {
        let blocks = self.gibs().flat_map(blocks_of).filter(|b| self.is_split(*b));
        2 + self.gibs().count() as u64 + blocks.count() as u64
    }

    /// Fills `tables`, which lie at physical `address`; the first one is the PML4.
    pub fn build(&self, tables: &mut [Table], address: u64) {
        let place = |i: usize| address + i as u64 * PAGE_SIZE;
        let mut next = 2;
        tables[0].fill(0);
        tables[1].fill(0);
        tables[0][0] = place(1) | TABLE_FLAGS;
        for gib in self.gibs() {
            let directory = next;
            next += 1;
            tables[1][(gib / GIB) as usize] = place(directory) | TABLE_FLAGS;
            for (i, block) in blocks_of(gib).enumerate() {
                tables[directory][i] = if self.is_split(block) {
                    for (page, entry) in tables[next].iter_mut().enumerate() {
                        *entry = (block + page as u64 * PAGE_SIZE) | PAGE_FLAGS;
                    }
                    next += 1;
                    place(next - 1) | TABLE_FLAGS
                } else if block == IOAPIC_BLOCK || block == LAPIC_BLOCK {
                    block | PAGE_FLAGS | LARGE | UNCACHED
                } else {
                    block | PAGE_FLAGS | LARGE
                };
            }
        }
    }

    fn gibs(&self) -> impl Iterator<Item = u64> + '_ {
        let mapped = |start: &u64| *start < REACH_MIN || self.has_ram(*start, GIB);
        (0..REACH_MAX / GIB).map(|g| g * GIB).filter(mapped)
    }

    fn is_split(&self, block: u64) -> bool {
        self.split && self.has_ram(block, BLOCK)
    }

    fn has_ram(&self, start: u64, len: u64) -> bool {
        self.map.has_ram_in(Range { start, end: start + len })
    }
}

fn blocks_of(gib: u64) -> impl Iterator<Item = u64> {
    (0..PAGE_WORDS).map(move |i| gib + i * BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 0x80_0000;

    fn built(map: &MemoryMap, split: bool) -> Vec<Table> {
        let plan = Plan::new(map, split).unwrap();
        let mut tables = vec![[0xdead_u64; 512]; plan.tables() as usize];
        plan.build(&mut tables, AT);
        tables
    }

    /// Walks the tables like the hardware: (physical address, leaf flags).
    fn walk(tables: &[Table], address: u64) -> Option<(u64, u64)> {
        let mut at = 0;
        for shift in [39, 30, 21, 12] {
            let entry = tables[at][(address >> shift) as usize & 511];
            if entry & 1 == 0 {
                return None;
            }
            assert_eq!(entry & 0x27, 0x27, "present, writable, user, accessed");
            if shift == 12 || entry & LARGE != 0 {
                let offset = (1 << shift) - 1;
                return Some(((entry & !0xfff & !offset) | (address & offset), entry & 0xfff));
            }
            at = ((entry & !0xfff) - AT) as usize / 4096;
        }
        unreachable!()
    }

    fn map(mib: u64, high_mib: u64) -> MemoryMap {
        let entries = [(0, 0x9fc00, 1), (1 << 20, (mib - 1) << 20, 1), (4 << 30, high_mib << 20, 1)];
        MemoryMap::parse(entries.into_iter()).unwrap()
    }

    #[test]
    fn two_mib_tables_map_everything_onto_itself() {
        let tables = built(&map(3072, 61 << 10), false);
        assert_eq!(tables.len(), 2 + 4 + 61);
        for a in [0, 0x10_1234, 0xfec0_0000, 0xfee0_00b0, 0x1_0000_0000, (65 << 30) - 8] {
            let (physical, flags) = walk(&tables, a).unwrap();
            assert_eq!(physical, a);
            assert_eq!(flags & 0xe0, 0xe0, "large, dirty, accessed");
            assert_eq!(flags & UNCACHED != 0, a >> 24 == 0xfe);
        }
        assert_eq!(walk(&tables, 65 << 30), None);
    }

    #[test]
    fn four_kib_tables_split_ram_and_nothing_else() {
        let tables = built(&map(512, 2), true);
        assert_eq!(tables.len(), 2 + 5 + 256 + 1);
        for a in [0x9_fc00, 0x1fff_fff8, 0x1_0000_0000, 0x1_001f_ffff] {
            assert_eq!(walk(&tables, a), Some((a, PAGE_FLAGS)));
        }
        for a in [0x2000_0000, 0xfee0_0000, 0x1_0020_0000] {
            let (physical, flags) = walk(&tables, a).unwrap();
            assert_eq!(physical, a);
            assert_ne!(flags & LARGE, 0);
        }
    }

    #[test]
    fn ram_beyond_the_reach_is_refused() {
        let entries = [(REACH_MAX, 4096, 1)];
        assert!(Plan::new(&MemoryMap::parse(entries.into_iter()).unwrap(), false).is_none());
    }
}
