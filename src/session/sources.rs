//! The sources of guest memory for a restore: the snapshot's files, or pools that have it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::plan_dir;
use crate::backends::cold;
use crate::backends::pool_media;
use crate::backends::pool_media::Access;
use crate::config::request::{DEFAULT_FAULT_TIMEOUT, SnapshotPaths};
use crate::config::restore::{MemoryFrom, PlanFrom, RestoreRequest};
use crate::memory::stall::Stalls;
use crate::session::Error;
use crate::snapshot::{Chain, Cold, ColdSpec, ForkPoint, Location, TrustedKeys};
use crate::sys::secret_key;
use crate::tiering;
use crate::tiering::cold::ColdPool;
use crate::tiering::pool::{self, OnLost, PoolTier};
use crate::tiering::tier::Tier;

/// The sources of guest pages.
pub struct Sources {
    pub chain: Arc<Chain>,
    /// In the order of their index.
    pub tiers: Vec<Arc<dyn Tier>>,
    /// The tiers that are pools.
    pub pools: Vec<Arc<PoolTier>>,
    /// Serves the bytes of the chain's memory files, which need not exist then.
    pub cold: Option<Arc<ColdPool>>,
    /// The fork point that the chain is, if it is one: it stays as long as it is held.
    pub fork_point: Option<Arc<ForkPoint>>,
}

impl Sources {
    fn files(chain: Chain) -> Sources {
        Sources { chain: Arc::new(chain), tiers: Vec::new(), pools: Vec::new(), cold: None, fork_point: None }
    }
}

/// Opens the sources in `request`. With pools, neither memory files nor parents are opened; a cold pool is the source
/// for a snapshot that none of them has. `fault_timeout`: longest wait of a guest for a page; `stalls` ends the guest
/// if a pool's lease is lost.
pub fn open(request: &RestoreRequest, fault_timeout: Duration, stalls: &Arc<Stalls>) -> Result<Sources, Error> {
    let fork_point = ForkPoint::hold(&request.snapshot)?.map(Arc::new);
    let opened = open_memory(request, fault_timeout, stalls)?;
    let mut sources = Sources { fork_point, ..opened };
    let is_derived_from = match &request.plan {
        PlanFrom::File(_) => true,
        PlanFrom::Policy(choice) => choice.profile.is_some(),
    };
    if is_derived_from
        && let Some(chain) = Arc::get_mut(&mut sources.chain)
        && let Some(dir) = plan_dir::choose(request.plan_dir.as_deref(), chain)?
    {
        chain.derive_in(dir);
    }
    Ok(sources)
}

fn open_memory(request: &RestoreRequest, fault_timeout: Duration, stalls: &Arc<Stalls>) -> Result<Sources, Error> {
    let paths = SnapshotPaths { snapshot: request.snapshot.clone(), memory: request.memory_file().map(Into::into) };
    let location = location(&paths);
    match &request.memory {
        MemoryFrom::Handler(_) => Ok(Sources::files(Chain::open_without_memory(&request.snapshot)?)),
        MemoryFrom::Files { trusted_keys, .. } if trusted_keys.is_empty() => {
            Ok(Sources::files(Chain::open(&location)?))
        }
        MemoryFrom::Files { trusted_keys, .. } => {
            let keys = TrustedKeys::read(trusted_keys)?;
            Ok(Sources::files(Chain::open_signed(&location, &keys)?))
        }
        MemoryFrom::Cold(cold) => from_cold(&location, cold, fault_timeout),
        MemoryFrom::Pools { pools, fallback } => {
            from_pools(&location, pools, fallback.as_ref(), fault_timeout, Some(stalls))
        }
    }
}

/// Opens a snapshot as a restore would, to look at: neither leases nor caches of chunks are taken.
pub fn look(location: &Location, pools: &[PathBuf], cold: &[ColdSpec]) -> Result<Sources, Error> {
    let cold = (!cold.is_empty()).then(|| Cold { pools: cold.to_vec(), cache: None, key: None });
    match &cold {
        Some(cold) if pools.is_empty() => from_cold(location, cold, DEFAULT_FAULT_TIMEOUT),
        cold => from_pools(location, pools, cold.as_ref(), DEFAULT_FAULT_TIMEOUT, None),
    }
}

/// The snapshot at `location` as [`pooled`] opens it; from cold pools if none of `pools` has it.
fn from_pools(
    location: &Location,
    pools: &[PathBuf],
    fallback: Option<&Cold>,
    fault_timeout: Duration,
    leased: Option<&Arc<Stalls>>,
) -> Result<Sources, Error> {
    match (pooled(location, pools, leased), fallback) {
        (Err(Error::Tiering(tiering::Error::Pool(error @ pool::Error::NoSnapshot { .. }))), Some(cold)) => {
            tracing::warn!(%error, "The cold pool is used instead");
            from_cold(location, cold, fault_timeout)
        }
        (result, _) => result,
    }
}

/// The snapshot at `location`, with its memory in cold pools.
fn from_cold(location: &Location, cold: &Cold, fault_timeout: Duration) -> Result<Sources, Error> {
    let key = cold.key.as_ref().map(secret_key::read).transpose()?;
    let chain = Chain::open_elsewhere(location, key.as_ref())?;
    let cold = cold::open(cold, &chain, fault_timeout, key.as_ref())?;
    Ok(Sources { cold, ..Sources::files(chain) })
}

/// Opens the snapshot at `location` from the first of `pools` that has it, or from its own files without pools.
/// `leased`: its pages will be mapped, and this ends the guest if the lease is ended by others.
fn pooled(location: &Location, pools: &[PathBuf], leased: Option<&Arc<Stalls>>) -> Result<Sources, Error> {
    if pools.is_empty() {
        return Ok(Sources::files(Chain::open(location)?));
    }
    let chain = Chain::open_pooled(location)?;
    let mut missing = None;
    for path in pools {
        let access = if leased.is_some() { Access::Lease } else { Access::Look };
        let medium = Arc::new(pool_media::open(path, access)?);
        let on_lost = leased.cloned().map(|stalls| -> OnLost { Box::new(move |error| stalls.end(error.to_string())) });
        match PoolTier::open(medium, chain.tip().id(), on_lost) {
            // The pool has every page: no other is needed.
            Ok(tier) => {
                let tier = Arc::new(tier);
                return Ok(Sources {
                    chain: Arc::new(chain),
                    tiers: vec![tier.clone()],
                    pools: vec![tier],
                    cold: None,
                    fork_point: None,
                });
            }
            Err(error @ pool::Error::NoSnapshot { .. }) => missing = missing.or(Some(error)),
            Err(error) => return Err(Error::Tiering(error.into())),
        }
    }
    // There is a pool, so the loop has set a reason.
    Err(missing.map_or(Error::NoPool, |error| Error::Tiering(error.into())))
}

/// The location of a snapshot.
pub fn location(paths: &SnapshotPaths) -> Location {
    match &paths.memory {
        None => Location::Dir(paths.snapshot.clone()),
        Some(memory) => Location::Files { snapshot: paths.snapshot.clone(), memory: memory.clone() },
    }
}
