//! The memory of running VMs by place, as the kernel reports it (`/proc/PID/smaps`).

use std::fs::Metadata;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use serde::Serialize;

use crate::snapshot::PAGE_SIZE;
use crate::sys::pagemap::Pagemap;

/// Memory of one process, KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Resident {
    /// Pages of the pool that are mapped in place.
    pub pool_kib: u64,
    /// Pages that only this process has: copied from the pool on write, preloaded, zero pages that were written, and
    /// the monitor's own.
    pub local_kib: u64,
    /// Its share of everything (proportional set size).
    pub pss_kib: u64,
}

/// Reads the usage of a process that maps the file with this `metadata`; `None` if it has ended or belongs to another
/// user.
pub fn of(pid: u32, metadata: &Metadata) -> Option<Resident> {
    let device = metadata.dev();
    let file = std::fs::File::open(format!("/proc/{pid}/smaps")).ok()?;
    let pool = format!(" {:02x}:{:02x} {}", rustix::fs::major(device), rustix::fs::minor(device), metadata.ino());
    let mut usage = Resident::default();
    let pagemap = Pagemap::of(pid).ok()?;
    // The current mapping, if it is of the pool: its range, and the kernel's count.
    let mut mapped: Option<Range<u64>> = None;
    let mut rss = 0_u64;
    for line in BufReader::new(file).lines() {
        let line = line.ok()?;
        let Some((name, rest)) = line.split_once(':') else { continue };
        if name.contains('-') {
            mapped = range(&line).filter(|_| format!("{line} ").contains(&format!("{pool} ")));
            continue;
        }
        let Some(kib) = rest.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok()) else { continue };
        match name {
            "Rss" => rss = kib,
            "Pss" => usage.pss_kib += kib,
            "Anonymous" => {
                usage.local_kib += kib;
                usage.pool_kib += match (&mapped, rss.saturating_sub(kib)) {
                    (None, _) => 0,
                    // The kernel does not count device memory (DAX).
                    (Some(range), 0) => {
                        let pages = (range.end - range.start) / PAGE_SIZE;
                        pagemap.shown_pages(range.start, pages).ok()? * PAGE_SIZE / 1024
                    }
                    (Some(_), counted) => counted,
                };
            }
            _ => {}
        }
    }
    Some(usage)
}

/// The range of the mapping that `line` begins with.
fn range(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    (start <= end).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_local_memory_and_nothing_of_a_file_that_nobody_maps() {
        let file = tempfile::tempfile().unwrap();
        let metadata = file.metadata().unwrap();
        let usage = of(std::process::id(), &metadata).unwrap();
        assert_eq!(usage.pool_kib, 0);
        assert!(usage.local_kib > 0 && usage.pss_kib >= usage.local_kib);
        assert_eq!(of(u32::MAX, &metadata), None);
    }
}
