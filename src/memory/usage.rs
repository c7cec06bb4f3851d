//! The memory that a VM costs the host, read from `/proc/self/smaps` (kernel `Documentation/filesystems/proc.rst`).

use std::io::{BufRead, BufReader};

use serde::Serialize;

use super::guest_ram::GuestRam;
use crate::memory::Error;
use crate::snapshot::PAGE_SIZE;
use crate::sys::pagemap::Pagemap;

/// Memory of this process, KiB, split into guest RAM and everything else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Proportional set size of guest RAM: pages shared with other processes count in part.
    pub guest_pss_kib: u64,
    pub guest_rss_kib: u64,
    /// Of guest RAM, pages that only this process has and that no file backs: its local DRAM.
    pub guest_private_kib: u64,
    /// Of guest RAM, pages of files and pools that are mapped where they are, and cost no local DRAM of this VM.
    pub guest_in_place_kib: u64,
    /// Of guest RAM, absent pages: never touched, or lazy and not yet fetched.
    pub guest_absent_kib: u64,
    /// Mappings that make up guest RAM.
    pub guest_vmas: u64,
    /// Everything that is not guest RAM: the VMM itself.
    pub vmm_pss_kib: u64,
    pub vmm_rss_kib: u64,
}

/// Reads this process's usage.
pub fn read(ram: &GuestRam) -> Result<Usage, Error> {
    let guest: Vec<(u64, u64)> = ram.slots().map(|(range, host)| (host as u64, host as u64 + range.len)).collect();
    let file = std::fs::File::open("/proc/self/smaps").map_err(Error::os("open /proc/self/smaps"))?;
    let mut usage = Usage::default();
    let mut vmas = Vec::new();
    let mut in_guest = false;
    for line in BufReader::new(file).lines() {
        let line = line.map_err(Error::os("read /proc/self/smaps"))?;
        if let Some(vma) = Vma::parse(&line) {
            in_guest = guest.iter().any(|&(from, to)| (from..to).contains(&vma.start));
            if in_guest {
                vmas.push(vma);
            }
        } else if let Some((name, kib)) = field(&line) {
            match (name, vmas.last_mut().filter(|_| in_guest)) {
                ("Pss", Some(_)) => usage.guest_pss_kib += kib,
                ("Rss", Some(vma)) => vma.rss_kib = kib,
                // `Private_Dirty` would be wrong: it also counts tmpfs pages that no other process maps.
                ("Anonymous", Some(vma)) => vma.anonymous_kib = kib,
                ("Shared_Hugetlb" | "Private_Hugetlb", Some(vma)) => vma.hugetlb_kib += kib,
                ("Pss", None) => usage.vmm_pss_kib += kib,
                ("Rss", None) => usage.vmm_rss_kib += kib,
                _ => {}
            }
        }
    }
    let pagemap = Pagemap::open().map_err(Error::os("open /proc/self/pagemap"))?;
    usage.guest_vmas = vmas.len() as u64;
    for vma in vmas {
        let in_place = vma.in_place_kib(&pagemap).map_err(Error::os("read /proc/self/pagemap"))?;
        usage.guest_rss_kib += vma.rss_kib;
        usage.guest_private_kib += vma.anonymous_kib;
        usage.guest_in_place_kib += in_place;
        usage.guest_absent_kib += (vma.len / 1024).saturating_sub(vma.anonymous_kib + in_place);
    }
    Ok(usage)
}

/// A mapping, and the kernel's counts for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Vma {
    start: u64,
    /// Bytes.
    len: u64,
    /// True for a mapping of a file.
    of_file: bool,
    rss_kib: u64,
    anonymous_kib: u64,
    hugetlb_kib: u64,
}

impl Vma {
    /// Parses `line` if it is the first of a mapping (`start-end mode offset device inode path`).
    fn parse(line: &str) -> Option<Vma> {
        let (start, rest) = line.split_once('-')?;
        let (end, rest) = rest.split_once(' ')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        let of_file = rest.split(' ').nth(3)? != "0";
        Some(Vma { start, len: end.checked_sub(start)?, of_file, ..Vma::default() })
    }

    /// KiB of its file that it shows. The kernel does not count device memory (DAX), which is counted here from the
    /// page map.
    fn in_place_kib(&self, pagemap: &Pagemap) -> std::io::Result<u64> {
        match (self.rss_kib + self.hugetlb_kib).saturating_sub(self.anonymous_kib) {
            0 if self.of_file => Ok(pagemap.shown_pages(self.start, self.len / PAGE_SIZE)? * PAGE_SIZE / 1024),
            counted => Ok(counted),
        }
    }
}

fn field(line: &str) -> Option<(&str, u64)> {
    let (name, value) = line.split_once(':')?;
    Some((name, value.trim().strip_suffix(" kB")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaps_lines_are_told_apart() {
        let vma = Vma { start: 0x7000, len: 0x2000, ..Vma::default() };
        assert_eq!(Vma::parse("7000-9000 rw-p 00000000 00:00 0 "), Some(vma));
        assert_eq!(Vma::parse("7000-9000 r--s 00001000 fd:01 77 /a b"), Some(Vma { of_file: true, ..vma }));
        assert_eq!(Vma::parse("Pss:   12 kB"), None);
        assert_eq!(field("Pss:                 12 kB"), Some(("Pss", 12)));
        assert_eq!(field("VmFlags: rd wr mr"), None);
    }
}
