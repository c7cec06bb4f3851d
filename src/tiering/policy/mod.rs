//! The restore policies by name. One file each; `docs/policies.md` describes their papers and tvmm's versions.

mod aquifer;
mod budget;
mod catalyzer;
mod copied;
mod eager;
mod estimate;
mod faasnap;
mod facts;
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
use crate::snapshot::{Chain, PageSet, ResolvedRun, RestorePlan, TierSource};
use facts::PolicyFacts;

pub(super) use place::advance;

pub use crate::snapshot::{DRAM_PRICE_US, Policy};
pub use budget::Budget;
pub use estimate::Estimate;

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
    fn facts(&self) -> PolicyFacts<'a> {
        PolicyFacts {
            snapshot: self.chain.tip().id(),
            layout: self.chain.layout(),
            layers: self.chain.layers().len(),
            tiers: self.tiers,
            resolved: self.resolved,
            costs: self.costs,
            page_ns: 0.0,
        }
    }

    /// A plan of no policy, for a chain of one layer: its file is mapped private, and `pages` are copied before the
    /// guest runs.
    pub fn with_copies(&self, pages: &PageSet) -> RestorePlan {
        copied::plan(&self.facts(), pages)
    }

    /// The expected cost of `plan`. Without a profile no touches are expected.
    pub fn estimate(&self, plan: &RestorePlan) -> Estimate {
        let touches = self.profile.map(|profile| touches::expected(profile, self.resolved)).unwrap_or_default();
        estimate::estimate(plan, &self.facts(), &touches)
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
        self.plan_on(&input.facts(), input.profile, &input.budget)
    }

    fn plan_on(self, facts: &PolicyFacts, profile: Option<&Profile>, budget: &Budget) -> Result<RestorePlan, Error> {
        let extents = match (self, profile) {
            (Policy::Eager, _) => eager::plan(facts),
            (Policy::Firecracker, _) => firecracker::plan(facts),
            (Policy::FirecrackerUffd, _) => firecracker_uffd::plan(facts),
            (Policy::Catalyzer, _) => catalyzer::plan(facts),
            (Policy::Trenv, _) => trenv::plan(facts),
            (Policy::Reap, Some(profile)) => return Ok(reap::plan(facts, profile)),
            (Policy::Faasnap, Some(profile)) => return Ok(faasnap::plan(facts, profile)),
            (Policy::Aquifer, Some(profile)) => return Ok(aquifer::plan(facts, profile)),
            (Policy::Tiered, Some(profile)) => return tiered::plan(facts, profile, budget),
            (_, None) => return Err(Error::NeedsProfile { policy: self.name() }),
        };
        // The one policy that has everything in memory before the guest runs, so that its reads can be verified.
        let verify = self == Policy::Eager;
        Ok(RestorePlan { extents, verify, ..facts.empty_plan(self.name()) })
    }
}
