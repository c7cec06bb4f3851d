//! The one planner: chooses the plan that a restore carries out, and makes the one that `tvmm plan` shows.
//!
//! A plan comes from a file, from the plans kept beside the snapshot, or from a policy. A policy's plan is fitted to
//! the sources of memory: aligned to the mappings that its tiers can have, and, as the last step, lowered to a cold
//! pool.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::Error;
use super::cold::{Index, lower};
use super::costs::{Costs, SourceCache};
use super::fit::Fit;
use super::plan_cache::plan_name;
use super::plan_file::{CostsUsed, PlanFile};
use super::plan_json::{self, MemoryKind, PlanDocument};
use super::policy::{Budget, Estimate, Policy, PolicyInput};
use super::profile::Profile;
use super::tier::align::align;
use super::tier::{self, Tier};
use crate::snapshot::{
    self, CacheLookup, Chain, ImageSpec, PageSet, ResolvedRun, RestorePlan, TierSource, bound_derived,
    create_private_dir, lru,
};

/// A request for a plan of a policy.
#[derive(Clone, Copy, Debug)]
pub struct PlanRequest<'a> {
    pub policy: Policy,
    /// The file of a recorded run.
    pub profile: Option<&'a Path>,
    /// The file with the costs of the host; `None`: the host's last measurement, or the built-in numbers.
    pub costs: Option<&'a Path>,
    pub budget: Budget,
    /// The cache state that the memory will have when the plan is carried out; `None`: the state it has now.
    pub cache: Option<SourceCache>,
}

/// The origin of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PlanOrigin {
    /// A file that the restore was given.
    File,
    /// Plans kept beside the snapshot.
    Cache,
    /// A policy made it.
    Made,
}

/// A plan to be carried out, with its origin.
#[derive(Clone, Debug)]
pub struct Planned {
    pub plan: RestorePlan,
    pub origin: PlanOrigin,
    /// The cache state that the plan counts on, if its policy works from a profile.
    pub source_cache: Option<SourceCache>,
    /// The costs the plan was made by, if its policy weighs any.
    pub costs: Option<CostsUsed>,
    /// The fit of the plan to the profile it was made from.
    pub fit: Option<Fit>,
}

/// Makes plans for one snapshot, opened with the sources of its memory.
#[derive(Clone, Copy)]
pub struct Planner<'a> {
    pub chain: &'a Chain,
    /// In the order of their index.
    pub tiers: &'a [Arc<dyn Tier>],
    /// The index of the cold pool that stands in for the chain's memory files.
    pub cold: Option<&'a Index>,
    /// The host's page cache.
    pub page_cache: &'a dyn CacheLookup,
}

/// The inputs of a policy besides the snapshot.
struct Basis<'a> {
    profile: Option<&'a Profile>,
    costs: &'a Costs,
    budget: Budget,
}

impl Planner<'_> {
    /// Returns the plan that a restore carries out: a kept one, or one made now, which is then kept for the next
    /// restore. Policies that work from no profile are so fast that their plans are not kept.
    ///
    /// # Errors
    /// A profile or costs that cannot be read, a budget that is too small, page maps that cannot be read.
    pub fn plan(&self, request: &PlanRequest) -> Result<Planned, Error> {
        let planned = if request.policy.needs_profile() {
            self.kept_or_made(request)?
        } else {
            self.made_without_profile(request.policy)?
        };
        self.lowered(planned)
    }

    /// Returns the plan in a file, if it is for this snapshot and these tiers. A plan in JSON may be of any program, so
    /// the place of each page is compared with the snapshot's.
    ///
    /// # Errors
    /// As for [`PlanFile::load`], [`plan_json::load`], [`PlanFile::check_for`] and [`plan_json::check_pages`].
    pub fn read(&self, path: &Path) -> Result<Planned, Error> {
        if let Some(json) = plan_json::load(path)? {
            return self.lowered(planned(self.of_json(json, path)?, PlanOrigin::File, None));
        }
        let file = PlanFile::load(path)?;
        file.check_for(self.chain, &self.tier_sources(), path)?;
        self.lowered(planned(file, PlanOrigin::File, None))
    }

    /// Returns the plan that [`Planner::plan`] would return, with its expected cost. Keeps nothing.
    ///
    /// # Errors
    /// As for [`Planner::plan`].
    pub fn describe(&self, request: &PlanRequest) -> Result<PlanFile, Error> {
        let profile = request.profile.map(Profile::load).transpose()?;
        let costs = self.costs(request, self.cache(request)?)?;
        let basis = Basis { profile: profile.as_ref(), costs: &costs, budget: request.budget };
        let resolved = tier::resolve(self.chain, self.tiers)?;
        let plan = self.lower(self.make(request.policy, &resolved, &basis)?)?;
        plan.validate(self.chain.layout(), &self.chain.layer_file_lens())?;
        self.file(plan, &resolved, &basis, request.costs)
    }

    /// Returns a plan that no policy made, as it is written to a file.
    ///
    /// # Errors
    /// The state of a memory file cannot be read.
    pub fn own(&self, plan: RestorePlan) -> Result<PlanFile, Error> {
        let costs = Costs::default();
        let expected = self.input(&[], &self.tier_sources(), &Basis::of(&costs)).estimate(&plan);
        PlanFile::new(plan, expected, self.chain)
    }

    /// Returns the plan that maps the file of a chain of one layer private, and copies `pages` before the guest runs.
    ///
    /// # Errors
    /// The state of the memory file cannot be read.
    pub fn with_copies(&self, pages: &PageSet) -> Result<PlanFile, Error> {
        let costs = Costs::default();
        self.own(self.input(&[], &[], &Basis::of(&costs)).with_copies(pages))
    }

    /// Returns the images that a plan made from `profile` reads.
    ///
    /// # Errors
    /// As for [`Planner::plan`].
    pub fn images(&self, policy: Policy, profile: &Profile) -> Result<Vec<ImageSpec>, Error> {
        let request = PlanRequest { policy, profile: None, costs: None, budget: Budget::default(), cache: None };
        let costs = self.costs(&request, self.expected_cache(&request)?)?;
        let basis = Basis { profile: Some(profile), ..Basis::of(&costs) };
        Ok(self.make(policy, &tier::resolve(self.chain, self.tiers)?, &basis)?.images)
    }

    /// The file of a plan in JSON, whose pages are the snapshot's.
    fn of_json(&self, json: PlanDocument, path: &Path) -> Result<PlanFile, Error> {
        let PlanDocument { plan, sources } = json;
        let mut file = PlanFile::new(plan, Estimate::default(), self.chain)?;
        file.sources = sources.unwrap_or(file.sources);
        file.check_for(self.chain, &self.tier_sources(), path)?;
        let resolved = tier::resolve(self.chain, self.tiers)?;
        let memory = if self.cold.is_some() { MemoryKind::ColdPool } else { MemoryKind::Files };
        plan_json::check_pages(&file.plan, self.chain, &resolved, memory)
            .map_err(|problem| Error::PlanFile { path: path.to_path_buf(), problem })?;
        Ok(file)
    }

    fn made_without_profile(&self, policy: Policy) -> Result<Planned, Error> {
        let needs_pages = policy.needs_pages(self.chain, &self.tier_sources());
        let resolved = if needs_pages { tier::resolve(self.chain, self.tiers)? } else { Vec::new() };
        let costs = Costs::default();
        let plan = self.make(policy, &resolved, &Basis::of(&costs))?;
        Ok(Planned { plan, origin: PlanOrigin::Made, source_cache: None, costs: None, fit: None })
    }

    fn kept_or_made(&self, request: &PlanRequest) -> Result<Planned, Error> {
        let bytes = request.profile.map(Profile::read).transpose()?;
        let cache = self.expected_cache(request)?;
        let costs = self.costs(request, cache)?;
        let budget = request.budget;
        let sources = self.tier_sources();
        let others = format!("{costs:?} {budget:?} {sources:?}");
        let name = plan_name(self.chain.tip().id(), request.policy, bytes.as_deref().unwrap_or_default(), &others);
        if let Some(file) = self.kept(&self.chain.derived_file(&name)) {
            return Ok(planned(file, PlanOrigin::Cache, Some(cache)));
        }
        let profile = request.profile.map(Profile::load).transpose()?;
        let basis = Basis { profile: profile.as_ref(), costs: &costs, budget };
        let resolved = tier::resolve(self.chain, self.tiers)?;
        let plan = self.make(request.policy, &resolved, &basis)?;
        let file = self.file(plan, &resolved, &basis, request.costs)?;
        self.keep(&file, &self.chain.derived_dir().join(&name));
        Ok(planned(file, PlanOrigin::Made, Some(cache)))
    }

    /// The policy's plan, aligned to the tiers.
    fn make(&self, policy: Policy, resolved: &[ResolvedRun], basis: &Basis) -> Result<RestorePlan, Error> {
        let mut plan = policy.plan(&self.input(resolved, &self.tier_sources(), basis))?;
        align(&mut plan, self.chain.layout(), self.tiers);
        Ok(plan)
    }

    fn file(
        &self,
        plan: RestorePlan,
        resolved: &[ResolvedRun],
        basis: &Basis,
        costs_file: Option<&Path>,
    ) -> Result<PlanFile, Error> {
        let expected = self.input(resolved, &self.tier_sources(), basis).estimate(&plan);
        let used = CostsUsed::new(basis.costs, costs_file);
        Ok(PlanFile::new(plan, expected, self.chain)?.made_from(used, basis.profile))
    }

    fn input<'b>(
        &'b self,
        resolved: &'b [ResolvedRun],
        tiers: &'b [TierSource],
        basis: &'b Basis<'b>,
    ) -> PolicyInput<'b> {
        let Basis { profile, costs, budget } = *basis;
        PolicyInput { chain: self.chain, resolved, tiers, profile, costs, budget }
    }

    fn tier_sources(&self) -> Vec<TierSource> {
        self.tiers.iter().map(|tier| tier.source()).collect()
    }

    fn lowered(&self, planned: Planned) -> Result<Planned, Error> {
        Ok(Planned { plan: self.lower(planned.plan)?, ..planned })
    }

    fn lower(&self, plan: RestorePlan) -> Result<RestorePlan, Error> {
        match self.cold {
            Some(index) => Ok(lower(&plan, self.chain.tip_index(), self.chain.layout(), index)?),
            None => Ok(plan),
        }
    }

    fn costs(&self, request: &PlanRequest, cache: SourceCache) -> Result<Costs, Error> {
        let costs = match request.costs {
            Some(path) => Costs::load(path)?,
            None => Costs::of_this_host()?,
        };
        let mut costs = costs.with_cache(cache);
        if cache == SourceCache::Cold
            && let Some(pages) = self.page_cache.readahead_pages(self.chain.tip().memory())
        {
            costs.readahead_pages = pages;
        }
        Ok(costs)
    }

    /// The cache state that the plan depends on. A restore spends the time to look only for a policy that weighs costs.
    fn expected_cache(&self, request: &PlanRequest) -> Result<SourceCache, Error> {
        if request.policy.weighs_costs() { self.cache(request) } else { Ok(SourceCache::default()) }
    }

    /// The cache state of the memory: the requested one, else the one it has now.
    fn cache(&self, request: &PlanRequest) -> Result<SourceCache, Error> {
        match request.cache {
            Some(cache) => Ok(cache),
            None if !self.tiers.is_empty() => Ok(self.cache_of_tiers()),
            None if self.cold.is_some() => Ok(SourceCache::Cold),
            None => self.cache_of_files(),
        }
    }

    /// The cache state of the tiers' data, which is memory: in huge pages or not.
    fn cache_of_tiers(&self) -> SourceCache {
        let is_huge = self.tiers.iter().filter_map(|tier| tier.mapping()).all(|mapping| mapping.huge);
        if is_huge { SourceCache::Huge } else { SourceCache::Small }
    }

    /// The cache state of the chain's memory files.
    fn cache_of_files(&self) -> Result<SourceCache, Error> {
        if self.is_cold()? {
            return Ok(SourceCache::Cold);
        }
        // Bases are shared by many snapshots and large: their folios decide.
        for layer in self.chain.layers() {
            let failed = snapshot::Error::io("look at the cached part of", layer.memory_path());
            if let Some(huge) = self.page_cache.is_in_huge_folios(layer.memory()).map_err(failed)? {
                return Ok(if huge { SourceCache::Huge } else { SourceCache::Small });
            }
        }
        Ok(SourceCache::Huge)
    }

    /// True if less than half of the pages that the layers hold is in the page cache. Kernels that cannot tell count
    /// as warm.
    fn is_cold(&self) -> Result<bool, Error> {
        let mut held = 0;
        let mut cached = 0;
        for layer in self.chain.layers() {
            let failed = snapshot::Error::io("ask for the cached part of", layer.memory_path());
            match self.page_cache.resident_pages(layer.memory()).map_err(failed)? {
                Some(pages) => cached += pages,
                None => return Ok(false),
            }
            held += layer.manifest().pages_held;
        }
        Ok(cached < held / 2)
    }

    /// Returns the kept plan at `path` if it is still good. One that is not is made again.
    fn kept(&self, path: &Path) -> Option<PlanFile> {
        if !path.exists() {
            return None;
        }
        if let Ok(file) = File::open(path) {
            lru::note_use(&file);
        }
        let loaded = PlanFile::load(path);
        let checked =
            loaded.and_then(|file| file.check_for(self.chain, &self.tier_sources(), path).map(drop).map(|()| file));
        checked.inspect_err(|error| tracing::warn!(%error, "A kept plan is made again")).ok()
    }

    fn keep(&self, file: &PlanFile, path: &Path) {
        let saved = path.parent().map_or(Ok(()), create_private_dir);
        let saved = saved
            .map_err(|error| error.to_string())
            .and_then(|()| file.save(path).map(drop).map_err(|error| error.to_string()))
            .and_then(|()| bound_derived(self.chain, path).map_err(|error| error.to_string()));
        if let Err(error) = saved {
            // The restore itself does not need it; the next one is slower.
            let path = path.display();
            tracing::warn!(%error, %path, "The plan cannot be kept; --plan-dir names another place for it");
        }
    }
}

impl<'a> Basis<'a> {
    fn of(costs: &'a Costs) -> Basis<'a> {
        Basis { profile: None, costs, budget: Budget::default() }
    }
}

fn planned(file: PlanFile, origin: PlanOrigin, source_cache: Option<SourceCache>) -> Planned {
    Planned { plan: file.plan, origin, source_cache, costs: file.costs, fit: file.fit }
}
