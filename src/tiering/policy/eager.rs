//! `eager`: the whole image is read into local DRAM before the guest runs, as QEMU and Cloud Hypervisor restore by
//! default. No fault costs more than an anonymous page; start-up pays for pages that are never touched. Zero pages are
//! not read: they are anonymous memory.

use super::facts::PolicyFacts;
use super::place;
use crate::snapshot::{Fill, PlannedExtent};

pub fn plan(facts: &PolicyFacts) -> Vec<PlannedExtent> {
    place::by_content(facts.resolved, |extent, source| PlannedExtent::preload(extent, source, Fill::Copy))
}
