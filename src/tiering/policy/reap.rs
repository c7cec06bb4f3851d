//! `reap`: record-and-prefetch (Ustiugov et al., "Benchmarking, Analysis, and Optimization of Serverless Function
//! Snapshots", ASPLOS 2021; vHive `memory/manager`). The pages that faulted in a recorded run are written to a compact
//! working-set file; a restore reads it past the page cache in one go and installs its pages before the guest runs. All
//! other pages are served one by one.
//!
//! As in vHive the file is sorted by address (its `trace.go` sorts the trace before it writes the file), so that
//! neighbours are installed by one call, and it has *every* page that faulted: REAP knows no zero pages.
//!
//! Differences in tvmm: the handler is a thread of the VMM; in a chain, zero pages that no run touched are anonymous
//! memory, as in `firecracker-uffd`.

use super::facts::PolicyFacts;
use super::firecracker_uffd;
use super::place::{Packed, lay_over};
use crate::snapshot::{Fill, PlannedExtent, RestorePlan};
use crate::tiering::profile::Profile;

pub fn plan(facts: &PolicyFacts, profile: &Profile) -> RestorePlan {
    let touched = profile.working_set();
    let image = Packed::new(touched.runs().flat_map(|run| facts.layout.split(run)));
    let install = facts.placed(&image, |extent, source| PlannedExtent::preload(extent, source, Fill::Install));
    let mut plan = facts.empty_plan("reap");
    plan.extents = lay_over(&firecracker_uffd::plan(facts), &install);
    plan.images = facts.images(image);
    plan
}
