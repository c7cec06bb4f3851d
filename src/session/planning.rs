//! Puts the plan options of a restore request to the planner.

use crate::config::restore::{PlanFrom, RestoreRequest};
use crate::session::Error;
use crate::session::sources::Sources;
use crate::sys::page_cache::PageCache;
use crate::tiering::planner::{PlanRequest, Planned, Planner};
use crate::tiering::policy::Budget;

/// Finds or makes the plan that `request` asks for.
pub fn choose(sources: &Sources, request: &RestoreRequest) -> Result<Planned, Error> {
    let planner = planner(sources);
    let choice = match &request.plan {
        PlanFrom::File(path) => return Ok(planner.read(path)?),
        PlanFrom::Policy(choice) => choice,
    };
    let request = PlanRequest {
        policy: choice.policy(),
        profile: choice.profile.as_deref(),
        costs: choice.costs.as_deref(),
        budget: Budget::of_mib(choice.dram_mib, choice.cxl_mib, choice.dram_price_us),
        cache: None,
    };
    Ok(planner.plan(&request)?)
}

/// The planner for what was opened.
pub fn planner(sources: &Sources) -> Planner<'_> {
    let Sources { chain, tiers, cold, .. } = sources;
    Planner { chain, tiers, cold: cold.as_ref().map(|pool| &**pool.index()), page_cache: &PageCache }
}
