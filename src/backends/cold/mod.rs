//! The places of cold pools: directories, page servers, object stores. And the page server itself.

mod bounded;
mod cache;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod doors;
mod file;
#[cfg(feature = "object-store")]
pub mod object;
#[cfg(feature = "rdma")]
mod rdma;
pub mod serve;
mod tcp;
pub mod wire;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::backends::Error;
use crate::snapshot::{Chain, Cold, ColdCache, ColdSpec, NoColdPool, PageSet, SecretKey, SnapshotId, is_object_url};
use crate::tiering;
use crate::tiering::cold::store::{Checked, Manifest, Store};
use crate::tiering::cold::{ChunkError, ColdPool, Index, Packed, Place};
use cache::{Cache, CachedPlace};

/// The part of `--fault-timeout` after which no place is asked again. An attempt takes at most half of this part, and
/// its end is noticed within a quarter of an attempt. So all attempts end within the time-out, and before the stall
/// watch ends the VM with a reason that does not name the place.
const PATIENCE: (u32, u32) = (9, 16);
/// The error of a build without object stores.
#[cfg(not(feature = "object-store"))]
pub const NO_OBJECT_STORES: &str =
    "this build of tvmm has no object stores: build it with `cargo build --release --features object-store`";
/// The error of a build without RDMA.
#[cfg(not(feature = "rdma"))]
pub const NO_RDMA: &str = "this build of tvmm has no RDMA: build it with `cargo build --release --features rdma`";

/// The place of a cold pool that is filled or listed.
pub enum AnyPool {
    Dir(Store),
    #[cfg(feature = "object-store")]
    Object(object::ObjectPool),
}

impl AnyPool {
    /// Makes a pool in a directory or an object store.
    pub fn create(at: &str, manifest: Manifest) -> Result<AnyPool, ChunkError> {
        if !is_object_url(at) {
            return Ok(AnyPool::Dir(Store::create(Path::new(at), manifest)?));
        }
        #[cfg(feature = "object-store")]
        return Ok(AnyPool::Object(object::ObjectPool::create(at, manifest)?));
        #[cfg(not(feature = "object-store"))]
        return Err(ChunkError::NoPlace(format!("{at}: {NO_OBJECT_STORES}")));
    }

    pub fn open(at: &str) -> Result<AnyPool, ChunkError> {
        if !is_object_url(at) {
            return Ok(AnyPool::Dir(Store::open(Path::new(at))?));
        }
        #[cfg(feature = "object-store")]
        return Ok(AnyPool::Object(object::ObjectPool::open(at)?));
        #[cfg(not(feature = "object-store"))]
        return Err(ChunkError::NoPlace(format!("{at}: {NO_OBJECT_STORES}")));
    }

    pub fn manifest(&self) -> Manifest {
        match self {
            AnyPool::Dir(store) => store.manifest(),
            #[cfg(feature = "object-store")]
            AnyPool::Object(pool) => pool.manifest(),
        }
    }

    /// Packs and adds the tip of `chain`, `hot` pages first.
    pub fn add(
        &self,
        chain: &Chain,
        hot: Option<PageSet>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Packed, ChunkError> {
        match self {
            AnyPool::Dir(store) => store.add(chain, hot, None, progress),
            #[cfg(feature = "object-store")]
            AnyPool::Object(pool) => pool.add(chain, hot, progress),
        }
    }

    pub fn list(&self) -> Result<Vec<SnapshotId>, ChunkError> {
        match self {
            AnyPool::Dir(store) => store.list(),
            #[cfg(feature = "object-store")]
            AnyPool::Object(pool) => pool.list(),
        }
    }

    pub fn index(&self, snapshot: SnapshotId) -> Result<Index, ChunkError> {
        match self {
            AnyPool::Dir(store) => store.index(snapshot),
            #[cfg(feature = "object-store")]
            AnyPool::Object(pool) => pool.index(snapshot),
        }
    }

    pub fn remove(&self, snapshot: SnapshotId) -> Result<(), ChunkError> {
        match self {
            AnyPool::Dir(store) => store.remove(snapshot),
            #[cfg(feature = "object-store")]
            AnyPool::Object(pool) => pool.remove(snapshot),
        }
    }

    /// Removes data that belongs to no snapshot. Returns the bytes freed.
    pub fn collect(&self) -> Result<u64, ChunkError> {
        match self {
            AnyPool::Dir(store) => store.collect(),
            #[cfg(feature = "object-store")]
            AnyPool::Object(pool) => pool.collect(),
        }
    }

    /// Compares every chunk of a snapshot with its checksum.
    pub fn check(&self, snapshot: SnapshotId) -> Result<Checked, ChunkError> {
        match self {
            AnyPool::Dir(store) => store.check(snapshot),
            #[cfg(feature = "object-store")]
            AnyPool::Object(pool) => pool.check(snapshot),
        }
    }
}

/// Refuses a cold pool at a place that this build cannot reach.
///
/// # Errors
/// The feature that the build lacks.
pub fn check_reachable(spec: &ColdSpec) -> Result<(), &'static str> {
    match spec {
        #[cfg(not(feature = "rdma"))]
        ColdSpec::Rdma(_) => Err(NO_RDMA),
        #[cfg(not(feature = "object-store"))]
        ColdSpec::Object(_) => Err(NO_OBJECT_STORES),
        _ => Ok(()),
    }
}

/// Returns whether the chunks of a cold pool are worth caching on this host.
fn is_far(spec: &ColdSpec) -> bool {
    spec.dir().is_none()
}

/// Opens the places of a cold pool.
fn places_of(spec: &ColdSpec, attempt: Duration) -> Result<Vec<Box<dyn Place>>, Error> {
    let unusable = |problem: String| NoColdPool { text: spec.to_string(), problem };
    check_reachable(spec).map_err(|problem| unusable(problem.to_string()))?;
    Ok(match spec {
        ColdSpec::Dir(dir) => vec![Box::new(file::FilePlace::open(dir, None)?)],
        ColdSpec::Direct(dir, depth) => vec![Box::new(file::FilePlace::open(dir, Some(*depth))?)],
        ColdSpec::Tcp(servers) => servers
            .iter()
            .map(|server| Box::new(tcp::TcpPlace::new(server.clone(), attempt)) as Box<dyn Place>)
            .collect(),
        #[cfg(feature = "rdma")]
        ColdSpec::Rdma(servers) => rdma::places(servers, attempt).map_err(unusable)?,
        #[cfg(feature = "object-store")]
        ColdSpec::Object(url) => vec![Box::new(object::ObjectPlace::new(url.clone(), attempt))],
        #[cfg(not(all(feature = "rdma", feature = "object-store")))]
        _ => Vec::new(),
    })
}

/// Default limit of a cache, MiB.
const CACHE_MIB: u64 = 1024;

/// Opens the object of the chain's tip in the first of the pools that has it; the others stand by. `fault_timeout`: the
/// longest that a guest may wait for a page. `key`: the key of an object that is encrypted.
///
/// # Errors
/// A pool that this build cannot reach, no pool that has it, an object that is not this snapshot's.
pub fn open(
    cold: &Cold,
    chain: &Chain,
    fault_timeout: Duration,
    key: Option<&SecretKey>,
) -> Result<Option<Arc<ColdPool>>, Error> {
    let limit = |cache: &ColdCache| cache.limit_mib.unwrap_or(CACHE_MIB).saturating_mul(1 << 20);
    let cache = cold.cache.as_ref().map(|cache| Cache::open(&cache.dir, limit(cache))).transpose()?;
    let patience = fault_timeout * PATIENCE.0 / PATIENCE.1;
    let mut places: Vec<Box<dyn Place>> = Vec::new();
    let mut alike = 0;
    for spec in &cold.pools {
        let of_spec = places_of(spec, patience / 2)?.into_iter();
        places.extend(of_spec.map(|place| match cache.clone().filter(|_| is_far(spec)) {
            Some(cache) => Box::new(CachedPlace { place, cache }) as Box<dyn Place>,
            None => place,
        }));
        alike = if alike == 0 { places.len() } else { alike };
    }
    if places.is_empty() {
        return Ok(None);
    }
    let tip = chain.tip();
    let pool = ColdPool::open(places, alike, tip.id(), tip.layout(), patience, key).map_err(tiering::Error::from)?;
    // For a full snapshot the number of pages is known without reading its page map.
    let held = tip.manifest().pages_held;
    if chain.layers().len() == 1 && pool.index().pages() != held {
        let problem = format!("it has {} pages, the snapshot holds {held}", pool.index().pages());
        return Err(tiering::Error::from(ChunkError::OtherMemory { object: pool.name(), problem }).into());
    }
    Ok(Some(pool))
}
