//! `firecracker-uffd`: nothing is mapped, a userfaultfd handler installs each page when it is touched (Firecracker
//! `docs/snapshotting/handling-page-faults-on-snapshot-resume.md`, `mem_backend` Uffd, with the example handler that
//! answers one page at a time).
//!
//! Differences in tvmm: the handler is a thread of the VMM, not another process. As in Firecracker, zero pages of a
//! full snapshot are faults too (its memory file has them as holes). In a chain they are anonymous memory: the handler
//! is not to search several files for the hole.

use super::facts::PolicyFacts;
use super::place;
use crate::snapshot::{Placement, PlannedExtent};

pub fn plan(facts: &PolicyFacts) -> Vec<PlannedExtent> {
    if facts.is_one_file() {
        return place::whole_file(facts.layout, Placement::Lazy);
    }
    place::by_content(facts.resolved, |extent, source| PlannedExtent::from(extent, Placement::Lazy, source))
}
