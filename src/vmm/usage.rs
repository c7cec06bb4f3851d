//! What a VM costs the host in memory, read from `/proc/self/smaps` (kernel `Documentation/filesystems/proc.rst`).

use std::io::{BufRead, BufReader};

use serde::Serialize;

use super::error::Error;
use super::memory::GuestRam;

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
    /// Of guest RAM, what is not there: never touched, or lazy and not yet fetched.
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
    let (mut in_guest, mut hugetlb) = (false, 0);
    for line in BufReader::new(file).lines() {
        let line = line.map_err(Error::os("read /proc/self/smaps"))?;
        if let Some(start) = vma_start(&line) {
            in_guest = guest.iter().any(|&(from, to)| (from..to).contains(&start));
            usage.guest_vmas += u64::from(in_guest);
        } else if let Some((name, kib)) = field(&line) {
            match (name, in_guest) {
                ("Pss", true) => usage.guest_pss_kib += kib,
                ("Rss", true) => usage.guest_rss_kib += kib,
                ("Size", true) => usage.guest_absent_kib += kib,
                // Not what is private and dirty: pages of a tmpfs that nobody else maps are that, too.
                ("Anonymous", true) => usage.guest_private_kib += kib,
                ("Shared_Hugetlb" | "Private_Hugetlb", true) => hugetlb += kib,
                ("Pss", false) => usage.vmm_pss_kib += kib,
                ("Rss", false) => usage.vmm_rss_kib += kib,
                _ => {}
            }
        }
    }
    usage.guest_in_place_kib = (usage.guest_rss_kib + hugetlb).saturating_sub(usage.guest_private_kib);
    usage.guest_absent_kib = usage.guest_absent_kib.saturating_sub(usage.guest_rss_kib + hugetlb);
    Ok(usage)
}

/// The start address, if `line` is the first of a mapping.
fn vma_start(line: &str) -> Option<u64> {
    let (start, rest) = line.split_once('-')?;
    rest.contains(' ').then(|| u64::from_str_radix(start, 16).ok()).flatten()
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
        assert_eq!(vma_start("7f00-7f10 rw-p 00000000 00:00 0 "), Some(0x7f00));
        assert_eq!(vma_start("Pss:   12 kB"), None);
        assert_eq!(field("Pss:                 12 kB"), Some(("Pss", 12)));
        assert_eq!(field("VmFlags: rd wr mr"), None);
    }
}
