//! The restore policies by name. One file each; `docs/policies.md` describes their papers and tvmm's versions.

mod aquifer;
mod catalyzer;
mod eager;
mod estimate;
mod faasnap;
mod firecracker;
mod firecracker_uffd;
mod model;
mod place;
mod reap;
mod tiered;
mod touches;
mod trenv;

#[cfg(test)]
mod chain_tests;
#[cfg(test)]
mod speed;
#[cfg(test)]
mod tests;

use super::Error;
use super::costs::Costs;
use super::profile::Profile;
use crate::snapshot::{
    Chain, Content, Extent, Gfn, MemoryLayout, PAGE_SIZE, PageOrigin, PageSource, Placement, PlannedExtent,
    ResolvedRun, RestorePlan, SnapshotId, TierAccess, TierSource,
};

use place::Labelled;
pub(super) use place::advance;

pub use crate::snapshot::{DRAM_PRICE_US, Policy};
pub use estimate::Estimate;

/// The most memory of each kind that a plan may use. `None`: unlimited. Only `tiered` makes choices that a budget can
/// change; the other policies do what their papers do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// Pages of local memory: those preloaded, and those that the request will write.
    pub dram_pages: Option<u64>,
    /// Pages mapped in place from a pool.
    pub cxl_pages: Option<u64>,
    /// The worth of a page of local memory that the request does not write, as extra ns that a request may take to save
    /// it. 0 optimises time only.
    pub dram_page_ns: u64,
}

impl Budget {
    /// A budget in MiB, with a price in µs per MiB. More MiB than can be counted in pages are no limit.
    pub fn of_mib(dram: Option<u64>, cxl: Option<u64>, dram_price_us: u64) -> Budget {
        let pages = |mib: Option<u64>| mib.map(|mib| mib.saturating_mul((1 << 20) / PAGE_SIZE));
        Budget { dram_pages: pages(dram), cxl_pages: pages(cxl), dram_page_ns: page_price_ns(dram_price_us) }
    }
}

/// Converts a price per MiB to a price per page.
fn page_price_ns(us_per_mib: u64) -> u64 {
    us_per_mib.saturating_mul(1000) / ((1 << 20) / PAGE_SIZE)
}

/// The inputs of a policy.
#[derive(Clone, Copy, Debug)]
pub struct PolicyInput<'a> {
    /// The snapshot to be restored.
    pub chain: &'a Chain,
    /// [`Chain::resolve`], with sources in the tiers where they have pages; may be empty if the policy does not
    /// [need](Policy::needs_pages) it.
    pub resolved: &'a [ResolvedRun],
    /// The tiers that `resolved` refers to, in the order of their index.
    pub tiers: &'a [TierSource],
    /// The record of a run.
    pub profile: Option<&'a Profile>,
    /// The costs of this host.
    pub costs: &'a Costs,
    /// The limits of the plan.
    pub budget: Budget,
}

impl<'a> PolicyInput<'a> {
    fn ground(&self) -> Ground<'a> {
        Ground {
            snapshot: self.chain.tip().id(),
            layout: self.chain.layout(),
            layers: self.chain.layers().len(),
            tiers: self.tiers,
            resolved: self.resolved,
            costs: self.costs,
            page_ns: 0.0,
        }
    }

    /// The expected cost of `plan`. Without a profile no touches are expected.
    pub fn estimate(&self, plan: &RestorePlan) -> Estimate {
        let touches = self.profile.map(|profile| touches::expected(profile, self.resolved)).unwrap_or_default();
        estimate::estimate(plan, &self.ground(), &touches)
    }
}

/// The facts that policies use of a chain, without its files.
#[derive(Clone, Copy)]
struct Ground<'a> {
    snapshot: SnapshotId,
    layout: &'a MemoryLayout,
    /// Number of layers; never 0.
    layers: usize,
    tiers: &'a [TierSource],
    resolved: &'a [ResolvedRun],
    costs: &'a Costs,
    /// The worth, ns, of a page of local memory that no profiled write needs.
    page_ns: f64,
}

impl<'a> Ground<'a> {
    fn empty_plan(&self, policy: &str) -> RestorePlan {
        RestorePlan { tiers: self.tiers.to_vec(), ..RestorePlan::new(self.snapshot, policy, Vec::new()) }
    }

    /// The source of zeros for a page that is zero in the snapshot: a hole of the tip's memory file. `None` with tiers,
    /// because memory files may not exist then.
    fn hole(&self, first: Gfn) -> Option<PageSource> {
        let tip = self.layers.checked_sub(1).filter(|_| self.tiers.is_empty())?;
        place::hole(self.layout, tip, first)
    }

    /// The access of the tier with these bytes; `None` if no tier has them.
    fn access(&self, origin: PageOrigin) -> Option<TierAccess> {
        TierSource::access_of(self.tiers, origin)
    }

    /// Pages mapped on demand: as `cow-file` where the kernel copies written pages, else in place.
    fn mapped(&self, extent: Extent, source: PageSource) -> PlannedExtent {
        let placement = match self.access(source.origin) {
            None | Some(TierAccess::MapPrivate) => Placement::CowFile,
            Some(TierAccess::MapShared) => Placement::InPlace,
            Some(TierAccess::Fetch) => Placement::Lazy,
        };
        PlannedExtent::from(extent, placement, source)
    }

    /// Pages in place where their source can be mapped.
    fn in_place(&self, extent: Extent, source: PageSource) -> PlannedExtent {
        let is_mapped = self.access(source.origin) != Some(TierAccess::Fetch);
        PlannedExtent::from(extent, if is_mapped { Placement::InPlace } else { Placement::Lazy }, source)
    }

    /// The placed pages of an image: taken from the image, or, with tiers, from where they are, because a pool is an
    /// image already.
    fn placed(&self, packed: &place::Packed, place: impl Fn(Extent, PageSource) -> PlannedExtent) -> Vec<Labelled> {
        if self.tiers.is_empty() {
            return packed.placed(place);
        }
        let mut extents = packed.spec.extents.clone();
        extents.sort_unstable_by_key(|extent| extent.first);
        let mut placed = Vec::with_capacity(extents.len());
        let mut at = 0;
        for extent in extents {
            while self.resolved.get(at).is_some_and(|run| run.extent.end() <= extent.first) {
                at += 1;
            }
            for run in self.resolved[at..].iter().take_while(|run| run.extent.first < extent.end()) {
                if let (Content::Bytes(source), Some(part)) = (run.content, run.extent.intersection(&extent)) {
                    let source = place::advance(source, part.first.0 - run.extent.first.0);
                    placed.push(Labelled(place(part, source)));
                }
            }
        }
        placed
    }

    /// True if all pages come from the memory file of one full snapshot.
    fn is_one_file(&self) -> bool {
        self.layers == 1 && self.tiers.is_empty()
    }

    /// The plan's list of images: empty if the image would be empty, or there are tiers.
    fn images(&self, packed: place::Packed) -> Vec<crate::snapshot::ImageSpec> {
        let is_empty = !self.tiers.is_empty() || packed.spec.extents.iter().all(Extent::is_empty);
        if is_empty { Vec::new() } else { vec![packed.spec] }
    }

    #[cfg(test)]
    fn bare(layout: &'a MemoryLayout, layers: usize, resolved: &'a [ResolvedRun], costs: &'a Costs) -> Ground<'a> {
        Ground { snapshot: SnapshotId::default(), layout, layers, tiers: &[], resolved, costs, page_ns: 0.0 }
    }
}

impl Policy {
    /// True if the plan depends on the costs of memory operations, and so on the cache state of the memory. The other
    /// policies do what their papers do.
    pub fn weighs_costs(self) -> bool {
        self == Policy::Tiered
    }

    /// True if the policy needs to know which pages are zero, so that the page maps of `chain` have to be read.
    pub fn needs_pages(self, chain: &Chain, tiers: &[TierSource]) -> bool {
        let is_one_file = tiers.is_empty() && chain.layers().len() == 1;
        !(is_one_file && matches!(self, Policy::Firecracker | Policy::FirecrackerUffd))
    }

    /// Makes the plan for restoring the tip of the chain.
    pub fn plan(self, input: &PolicyInput) -> Result<RestorePlan, Error> {
        if let Some(profile) = input.profile {
            profile.check_for(input.chain.tip())?;
        }
        self.plan_on(&input.ground(), input.profile, &input.budget)
    }

    fn plan_on(self, ground: &Ground, profile: Option<&Profile>, budget: &Budget) -> Result<RestorePlan, Error> {
        let extents = match (self, profile) {
            (Policy::Eager, _) => eager::plan(ground),
            (Policy::Firecracker, _) => firecracker::plan(ground),
            (Policy::FirecrackerUffd, _) => firecracker_uffd::plan(ground),
            (Policy::Catalyzer, _) => catalyzer::plan(ground),
            (Policy::Trenv, _) => trenv::plan(ground),
            (Policy::Reap, Some(profile)) => return Ok(reap::plan(ground, profile)),
            (Policy::Faasnap, Some(profile)) => return Ok(faasnap::plan(ground, profile)),
            (Policy::Aquifer, Some(profile)) => return Ok(aquifer::plan(ground, profile)),
            (Policy::Tiered, Some(profile)) => return tiered::plan(ground, profile, budget),
            (_, None) => return Err(Error::NeedsProfile { policy: self.name() }),
        };
        // The one policy that has everything in memory before the guest runs, so that its reads can be verified.
        let verify = self == Policy::Eager;
        Ok(RestorePlan { extents, verify, ..ground.empty_plan(self.name()) })
    }
}
