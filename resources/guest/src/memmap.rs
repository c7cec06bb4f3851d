//! The memory map: RAM ranges out of an e820 table or a PVH memory map.
//!
//! Both come as (address, size, type) with type 1 = RAM (Linux Documentation/arch/x86/boot.rst and
//! zero-page.rst; Xen xen/include/public/arch-x86/hvm/start_info.h).

use crate::PAGE_SIZE;

/// Entries that a boot protocol can hand over: E820_MAX_ENTRIES_ZEROPAGE of Linux.
pub const ENTRIES_MAX: usize = 128;
const RANGES_MAX: usize = 2 * ENTRIES_MAX;
/// Type of usable RAM in both tables.
pub const TYPE_RAM: u32 = 1;
/// No x86-64 machine has more physical address bits than this.
const ADDRESS_MAX: u64 = 1 << 52;

/// A range of physical addresses, `start..end`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub end: u64,
}

impl Range {
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    pub const fn is_empty(self) -> bool {
        self.start >= self.end
    }
}

/// Usable RAM: sorted, disjoint, without neighbours that touch.
#[derive(Clone, Debug)]
pub struct MemoryMap {
    ram: [Range; RANGES_MAX],
    len: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    TooManyEntries,
    NoRam,
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::TooManyEntries => "memory map has too many entries",
            Self::NoRam => "memory map has no RAM",
        })
    }
}

impl MemoryMap {
    /// Reads `entries` of (address, size, type). RAM that overlaps an entry of another type is not RAM.
    pub fn parse<I>(entries: I) -> Result<Self, Error>
    where
        I: Iterator<Item = (u64, u64, u32)> + Clone,
    {
        if entries.clone().count() > ENTRIES_MAX {
            return Err(Error::TooManyEntries);
        }
        let mut map = Self { ram: [Range::default(); RANGES_MAX], len: 0 };
        let ranges = entries.map(|(addr, size, kind)| {
            let start = addr.min(ADDRESS_MAX);
            let end = addr.saturating_add(size).min(ADDRESS_MAX);
            (Range { start, end }, kind)
        });
        for (range, _) in ranges.clone().filter(|r| r.1 == TYPE_RAM && !r.0.is_empty()) {
            map.ram[map.len] = range;
            map.len += 1;
        }
        map.merge();
        for (range, _) in ranges.filter(|r| r.1 != TYPE_RAM && !r.0.is_empty()) {
            map.subtract(range)?;
        }
        if map.len == 0 {
            return Err(Error::NoRam);
        }
        Ok(map)
    }

    pub fn ram(&self) -> &[Range] {
        &self.ram[..self.len]
    }

    /// All RAM in MiB, rounded up: the holes below 1 MiB do not make a 512 MiB machine a 511 MiB one.
    pub fn mib(&self) -> u64 {
        self.ram().iter().map(|r| r.len()).sum::<u64>().div_ceil(1 << 20)
    }

    /// The whole pages of RAM at or above `floor`.
    pub fn pages_above(&self, floor: u64) -> impl Iterator<Item = Range> + '_ {
        self.ram().iter().filter_map(move |r| {
            let range =
                Range { start: r.start.max(floor).next_multiple_of(PAGE_SIZE), end: r.end / PAGE_SIZE * PAGE_SIZE };
            (!range.is_empty()).then_some(range)
        })
    }

    /// The first address above all RAM.
    pub fn end(&self) -> u64 {
        self.ram().last().map_or(0, |r| r.end)
    }

    /// True if any RAM lies in `range`.
    pub fn has_ram_in(&self, range: Range) -> bool {
        self.ram().iter().any(|r| r.start < range.end && range.start < r.end)
    }

    fn merge(&mut self) {
        self.ram[..self.len].sort_unstable_by_key(|r| r.start);
        let mut kept = 0;
        for i in 0..self.len {
            let next = self.ram[i];
            if kept > 0 && next.start <= self.ram[kept - 1].end {
                self.ram[kept - 1].end = self.ram[kept - 1].end.max(next.end);
            } else {
                self.ram[kept] = next;
                kept += 1;
            }
        }
        self.len = kept;
    }

    fn subtract(&mut self, hole: Range) -> Result<(), Error> {
        let mut i = 0;
        while i < self.len {
            let r = self.ram[i];
            let below = Range { start: r.start, end: r.end.min(hole.start) };
            let above = Range { start: r.start.max(hole.end), end: r.end };
            let pieces = [below, above];
            let mut left = pieces.iter().filter(|p| !p.is_empty());
            match (left.next(), left.next()) {
                (Some(a), Some(b)) => {
                    if self.len == RANGES_MAX {
                        return Err(Error::TooManyEntries);
                    }
                    self.ram.copy_within(i + 1..self.len, i + 2);
                    self.ram[i] = *a;
                    self.ram[i + 1] = *b;
                    self.len += 1;
                    i += 2;
                }
                (Some(a), None) => {
                    self.ram[i] = *a;
                    i += 1;
                }
                (None, _) => {
                    self.ram.copy_within(i + 1..self.len, i);
                    self.len -= 1;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(entries: &[(u64, u64, u32)]) -> Result<MemoryMap, Error> {
        MemoryMap::parse(entries.iter().copied())
    }

    fn ranges(entries: &[(u64, u64, u32)]) -> Vec<(u64, u64)> {
        parse(entries).unwrap().ram().iter().map(|r| (r.start, r.end)).collect()
    }

    #[test]
    fn a_512_mib_machine_with_the_low_hole_has_512_mib() {
        let map = parse(&[(0, 0x9fc00, 1), (0x10_0000, 0x1ff0_0000, 1)]).unwrap();
        assert_eq!(map.mib(), 512);
        assert_eq!(map.end(), 512 << 20);
    }

    #[test]
    fn unsorted_overlapping_ram_is_merged() {
        assert_eq!(ranges(&[(0x3000, 0x1000, 1), (0, 0x1000, 1), (0x1000, 0x2800, 1)]), [(0, 0x4000)]);
    }

    #[test]
    fn reserved_ranges_are_cut_out_of_ram() {
        let ram = (0x1000, 0x9000, 1);
        assert_eq!(ranges(&[ram, (0x3000, 0x1000, 2)]), [(0x1000, 0x3000), (0x4000, 0xa000)]);
        assert_eq!(ranges(&[ram, (0, 0x2000, 2)]), [(0x2000, 0xa000)]);
        assert_eq!(ranges(&[ram, (0x9000, 0x9000, 2)]), [(0x1000, 0x9000)]);
        assert_eq!(ranges(&[ram, (0xb000, 0x1000, 2)]), [(0x1000, 0xa000)]);
        assert_eq!(ranges(&[ram, (0, 0x1000, 2)]), [(0x1000, 0xa000)]);
        assert_eq!(parse(&[ram, (0, u64::MAX, 2)]).unwrap_err(), Error::NoRam);
    }

    #[test]
    fn sizes_that_overflow_do_not_wrap() {
        assert_eq!(ranges(&[(1 << 40, u64::MAX, 1)]), [(1 << 40, 1 << 52)]);
        assert_eq!(parse(&[(u64::MAX, u64::MAX, 1)]).unwrap_err(), Error::NoRam);
    }

    #[test]
    fn too_many_entries_and_no_entries_are_errors() {
        assert_eq!(parse(&[(0, 1, 1); 129]).unwrap_err(), Error::TooManyEntries);
        assert_eq!(parse(&[]).unwrap_err(), Error::NoRam);
    }

    #[test]
    fn pages_above_rounds_inwards() {
        let map = parse(&[(0x800, 0x2000, 1), (0x10_0000, 0x1_0800, 1)]).unwrap();
        let pages: Vec<_> = map.pages_above(0x1000).map(|r| (r.start, r.end)).collect();
        assert_eq!(pages, [(0x1000, 0x2000), (0x10_0000, 0x11_0000)]);
        assert!(map.has_ram_in(Range { start: 0, end: 0x801 }));
        assert!(!map.has_ram_in(Range { start: 0x3000, end: 0x10_0000 }));
    }
}
