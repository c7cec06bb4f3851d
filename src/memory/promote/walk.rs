//! The guest's page tables, read as the CPU reads them (Intel SDM vol. 3 ch. 4; AMD APM vol. 2 ch. 5). KVM_TRANSLATE
//! cannot be used: on some hosts it sets accessed bits, which may be the very write that failed.

use kvm_bindings::kvm_sregs;

const PG: u64 = 1 << 31;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const FRAME: u64 = 0xf_ffff_ffff_f000;

/// The result of following a linear address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// The guest-physical address; `None` if nothing is mapped there, or the tables lie outside RAM.
    pub gpa: Option<u64>,
    /// The guest-physical addresses of the entries on the way.
    pub entries: Vec<u64>,
}

/// The mode in which the guest's addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    root: u64,
    /// Levels of tables, and bytes of an entry. No levels: no paging.
    levels: u32,
    entry: u64,
    /// The levels whose entries may be large pages.
    large_from: u32,
    large_to: u32,
}

impl Paging {
    pub fn of(sregs: &kvm_sregs) -> Paging {
        let has = |register: u64, bits: u64| register & bits == bits;
        let mode = |levels, entry, large_to| Paging { root: sregs.cr3 & FRAME, levels, entry, large_from: 2, large_to };
        if !has(sregs.cr0, PG) {
            return mode(0, 8, 0);
        }
        match (has(sregs.efer, LMA), has(sregs.cr4, PAE)) {
            (true, _) if has(sregs.cr4, LA57) => mode(5, 8, 3),
            (true, _) => mode(4, 8, 3),
            // The first table has four entries and need not be page aligned.
            (false, true) => Paging { root: sregs.cr3 & 0xffff_ffe0, ..mode(3, 8, 2) },
            (false, false) => mode(2, 4, if has(sregs.cr4, PSE) { 2 } else { 0 }),
        }
    }

    /// Follows `linear`; `read` returns the bytes of an entry at a guest-physical address, as many as asked for.
    pub fn walk(self, linear: u64, read: impl Fn(u64, usize) -> Option<u64>) -> Walk {
        let mut walk = Walk::default();
        let bits_per_level = if self.entry == 8 { 9 } else { 10 };
        let bits = match self.levels {
            0 | 2 | 3 => 32,
            levels => 12 + 9 * levels,
        };
        let low = linear & ((1 << bits) - 1);
        if self.levels == 0 {
            walk.gpa = Some(low);
            return walk;
        }
        let is_canonical = bits == 32 || ((linear as i64) << (64 - bits)) >> (64 - bits) == linear as i64;
        if !is_canonical {
            return walk;
        }
        let mut table = self.root;
        for level in (1..=self.levels).rev() {
            let shift = 12 + bits_per_level * (level - 1);
            let index = low >> shift & ((1 << bits_per_level) - 1);
            let at = table + index * self.entry;
            let Some(entry) = read(at, self.entry as usize) else { return walk };
            walk.entries.push(at);
            if entry & PRESENT == 0 {
                return walk;
            }
            let frame = entry & if self.entry == 8 { FRAME } else { 0xffff_f000 };
            let is_large = entry & LARGE != 0 && (self.large_from..=self.large_to).contains(&level);
            if level == 1 || is_large {
                let inside = (1_u64 << shift) - 1;
                // PSE-36: bits 32 to 39 of a 4 MiB page stand in bits 13 to 20.
                let high = if self.entry == 4 && is_large { (entry >> 13 & 0xff) << 32 } else { 0 };
                walk.gpa = Some(frame & !inside | high | low & inside);
                return walk;
            }
            table = frame;
        }
        walk
    }

    /// The guest-physical addresses of all reachable tables with an entry in which the CPU may set an accessed or dirty
    /// bit. `read` returns the entries of a table.
    pub fn tables_to_be_written(self, read: impl Fn(u64) -> Option<Vec<u64>>) -> Vec<u64> {
        const ACCESSED: u64 = 1 << 5;
        const WRITABLE_NOT_DIRTY: (u64, u64) = (1 << 1 | 1 << 6, 1 << 1);
        // A guest of 1 TiB has no more tables than this; a loop of tables ends here.
        const TABLES_MAX: usize = 1 << 20;
        let mut found = Vec::new();
        let mut seen = std::collections::HashSet::new();
        // Other paging modes have few tables.
        if self.levels < 4 {
            return found;
        }
        let mut todo = vec![(self.root, self.levels)];
        while let Some((table, level)) = todo.pop() {
            if seen.len() >= TABLES_MAX || !seen.insert((table, level)) {
                continue;
            }
            let Some(entries) = read(table) else { continue };
            let mut written = false;
            for entry in entries.into_iter().filter(|entry| entry & PRESENT != 0) {
                let is_leaf = level == 1 || entry & LARGE != 0 && level <= self.large_to;
                let (mask, value) = WRITABLE_NOT_DIRTY;
                written |= entry & ACCESSED == 0 || is_leaf && entry & mask == value;
                if !is_leaf {
                    todo.push((entry & FRAME, level - 1));
                }
            }
            if written {
                found.push(table);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const P: u64 = 0x27;

    fn long(cr3: u64, la57: bool) -> Paging {
        let cr4 = PAE | if la57 { LA57 } else { 0 };
        Paging::of(&kvm_sregs { cr0: PG, cr3, cr4, efer: LMA, ..Default::default() })
    }

    fn reader(entries: &[(u64, u64)]) -> impl Fn(u64, usize) -> Option<u64> {
        let entries: HashMap<u64, u64> = entries.iter().copied().collect();
        move |at, _| Some(entries.get(&at).copied().unwrap_or(0))
    }

    #[test]
    fn every_paging_mode_leads_to_its_page() {
        let tables = [(0x1000, 0x2000 | P), (0x2008, 0x3000 | P), (0x3010, 0x4000 | P), (0x4018, 0x77_0000 | P)];
        let linear = 1 << 30 | 2 << 21 | 3 << 12 | 0x123;
        let walk = long(0x1000, false).walk(linear, reader(&tables));
        assert_eq!(walk, Walk { gpa: Some(0x77_0123), entries: vec![0x1000, 0x2008, 0x3010, 0x4018] });
        let five = [&[(0x9000, 0x1000 | P)], &tables[..]].concat();
        assert_eq!(long(0x9000, true).walk(linear, reader(&five)).gpa, Some(0x77_0123));
        let large = [(0x1000, 0x2000 | P), (0x2008, 0x3000 | P), (0x3010, 0xa0_0000 | P | LARGE)];
        assert_eq!(long(0x1000, false).walk(linear, reader(&large)).gpa, Some(0xa0_3123));
        let huge = [(0x1000, 0x2000 | P), (0x2008, 0x8000_0000 | P | LARGE)];
        assert_eq!(long(0x1000, false).walk(linear, reader(&huge)).gpa, Some(0x8000_0000 | linear & 0x3fff_ffff));
        let pae = Paging::of(&kvm_sregs { cr0: PG, cr3: 0x1020, cr4: PAE, ..Default::default() });
        let tables = [(0x1028, 0x2001), (0x2010, 0x3000 | P), (0x3018, 0x5000 | P)];
        assert_eq!(pae.walk(linear, reader(&tables)).gpa, Some(0x5123));
        let old = Paging::of(&kvm_sregs { cr0: PG, cr3: 0x1000, cr4: PSE, ..Default::default() });
        let tables = [(0x1000 + 4 * (linear >> 22), 0x2000 | P), (0x2000 + 4 * (linear >> 12 & 0x3ff), 0x6000 | P)];
        assert_eq!(old.walk(linear, reader(&tables)).gpa, Some(0x6123));
        let none = Paging::of(&kvm_sregs::default());
        assert_eq!(none.walk(0x1_2345_6789, reader(&[])), Walk { gpa: Some(0x2345_6789), entries: vec![] });
    }

    #[test]
    fn what_is_not_mapped_leads_nowhere() {
        assert_eq!(long(0x1000, false).walk(0x123, |_, _| None), Walk::default(), "tables outside RAM");
        let walk = long(0x1000, false).walk(0x123, reader(&[]));
        assert_eq!(walk, Walk { gpa: None, entries: vec![0x1000] });
        assert_eq!(long(0x1000, false).walk(1 << 47, reader(&[])), Walk::default(), "not canonical");
        assert_eq!(long(0x1000, false).walk(u64::MAX, reader(&[])).entries, [0x1ff8]);
    }

    #[test]
    fn tables_that_the_cpu_would_mark_are_found() {
        let read = |table| {
            let entries: &[u64] = match table {
                0x1000 => &[0x2000 | P, 0x3000 | P, 0x1000 | P],
                // A table below, not accessed; a large page, accessed and read-only.
                0x2000 => &[0x4000 | 7],
                0x3000 => &[0x20_0000 | LARGE | 0x25],
                // Leaves: accessed and writable, not dirty.
                0x4000 => &[0x5000 | 0x67, 0x6000 | 0x27],
                _ => return None,
            };
            Some(entries.to_vec())
        };
        // Levels count down: a table at one level is a page at the lowest.
        let mut found = Paging { levels: 4, ..long(0x1000, false) }.tables_to_be_written(read);
        found.sort_unstable();
        assert!(found.contains(&0x2000) && found.contains(&0x4000) && !found.contains(&0x3000), "{found:x?}");
    }

    proptest! {
        #[test]
        fn garbage_for_tables_ends_somewhere(seed: u64, linear: u64, cr0: u64, cr3: u64, cr4: u64, efer: u64) {
            let paging = Paging::of(&kvm_sregs { cr0, cr3, cr4, efer, ..Default::default() });
            let garbage = |at: u64| (at ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let walk = paging.walk(linear, |at, _| Some(garbage(at)));
            prop_assert!(walk.entries.len() <= 5);
            // A small memory in which every table leads to others, itself included.
            let entries = |table: u64| (0..512).map(|i| garbage(table + i) & 0x3_ffff).collect();
            let read = |table: u64| (table < 64 << 12).then(|| entries(table));
            prop_assert!(paging.tables_to_be_written(read).len() <= 64 * 5);
        }
    }
}
