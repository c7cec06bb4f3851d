//! `aquifer` (Hu, Li, Yang, "Aquifer: Hierarchical Memory Pooling with CXL and RDMA for MicroVM Snapshots", arXiv
//! 2606.24079, 2026; only its abstract was read). A snapshot is laid out by hotness: zero pages are not stored, the
//! hot working set is in the CXL pool and copied into local memory before the VM resumes, cold pages are in the RDMA
//! pool and demand-paged asynchronously.
//!
//! Differences in tvmm: hot pages are copied from an image of the loading set in any tier, cold pages come from the
//! snapshot's files. "Asynchronously" is rendered as a second thread that installs the cold pages in order of address
//! while faults are answered at once. The abstract does not say how much one fault fetches; 16 pages (64 KiB) are
//! tvmm's choice, the snapshot's own checksum chunk.

use super::facts::PolicyFacts;
use super::place;
use super::place::{Packed, lay_over};
use crate::snapshot::{Background, BackgroundAction, CHUNK_PAGES, Fill, Placement, PlannedExtent, RestorePlan};
use crate::tiering::profile::{Profile, nonzero};

pub fn plan(facts: &PolicyFacts, profile: &Profile) -> RestorePlan {
    let hot = profile.loading_set(&nonzero(facts.resolved));
    let image = Packed::new(hot.runs().flat_map(|run| facts.layout.split(run)));
    let copied = facts.placed(&image, |extent, source| PlannedExtent::preload(extent, source, Fill::Copy));
    let cold = place::by_content(facts.resolved, |extent, source| PlannedExtent::from(extent, Placement::Lazy, source));
    let mut plan = facts.empty_plan("aquifer");
    plan.extents = lay_over(&cold, &copied);
    plan.coalesce(facts.layout);
    let is_cold = |item: &&PlannedExtent| item.placement == Placement::Lazy;
    let install = |item: &PlannedExtent| Background { action: BackgroundAction::Install, extent: item.extent };
    plan.background = plan.extents.iter().filter(is_cold).map(install).collect();
    plan.images = facts.images(image);
    plan.fault_pages = CHUNK_PAGES;
    plan
}
