//! Page counts of a run: which pages came in by a read, which by a write, and from where.
//!
//! The fault service counts its own faults. The kernel faults in pages of mappings without a notification, so these are
//! counted from this process's page tables at the end. In a private mapping of a file, a page of its own was written
//! (copied); a page of the page cache was mapped for reading (touched, or the neighbour of a touched page: the kernel
//! maps up to 16 at once, or a whole huge folio). In anonymous memory a page of its own was written, the kernel's zero
//! page was read.

use serde::Serialize;

use super::fault_service::FaultCounts;
use super::guest_ram::{Backing, GuestRam};
use crate::memory::Error;
use crate::snapshot::{Extent, Gfn, PAGE_SIZE};
use crate::sys::pagemap::Pagemap;
use crate::sys::pagemap_scan::{Mapped, is_unsupported, mapped_runs};

/// Pages brought in since the machine was built, by tier and by kind of access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FaultIns {
    /// Pages of mapped files that are mapped for reading, neighbours included.
    pub file_mapped: u64,
    /// Pages of mapped files that were copied because they were written.
    pub file_copied: u64,
    /// Pages of anonymous memory that were only read.
    pub zero_read: u64,
    /// Pages of anonymous memory that were written.
    pub zero_written: u64,
    /// Pages put into local memory before the guest ran.
    pub preloaded: u64,
    /// Faults that the fault service answered.
    pub served: FaultCounts,
    /// Page faults of the vCPU threads that needed no I/O, as the kernel counts them.
    pub minor_faults: u64,
    /// Page faults of the vCPU threads that waited for I/O.
    pub major_faults: u64,
}

impl FaultIns {
    /// Pages that came in because the guest read them, as far as the kernel tells.
    pub fn by_read(&self) -> u64 {
        self.file_mapped + self.zero_read + self.served.read
    }

    /// Pages that came in because the guest wrote them.
    pub fn by_write(&self) -> u64 {
        self.file_copied + self.zero_written + self.served.write
    }
}

/// Counts now. Returns `None` before Linux 6.7, which has no PAGEMAP_SCAN.
pub fn count(ram: &GuestRam, served: FaultCounts) -> Result<Option<FaultIns>, Error> {
    let mut counts = FaultIns { served, ..FaultIns::default() };
    let pagemap = Pagemap::open().map_err(Error::os("open /proc/self/pagemap"))?;
    for (range, host) in ram.slots() {
        let first = range.gpa / PAGE_SIZE;
        let mut failed = None;
        let scanned = mapped_runs(host, range.len / PAGE_SIZE, |run, pages, what| {
            let added = add(&mut counts, ram, &pagemap, Extent { first: Gfn(first + run), pages }, what);
            failed = failed.take().or(added.err());
        });
        failed.map_or(Ok(()), |error| Err(Error::os("read /proc/self/pagemap")(error)))?;
        match scanned {
            Err(error) if is_unsupported(&error) => return Ok(None),
            result => result.map_err(Error::os("scan /proc/self/pagemap"))?,
        }
    }
    (counts.minor_faults, counts.major_faults) = vcpu_faults().map_err(Error::os("read the threads' fault counts"))?;
    Ok(Some(counts))
}

fn add(counts: &mut FaultIns, ram: &GuestRam, pagemap: &Pagemap, run: Extent, what: Mapped) -> std::io::Result<()> {
    let pieces = ram.pieces();
    let start = pieces.partition_point(|piece| piece.extent.end() <= run.first);
    for piece in pieces[start..].iter().take_while(|piece| piece.extent.first < run.end()) {
        let Some(part) = piece.extent.intersection(&run) else { continue };
        let counter = match (piece.backing, what) {
            (Backing::FilePrivate | Backing::InPlace, Mapped::Shared) => &mut counts.file_mapped,
            (Backing::FilePrivate | Backing::InPlace, Mapped::Own) => {
                // Persistent memory (DAX) looks like a copy to PAGEMAP_SCAN.
                let shown = match ram.host_address(part.first) {
                    Ok(address) => pagemap.shown_pages(address as u64, part.pages)?,
                    Err(_) => 0,
                };
                counts.file_mapped += shown;
                counts.file_copied += part.pages - shown.min(part.pages);
                continue;
            }
            (Backing::Anon, Mapped::Shared) => &mut counts.zero_read,
            (Backing::Anon, Mapped::Own) => &mut counts.zero_written,
            (Backing::Preloaded, _) => &mut counts.preloaded,
            // The fault service has counted these by kind of access.
            (Backing::Lazy, _) => continue,
        };
        *counter += part.pages;
    }
    Ok(())
}

/// Minor and major faults of the vCPU threads (proc(5), `/proc/pid/task/tid/stat`, fields 10 and 12).
fn vcpu_faults() -> std::io::Result<(u64, u64)> {
    let mut minor = 0;
    let mut major = 0;
    for entry in std::fs::read_dir("/proc/self/task")? {
        let stat = match std::fs::read_to_string(entry?.path().join("stat")) {
            Ok(stat) => stat,
            // The thread has ended meanwhile (ESRCH: while it was being read). It is no vCPU's.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => continue,
            Err(error) => return Err(error),
        };
        // The name stands in parentheses and may contain any character.
        let (Some(open), Some(close)) = (stat.find('('), stat.rfind(')')) else { continue };
        if !stat[open + 1..close].starts_with("vcpu") {
            continue;
        }
        let fields: Vec<&str> = stat[close + 1..].split_whitespace().collect();
        let field = |index: usize| fields.get(index).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        minor += field(7);
        major += field(9);
    }
    Ok((minor, major))
}
