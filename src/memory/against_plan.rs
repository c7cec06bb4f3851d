//! Guest memory beside the plan that it was restored by.

use super::files::Files;
use super::guest_ram::GuestRam;
use super::reads::{self, Wanted};
use crate::memory::Error;
use crate::snapshot::{Extent, PAGE_SIZE, PageSet, PlannedExtent, RestorePlan};

/// Returns the parts of `pages` that lie in one extent of the plan each, with that extent, ascending.
pub fn parts<'p>(plan: &'p RestorePlan, pages: &PageSet) -> Vec<(&'p PlannedExtent, Extent)> {
    let mut parts = Vec::new();
    let mut at = 0;
    for run in pages.runs() {
        while plan.extents.get(at).is_some_and(|planned| planned.extent.end() <= run.first) {
            at += 1;
        }
        for planned in plan.extents[at..].iter().take_while(|planned| planned.extent.first < run.end()) {
            if let Some(part) = planned.extent.intersection(&run) {
                parts.push((planned, part));
            }
        }
    }
    parts
}

/// Guest memory and the sources it was restored from. No vCPU runs and all devices are quiet.
pub struct AgainstPlan<'a> {
    ram: &'a GuestRam,
    files: &'a Files,
    /// Room for the bytes of the source.
    expected: &'a mut Vec<u8>,
}

impl<'a> AgainstPlan<'a> {
    pub fn new(ram: &'a GuestRam, files: &'a Files, expected: &'a mut Vec<u8>) -> Self {
        AgainstPlan { ram, files, expected }
    }

    /// Compares the pages of `part`, which lies in `planned`, with their source. Returns the runs of pages that are
    /// alike, ascending, and whether they equal the source.
    pub fn runs(&mut self, planned: &PlannedExtent, part: Extent) -> Result<Vec<(Extent, bool)>, Error> {
        self.expected.resize(part.bytes() as usize, 0);
        match planned.source_at(part.first) {
            Some(source) => drop(reads::fill(self.files, vec![Wanted { source, bytes: self.expected }], false)?),
            None => self.expected.fill(0),
        }
        // SAFETY: no vCPU runs and all devices are quiet (see `AgainstPlan`).
        let bytes = unsafe { self.ram.bytes(part) }?;
        let page = PAGE_SIZE as usize;
        let pairs = bytes.chunks_exact(page).zip(self.expected.chunks_exact(page));
        let equal: Vec<bool> = pairs.map(|(has, expected)| has == expected).collect();
        let mut first = part.first;
        let run = |alike: &[bool]| {
            let run = Extent { first, pages: alike.len() as u64 };
            first = run.end();
            (run, alike[0])
        };
        Ok(equal.chunk_by(|a, b| a == b).map(run).collect())
    }
}
