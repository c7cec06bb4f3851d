//! A restore request whose sources are open and whose plan is made, for a new machine or for one that is repurposed.

use std::sync::Arc;
use std::time::Duration;

use super::facts::{Opened, Restored};
use super::planning;
use super::sources::{self, Sources};
use super::watch::Watch;
use crate::config::restore::RestoreRequest;
use crate::memory::engine::EngineReport;
use crate::memory::files;
use crate::memory::stall::Stalls;
use crate::session::Error;
use crate::snapshot::RestorePlan;
use crate::tiering;
use crate::tiering::planner::Planned;
use crate::tiering::pool::PoolTier;
use crate::vmm::restore::RestoreSpec;

pub struct OpenedRequest<'a> {
    load: &'a RestoreRequest,
    stalls: &'a Arc<Stalls>,
    sources: files::Sources,
    /// The tiers that are pools.
    pools: Vec<Arc<PoolTier>>,
    planned: Planned,
    facts: Opened,
}

impl<'a> OpenedRequest<'a> {
    /// Opens the sources that `load` names, and finds or makes its plan. `fault_timeout`: longest wait of a guest for a
    /// page; `stalls` ends a guest whose memory does not come.
    pub fn open(
        load: &'a RestoreRequest,
        fault_timeout: Duration,
        stalls: &'a Arc<Stalls>,
    ) -> Result<OpenedRequest<'a>, Error> {
        let opened = sources::open(load, fault_timeout, stalls)?;
        let planned = planning::choose(&opened, load)?;
        let Sources { chain, tiers, pools, cold, fork_point } = opened;
        let facts = Opened::of(&chain, &pools, fork_point);
        Ok(OpenedRequest { load, stalls, sources: files::Sources { chain, tiers, cold }, pools, planned, facts })
    }

    pub fn plan(&self) -> &RestorePlan {
        &self.planned.plan
    }

    /// The parameters of the restore.
    pub fn spec(&self, watch: Watch) -> RestoreSpec<'_> {
        RestoreSpec {
            sources: self.sources.clone(),
            plan: &self.planned.plan,
            track_dirty_pages: self.load.track_dirty_pages,
            observer: watch.observer,
            single_pages: watch.single_pages,
            in_place_mapping: self.load.in_place_mapping,
            verify: self.load.verify,
            handler: self.load.handler(),
            overrides: &self.load.overrides,
            stalls: self.stalls,
            clock_realtime: self.load.clock_realtime,
        }
    }

    /// Tells each pool the pages that a machine maps of it.
    pub fn note_plan(&self, engine: &EngineReport) -> Result<(), Error> {
        let noted = self.pools.iter().try_for_each(|pool| pool.note_plan(&engine.planned));
        Ok(noted.map_err(tiering::Error::from)?)
    }

    /// The facts about the restore, which `engine` has carried out.
    pub fn restored(self, engine: EngineReport) -> Restored {
        Restored::new(self.load, self.planned, self.facts, engine)
    }
}
