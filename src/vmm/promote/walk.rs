//! The guest's page tables, read as the CPU reads them (Intel SDM vol. 3 ch. 4; AMD APM vol. 2 ch. 5). KVM_TRANSLATE will
//! not do: on some hosts it sets accessed bits, which is what cannot be written.

use kvm_bindings::kvm_sregs;

const PG: u64 = 1 << 31;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const FRAME: u64 = 0xf_ffff_ffff_f000;

/// Where a linear address leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// The guest-physical address; `None` if nothing is mapped there, or the tables lie outside RAM.
    pub gpa: Option<u64>,
    /// The guest-physical addresses of the entries on the way.
    pub entries: Vec<u64>,
}

/// How the guest's addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    root: u64,
    /// Levels of tables, and bytes of an entry. No levels: no paging.
    levels: u32,
    entry: u64,
    /// Whether entries of this level may be large pages.
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

    /// Follows `linear`; `read` gives the bytes of an entry at a guest-physical address, as many as it was asked for.
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

    /// The guest-physical addresses of all tables that can be reached and of which some entry lets the CPU write an
    /// accessed or dirty bit. `read` gives the entries of a table.
    pub fn tables_to_be_written(self, read: impl Fn(u64) -> Option<Vec<u64>>) -> Vec<u64> {
        const ACCESSED: u64 = 1 << 5;
        const WRITABLE_NOT_DIRTY: (u64, u64) = (1 << 1 | 1 << 6, 1 << 1);
        // More tables than this are no more than a guest of 1 TiB has; a loop of tables ends there.
        const TABLES_MAX: usize = 1 << 20;
        let (mut found, mut seen) = (Vec::new(), std::collections::HashSet::new());
        // Tables of other kinds are small, and old.
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
