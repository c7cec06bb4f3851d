//! Puts the plan options of a restore request to the planner.

use crate::config::request::LoadSnapshot;
use crate::session::Error;
use crate::session::sources::Sources;
use crate::sys::page_cache::PageCache;
use crate::tiering::planner::{PlanRequest, Planned, Planner};
use crate::tiering::policy::{Budget, DRAM_PRICE_US};

/// Finds or makes the plan that `load` asks for.
pub fn choose(sources: &Sources, load: &LoadSnapshot) -> Result<Planned, Error> {
    let planner = planner(sources);
    if let Some(path) = &load.plan {
        return Ok(planner.read(path)?);
    }
    let request = PlanRequest {
        policy: load.policy.parse()?,
        profile: load.profile.as_deref(),
        costs: load.costs.as_deref(),
        budget: Budget::of_mib(load.dram_mib, load.cxl_mib, load.dram_price_us.unwrap_or(DRAM_PRICE_US)),
        cache: None,
    };
    Ok(planner.plan(&request)?)
}

/// The planner for what was opened.
pub fn planner(sources: &Sources) -> Planner<'_> {
    let Sources { chain, tiers, cold, .. } = sources;
    Planner { chain, tiers, cold: cold.as_ref().map(|pool| &**pool.index()), page_cache: &PageCache }
}
