//! `firecracker`: the memory file is mapped private and pages come from the page cache when they are touched
//! (Firecracker `docs/snapshotting/snapshot-support.md`, `mem_backend` File: `MAP_PRIVATE | MAP_NORESERVE`, no
//! prefault).
//!
//! Differences in tvmm: Firecracker merges diffs into one file before it loads it; here a chain is mapped as it is, one
//! mapping for each run of pages that one layer holds.

use super::facts::PolicyFacts;
use super::place;
use crate::snapshot::{Placement, PlannedExtent};

pub fn plan(facts: &PolicyFacts) -> Vec<PlannedExtent> {
    if facts.is_one_file() {
        return place::whole_file(facts.layout, Placement::CowFile);
    }
    place::by_content(facts.resolved, |extent, source| facts.mapped(extent, source))
}
