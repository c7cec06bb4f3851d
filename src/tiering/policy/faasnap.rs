//! `faasnap` (Ao, Porter, Voelker, "FaaSnap: FaaS Made Fast Using Snapshot-based VMs", EuroSys 2022). Guest memory is
//! anonymous; regions that are not zero are mapped over it from the memory file; regions of the loading set are mapped
//! over those from a compact loading-set file, sorted by (group of first touch, address), which a second thread reads
//! into the page cache while the guest already runs. Both kinds of regions swallow gaps of fewer than 32 pages.
//!
//! The groups are the layers of a `mincore` recording. From a recording with exact order tvmm makes groups of 1,024
//! pages as touched, as FaaSnap does when it emulates them from faults; without any order there is one group.
//!
//! Differences in tvmm: FaaSnap maps bottom-up, each region over the one below; a plan has the final mappings, and the
//! engine makes them without the overlaps. In a chain, regions are those of one layer, and only the tip's take in zero
//! pages (other files may have old data there).

use super::facts::PolicyFacts;
use super::place;
use super::place::{Packed, lay_over, merge_gaps};
use crate::snapshot::{Background, BackgroundAction, Content, Extent, PageSet, Placement, PlannedExtent, RestorePlan};
use crate::tiering::profile::{Order, Profile, nonzero};

/// FaaSnap's `interval_threshold`.
pub const GAP_PAGES: u64 = 32;
/// FaaSnap's `mincore_size`: pages in a group.
const GROUP_PAGES: u64 = 1024;

pub fn plan(facts: &PolicyFacts, profile: &Profile) -> RestorePlan {
    let loading = profile.loading_set(&nonzero(facts.resolved));
    let image = Packed::new(regions(facts, &groups(profile), &loading));
    let over = facts.placed(&image, |extent, source| facts.mapped(extent, source));
    let mut plan = facts.empty_plan("faasnap");
    plan.extents = lay_over(&nonzero_regions(facts), &over);
    // A region may cross from one layer's pages to the next, but from the image it comes in one piece.
    plan.coalesce(facts.layout);
    let read_ahead = |extent: &Extent| Background { action: BackgroundAction::ReadAhead, extent: *extent };
    if facts.tiers.is_empty() {
        plan.background = image.spec.extents.iter().map(read_ahead).collect();
    }
    plan.images = facts.images(image);
    plan
}

/// The touched pages in groups, in order of time.
fn groups(profile: &Profile) -> Vec<PageSet> {
    match &profile.order {
        Order::Layers(layers) => layers.clone(),
        Order::Unknown => vec![profile.working_set()],
        Order::Exact(extents) => {
            let mut groups = vec![PageSet::new()];
            let mut room = GROUP_PAGES;
            for extent in extents {
                let mut rest = *extent;
                while rest.pages > 0 {
                    let now = rest.pages.min(room);
                    if let Some(group) = groups.last_mut() {
                        group.insert_run(Extent { first: rest.first, pages: now });
                    }
                    rest = Extent { first: crate::snapshot::Gfn(rest.first.0 + now), pages: rest.pages - now };
                    room -= now;
                    if room == 0 {
                        groups.push(PageSet::new());
                        room = GROUP_PAGES;
                    }
                }
            }
            groups
        }
    }
}

/// The image's extents: group by group, by address within, short gaps taken in, no page twice.
fn regions(facts: &PolicyFacts, groups: &[PageSet], loading: &PageSet) -> Vec<Extent> {
    let mut taken = PageSet::new();
    let mut regions = Vec::new();
    for group in groups {
        let mut pages = group.intersection(loading);
        pages.subtract(&taken);
        let runs = pages.runs().flat_map(|run| facts.layout.split(run));
        let merged = merge_gaps(runs, GAP_PAGES, facts.layout, |gap| taken.len_in(gap) == 0);
        merged.iter().for_each(|region| taken.insert_run(*region));
        regions.extend(merged);
    }
    regions
}

/// Anonymous memory with the non-zero regions over it.
fn nonzero_regions(facts: &PolicyFacts) -> Vec<PlannedExtent> {
    let base = place::by_content(facts.resolved, |extent, source| facts.mapped(extent, source));
    if !facts.tiers.is_empty() {
        return base;
    }
    let tip = facts.layers - 1;
    let of_tip = |run: &&crate::snapshot::ResolvedRun| run.content.layer() == Some(tip);
    let others: PageSet = facts
        .resolved
        .iter()
        .filter(|run| run.content != Content::Zero && !of_tip(run))
        .map(|run| run.extent)
        .collect();
    let runs = facts.resolved.iter().filter(of_tip).map(|run| run.extent);
    let merged = merge_gaps(runs, GAP_PAGES, facts.layout, |gap| others.len_in(gap) == 0);
    let mapped = merged.into_iter().filter_map(|extent| {
        let source = place::hole(facts.layout, tip, extent.first)?;
        Some(place::Labelled(PlannedExtent::from(extent, Placement::CowFile, source)))
    });
    lay_over(&base, &mapped.collect::<Vec<_>>())
}
