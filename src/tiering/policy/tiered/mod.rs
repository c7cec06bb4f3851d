//! `tiered`: tvmm's own. What is only read is mapped in place, what will be written has its private copy before the
//! guest runs, zero pages are anonymous memory, and what costs less another way goes that way: every choice is made by
//! expected time to the end of the first request, from the costs of this host and the odds of the profile.
//!
//! The cheapest way through memory is searched block by block ([`path`]), with the ways of each stretch priced by one
//! model ([`super::model`]). The shapes of the other policies are priced by the same model; where one is cheaper, that
//! is the plan. `docs/policies.md` has the formulae.

mod packed;
mod path;
mod units;

use super::estimate::{Estimate, estimate};
use super::touches::{Touch, expected};
use super::{Budget, Ground, aquifer, eager, faasnap, firecracker, reap};
use crate::snapshot::{Fill, RestorePlan};
use crate::tiering::Error;
use crate::tiering::profile::Profile;

pub const NAME: &str = "tiered";

/// How often the price of local memory is doubled, and then halved in, to meet a budget.
const DOUBLINGS: u32 = 40;
const BISECTIONS: u32 = 6;

pub fn plan(ground: &Ground, profile: &Profile, budget: &Budget) -> Result<RestorePlan, Error> {
    let touches = expected(profile, ground.resolved);
    let written = touches.iter().filter(|touch| touch.written > 0.0).map(|touch| touch.extent.pages).sum();
    // Written pages need local memory whenever they come; what is preloaded besides must fit into the rest.
    let limit = budget.dram_pages.unwrap_or(u64::MAX);
    let Some(extra_limit) = limit.checked_sub(written) else {
        return Err(Error::BudgetTooSmall { pages: limit, least: written });
    };
    let search = Search { touches: &touches, extra_limit };
    let mut best = search.within_budget(ground);
    let cheap = [firecracker::plan(ground), eager::plan(ground)]
        .map(|extents| RestorePlan { extents, ..ground.empty_plan(NAME) });
    let others = [
        reap::plan(ground, profile),
        faasnap::plan(ground, profile),
        aquifer::plan(ground, profile),
        packed::plan(ground, &touches, Fill::Install),
        packed::plan(ground, &touches, Fill::Copy),
    ];
    for plan in cheap.into_iter().chain(others) {
        let expected = estimate(&plan, ground, &touches);
        if search.fits(&expected) && expected.total_ns() < best.1.total_ns() {
            best = (plan, expected);
        }
    }
    let mut plan = best.0;
    plan.policy = NAME.to_string();
    Ok(plan)
}

struct Search<'a> {
    touches: &'a [Touch],
    /// Pages that may be preloaded besides those that are written.
    extra_limit: u64,
}

impl Search<'_> {
    fn fits(&self, expected: &Estimate) -> bool {
        expected.pages_preloaded_unwritten <= self.extra_limit
    }

    /// The cheapest plan with each extra page of local memory at `page_ns`.
    fn at_price(&self, ground: &Ground, page_ns: f64) -> (RestorePlan, Estimate) {
        let ground = Ground { page_ns, ..*ground };
        let mut plan = ground.empty_plan(NAME);
        plan.extents = path::Field::new(&ground, self.touches).cheapest();
        plan.coalesce(ground.layout);
        let expected = estimate(&plan, &ground, self.touches);
        (plan, expected)
    }

    /// The cheapest plan that fits the budget: local memory gets the lowest price at which it does.
    fn within_budget(&self, ground: &Ground) -> (RestorePlan, Estimate) {
        let mut best = self.at_price(ground, 0.0);
        let (mut low, mut high) = (0.0, 50.0);
        for _ in 0..DOUBLINGS {
            if self.fits(&best.1) {
                break;
            }
            (low, high) = (high, high * 2.0);
            best = self.at_price(ground, high);
        }
        if low == 0.0 {
            return best;
        }
        for _ in 0..BISECTIONS {
            let middle = (low + high) / 2.0;
            let plan = self.at_price(ground, middle);
            if self.fits(&plan.1) {
                (best, high) = (plan, middle);
            } else {
                low = middle;
            }
        }
        best
    }
}
