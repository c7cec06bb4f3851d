//! The places of cold pools: directories, page servers, object stores. And the page server itself.

mod bounded;
mod cache;
mod file;
#[cfg(feature = "object-store")]
pub mod object;
#[cfg(feature = "rdma")]
mod rdma;
pub mod serve;
mod tcp;
pub mod wire;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::backends::Error;
use crate::snapshot::{Chain, PageSet, SnapshotId};
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
/// Default number of concurrent reads past the page cache (measured: `docs/remote.md`).
const DEFAULT_DEPTH: usize = 8;

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
            AnyPool::Dir(store) => store.add(chain, hot, progress),
            #[cfg(feature = "object-store")]
            AnyPool::Object(pool) => pool.add((chain, hot), progress),
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

/// The value of one `--cold`: equivalent places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ColdSpec {
    /// A pool in a directory, read through the page cache.
    Dir(PathBuf),
    /// A directory read past the page cache, with so many concurrent reads.
    Direct(PathBuf, usize),
    /// Page servers, `HOST:PORT` each.
    Tcp(Vec<String>),
    /// Page servers that are read by RDMA, `HOST:PORT` each.
    #[cfg(feature = "rdma")]
    Rdma(Vec<String>),
    /// An object store, by its URL.
    #[cfg(feature = "object-store")]
    Object(String),
}

/// The schemes of object stores.
pub const OBJECT_SCHEMES: [&str; 5] = ["s3", "gs", "az", "http", "https"];

/// Returns whether this is the URL of a pool in an object store, which not every build can reach.
pub fn is_object_url(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| OBJECT_SCHEMES.contains(&scheme))
}

/// Parses the page servers in `HOST:PORT[,HOST:PORT…]`.
fn servers_of(text: &str) -> Result<Vec<String>, String> {
    let servers: Vec<String> = text.trim_start_matches("//").split(',').map(str::to_owned).collect();
    let is_address = |server: &String| {
        server.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
    };
    match servers.iter().find(|server| !is_address(server)) {
        Some(bad) => Err(format!("`{bad}` is not HOST:PORT")),
        None => Ok(servers),
    }
}

impl ColdSpec {
    /// Parses `DIR`, `file:///DIR`, `direct:DIR[,depth=N]`, `tcp:` and `rdma:HOST:PORT[,HOST:PORT…]`, and the URLs of
    /// object stores.
    ///
    /// # Errors
    /// The part that is not understood, as a sentence for users.
    pub fn parse(text: &str) -> Result<ColdSpec, String> {
        if let Some(servers) = text.strip_prefix("tcp:") {
            return Ok(ColdSpec::Tcp(servers_of(servers)?));
        }
        if let Some(servers) = text.strip_prefix("rdma:") {
            #[cfg(feature = "rdma")]
            return Ok(ColdSpec::Rdma(servers_of(servers)?));
            #[cfg(not(feature = "rdma"))]
            return servers_of(servers).and(Err(NO_RDMA.to_string()));
        }
        if let Some(direct) = text.strip_prefix("direct:") {
            let (dir, depth) = match direct.rsplit_once(",depth=") {
                None => (direct, Some(DEFAULT_DEPTH)),
                Some((dir, depth)) => (dir, depth.parse().ok().filter(|depth| (1..=256).contains(depth))),
            };
            return match depth {
                Some(depth) if !dir.is_empty() => Ok(ColdSpec::Direct(dir.into(), depth)),
                _ => Err("it is not like direct:DIR or direct:DIR,depth=N with N from 1 to 256".to_string()),
            };
        }
        if let Some(dir) = text.strip_prefix("file://") {
            return Ok(ColdSpec::Dir(dir.into()));
        }
        if is_object_url(text) {
            #[cfg(feature = "object-store")]
            return Ok(ColdSpec::Object(text.trim_end_matches('/').to_string()));
            #[cfg(not(feature = "object-store"))]
            return Err(NO_OBJECT_STORES.to_string());
        }
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(format!("there are no cold pools at {scheme}:// addresses"));
        }
        if text.is_empty() { Err("it is empty".to_string()) } else { Ok(ColdSpec::Dir(text.into())) }
    }

    /// Returns whether its chunks are worth caching on this host.
    fn is_far(&self) -> bool {
        !matches!(self, ColdSpec::Dir(_) | ColdSpec::Direct(..))
    }

    fn places(&self, attempt: Duration) -> Result<Vec<Box<dyn Place>>, Error> {
        Ok(match self {
            ColdSpec::Dir(dir) => vec![Box::new(file::FilePlace::open(dir, None)?)],
            ColdSpec::Direct(dir, depth) => vec![Box::new(file::FilePlace::open(dir, Some(*depth))?)],
            ColdSpec::Tcp(servers) => servers
                .iter()
                .map(|server| Box::new(tcp::TcpPlace::new(server.clone(), attempt)) as Box<dyn Place>)
                .collect(),
            #[cfg(feature = "rdma")]
            ColdSpec::Rdma(servers) => rdma::places(servers, attempt)
                .map_err(|problem| Error::ColdSpec { text: format!("rdma:{}", servers.join(",")), problem })?,
            #[cfg(feature = "object-store")]
            ColdSpec::Object(url) => vec![Box::new(object::ObjectPlace::new(url.clone(), attempt))],
        })
    }
}

/// Default limit of a cache, MiB.
const CACHE_MIB: u64 = 1024;

/// The cache of chunks from other hosts.
#[derive(Clone, Copy, Debug)]
pub struct CacheAt<'a> {
    pub dir: &'a Path,
    /// Limit in MiB; [`CACHE_MIB`] if `None`.
    pub limit_mib: Option<u64>,
}

/// Opens the object of the chain's tip in the first of `pools` that has it; the others stand by. `fault_timeout`: the
/// longest that a guest may wait for a page.
///
/// # Errors
/// A spec that cannot be parsed, no pool with the object, or an object of another snapshot.
pub fn open(
    pools: &[String],
    cache: Option<CacheAt<'_>>,
    chain: &Chain,
    fault_timeout: Duration,
) -> Result<Option<Arc<ColdPool>>, Error> {
    let limit = |at: CacheAt<'_>| at.limit_mib.unwrap_or(CACHE_MIB).saturating_mul(1 << 20);
    let cache = cache.map(|at| Cache::open(at.dir, limit(at))).transpose()?;
    let patience = fault_timeout * PATIENCE.0 / PATIENCE.1;
    let mut places: Vec<Box<dyn Place>> = Vec::new();
    let mut alike = 0;
    for text in pools {
        let spec = ColdSpec::parse(text).map_err(|problem| Error::ColdSpec { text: text.clone(), problem })?;
        let of_spec = spec.places(patience / 2)?.into_iter();
        places.extend(of_spec.map(|place| match cache.clone().filter(|_| spec.is_far()) {
            Some(cache) => Box::new(CachedPlace { place, cache }) as Box<dyn Place>,
            None => place,
        }));
        alike = if alike == 0 { places.len() } else { alike };
    }
    if places.is_empty() {
        return Ok(None);
    }
    let tip = chain.tip();
    let pool = ColdPool::open(places, alike, (tip.id(), tip.layout()), patience).map_err(tiering::Error::from)?;
    // For a full snapshot the number of pages is known without reading its page map.
    let held = tip.manifest().pages_held;
    if chain.layers().len() == 1 && pool.index().pages() != held {
        let problem = format!("it has {} pages, the snapshot holds {held}", pool.index().pages());
        return Err(tiering::Error::from(ChunkError::OtherMemory { object: pool.name(), problem }).into());
    }
    Ok(Some(pool))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cold_pools_are_named_by_directory_or_address() {
        let dir = |dir: &str| Ok(ColdSpec::Dir(dir.into()));
        assert_eq!(ColdSpec::parse("pool/a"), dir("pool/a"));
        assert_eq!(ColdSpec::parse("file:///pool"), dir("/pool"));
        assert_eq!(ColdSpec::parse("direct:/pool"), Ok(ColdSpec::Direct("/pool".into(), DEFAULT_DEPTH)));
        assert_eq!(ColdSpec::parse("direct:a,depth=3"), Ok(ColdSpec::Direct("a".into(), 3)));
        let servers = vec!["a:1".to_string(), "[::1]:65535".to_string()];
        assert_eq!(ColdSpec::parse("tcp:a:1,[::1]:65535"), Ok(ColdSpec::Tcp(servers)));
        for bad in [
            "",
            "tcp:",
            "tcp:host",
            "tcp::1",
            "tcp:host:65536",
            "tcp:a:1,",
            "rdma:host",
            "ftp://host/x",
            "direct:",
            "direct:a,depth=0",
        ] {
            assert!(ColdSpec::parse(bad).is_err(), "{bad}");
        }
    }
}
