//! `trenv`: the whole image in place on memory that all hosts reach, copied on write, nothing preloaded (Huang et al.,
//! "TrEnv: Transparently Share Serverless Execution Environments Across Different Functions and Nodes", SOSP 2024; its
//! `mm-template` maps device DAX read-only in 4 KiB pages, RDMA lazily).
//!
//! Differences in tvmm: no kernel patch, the pages that are zero are anonymous memory, and where the image is a file in
//! the page cache it is mapped in 2 MiB folios. Sandboxes are not reused.

use super::facts::PolicyFacts;
use super::place;
use crate::snapshot::PlannedExtent;

pub fn plan(facts: &PolicyFacts) -> Vec<PlannedExtent> {
    place::by_content(facts.resolved, |extent, source| facts.in_place(extent, source))
}
