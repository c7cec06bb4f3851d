//! Which plan a restore is carried out by: one given in a file, or one that a policy makes, kept beside the snapshot so
//! that the next restore need not make it again.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::config::restore::{PlanFrom, PolicyChoice, RestoreRequest};
use crate::session::Error;
use crate::snapshot::{Chain, PAGE_SIZE, RestorePlan, TierSource, bound_derived, create_private_dir, lru};
use crate::sys::page_cache;
use crate::tiering::costs::{Costs, SourceCache};
use crate::tiering::fit::Fit;
use crate::tiering::plan_cache::plan_name;
use crate::tiering::plan_file::{CostsUsed, PlanFile};
use crate::tiering::policy::{Budget, Policy, PolicyInput, page_price_ns};
use crate::tiering::profile::Profile;
use crate::tiering::tier::{self, Tier};

/// A plan, and where it came from.
pub struct Chosen {
    pub plan: RestorePlan,
    /// `file`, `cache` or `made`.
    pub origin: &'static str,
    /// The page cache state the plan counts on, if it matters to its policy.
    pub source_cache: Option<&'static str>,
    /// The numbers it was made by, if its policy weighs any.
    pub costs: Option<CostsUsed>,
    /// How it fits the profile it was made from.
    pub fit: Option<Fit>,
}

impl Chosen {
    fn from(file: PlanFile, origin: &'static str, source_cache: Option<&'static str>) -> Chosen {
        Chosen { plan: file.plan, origin, source_cache, costs: file.costs, fit: file.fit }
    }
}

/// Makes or finds the plan that `request` asks for.
pub fn choose(chain: &Chain, tiers: &[Arc<dyn Tier>], request: &RestoreRequest) -> Result<Chosen, Error> {
    let choice = match &request.plan {
        PlanFrom::Policy(choice) => choice,
        PlanFrom::File(path) => {
            let file = PlanFile::load(path)?;
            file.check_for(chain, &sources(tiers), path)?;
            return Ok(Chosen::from(file, "file", None));
        }
    };
    let policy = choice.policy;
    if !policy.needs_profile() {
        let sources = sources(tiers);
        let resolved = if policy.needs_pages(chain, &sources) { tier::resolve(chain, tiers)? } else { Vec::new() };
        let (costs, budget) = (Costs::default(), Budget::default());
        let input = PolicyInput { chain, resolved: &resolved, tiers: &sources, profile: None, costs: &costs, budget };
        let mut plan = policy.plan(&input)?;
        tier::align(&mut plan, chain.layout(), chain.layers().len(), tiers);
        return Ok(Chosen { plan, origin: "made", source_cache: None, costs: None, fit: None });
    }
    from_profile(chain, tiers, choice, request.cold().is_some())
}

fn sources(tiers: &[Arc<dyn Tier>]) -> Vec<TierSource> {
    tiers.iter().map(|tier| tier.source()).collect()
}

/// `has_cold`: whether a cold pool has what no tier has.
fn from_profile(
    chain: &Chain,
    tiers: &[Arc<dyn Tier>],
    choice: &PolicyChoice,
    has_cold: bool,
) -> Result<Chosen, Error> {
    let policy = choice.policy;
    let bytes = choice.profile.as_deref().map(Profile::read).transpose()?;
    let costs = match &choice.costs {
        Some(path) => Costs::load(path)?,
        None => Costs::of_this_host()?,
    };
    // Only tiered's plan depends on it: the others do what their papers do.
    let cache = match policy {
        Policy::Tiered if !tiers.is_empty() => cache_of_tiers(tiers),
        // A cold pool stands by for snapshots that no pool has.
        Policy::Tiered if has_cold => SourceCache::Cold,
        Policy::Tiered => cache_of(chain)?,
        _ => SourceCache::Huge,
    };
    let mut costs = costs.with_cache(cache);
    if cache == SourceCache::Cold
        && let Some(pages) = page_cache::readahead_pages(chain.tip().memory())
    {
        costs.readahead_pages = pages;
    }
    let budget = Budget {
        dram_pages: pages(choice.dram_mib),
        cxl_pages: pages(choice.cxl_mib),
        dram_page_ns: page_price_ns(choice.dram_price_us),
    };
    let sources = sources(tiers);
    let others = format!("{costs:?} {budget:?} {sources:?}");
    let name = plan_name(chain.tip().id(), policy, bytes.as_deref().unwrap_or_default(), &others);
    let source_cache = Some(cache.name());
    if let Some(file) = cached(chain, &sources, &chain.derived_file(&name)) {
        return Ok(Chosen::from(file, "cache", source_cache));
    }
    let profile = choice.profile.as_deref().map(Profile::load).transpose()?;
    let resolved = tier::resolve(chain, tiers)?;
    let profile_of = profile.as_ref();
    let input = PolicyInput { chain, resolved: &resolved, tiers: &sources, profile: profile_of, costs: &costs, budget };
    let mut plan = policy.plan(&input)?;
    tier::align(&mut plan, chain.layout(), chain.layers().len(), tiers);
    let expected = input.estimate(&plan);
    let used = CostsUsed::new(&costs, choice.costs.as_deref());
    let file = PlanFile::new(plan, expected, chain)?.made_from(used, profile.as_ref());
    keep(chain, &file, &chain.derived_dir().join(&name));
    Ok(Chosen::from(file, "made", source_cache))
}

fn pages(mib: Option<u64>) -> Option<u64> {
    mib.map(|mib| mib.saturating_mul((1 << 20) / PAGE_SIZE))
}

/// A kept plan that is still good. One that is not is made again.
fn cached(chain: &Chain, tiers: &[TierSource], path: &Path) -> Option<PlanFile> {
    if !path.exists() {
        return None;
    }
    if let Ok(file) = File::open(path) {
        lru::note_use(&file);
    }
    let checked = PlanFile::load(path).and_then(|file| file.check_for(chain, tiers, path).map(drop).map(|()| file));
    checked.inspect_err(|error| tracing::warn!(%error, "A kept plan is made again")).ok()
}

fn keep(chain: &Chain, file: &PlanFile, path: &Path) {
    let saved = path.parent().map_or(Ok(()), create_private_dir);
    let saved = saved
        .map_err(|error| error.to_string())
        .and_then(|()| file.save(path).map(drop).map_err(|error| error.to_string()))
        .and_then(|()| bound_derived(chain, path).map_err(|error| error.to_string()));
    if let Err(error) = saved {
        // The restore itself does not need it; the next one is slower.
        tracing::warn!(%error, path = %path.display(), "The plan cannot be kept; --plan-dir names another place for it");
    }
}

/// How the tiers' data is found: memory, in huge pages or not.
fn cache_of_tiers(tiers: &[Arc<dyn Tier>]) -> SourceCache {
    let is_huge = tiers.iter().filter_map(|tier| tier.mapping()).all(|mapping| mapping.huge);
    if is_huge { SourceCache::Huge } else { SourceCache::Small }
}

/// How the chain's memory files are cached.
fn cache_of(chain: &Chain) -> Result<SourceCache, Error> {
    if is_cold(chain)? {
        return Ok(SourceCache::Cold);
    }
    // Bases are shared by many snapshots and large; what they are in decides.
    for layer in chain.layers() {
        let failed =
            |source| Error::File { doing: "look at the cached part of", path: layer.memory_path().to_owned(), source };
        if let Some(huge) = page_cache::is_in_huge_folios(layer.memory()).map_err(failed)? {
            return Ok(if huge { SourceCache::Huge } else { SourceCache::Small });
        }
    }
    Ok(SourceCache::Huge)
}

/// Whether less than half of what the layers hold is in the page cache. Kernels that cannot tell count as warm.
fn is_cold(chain: &Chain) -> Result<bool, Error> {
    let (mut held, mut cached) = (0, 0);
    for layer in chain.layers() {
        match page_cache::resident_pages(layer.memory()) {
            Ok(Some(pages)) => cached += pages,
            Ok(None) => return Ok(false),
            Err(source) => {
                return Err(Error::File {
                    doing: "ask for the cached part of",
                    path: layer.memory_path().to_owned(),
                    source,
                });
            }
        }
        held += layer.manifest().pages_held;
    }
    Ok(cached < held / 2)
}
