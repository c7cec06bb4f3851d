//! Where cold pools are: directories, page servers, object stores; and the server itself.

mod cache;
mod file;
pub mod serve;
mod tcp;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::error::Error;
use crate::snapshot::Chain;
use crate::tiering;
use crate::tiering::chunks::{ColdPool, Place};
use cache::{Cache, CachedPlace};

/// The part of `--fault-timeout` that a cold pool may take: who waits is told why before the watch for stalls only knows
/// that it waits.
const PATIENCE: (u32, u32) = (3, 4);
/// Reads past the page cache under way at once when nobody says otherwise (measured: `docs/remote.md`).
const DEFAULT_DEPTH: usize = 8;

/// One `--cold`: places that are equally near.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ColdSpec {
    /// A pool in a directory, read through the page cache.
    Dir(PathBuf),
    /// The same, read past the page cache, with so many reads under way at once.
    Direct(PathBuf, usize),
    /// Page servers, `HOST:PORT` each.
    Tcp(Vec<String>),
}

impl ColdSpec {
    /// Understands `DIR`, `file:///DIR`, `direct:DIR[,depth=N]`, `tcp:HOST:PORT[,HOST:PORT…]`.
    ///
    /// # Errors
    /// What is not understood, for people.
    pub fn parse(text: &str) -> Result<ColdSpec, String> {
        if let Some(servers) = text.strip_prefix("tcp:") {
            let servers: Vec<String> = servers.trim_start_matches("//").split(',').map(str::to_owned).collect();
            let is_address = |server: &String| {
                server.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
            };
            return match servers.iter().find(|server| !is_address(server)) {
                Some(bad) => Err(format!("`{bad}` is not HOST:PORT")),
                None => Ok(ColdSpec::Tcp(servers)),
            };
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
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(format!("this build of tvmm has no cold pools at {scheme}:// addresses"));
        }
        if text.is_empty() { Err("it is empty".to_string()) } else { Ok(ColdSpec::Dir(text.into())) }
    }

    /// Whether its chunks are worth keeping on this host.
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
        })
    }
}

/// The cold pools of a restore, nearest first, and where what comes from other hosts is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ColdPools {
    pub pools: Vec<String>,
    pub cache: Option<PathBuf>,
    /// The most the cache may hold, MiB.
    pub cache_mib: Option<u64>,
}

/// What a cache holds when nobody says otherwise, MiB.
const CACHE_MIB: u64 = 1024;

/// Opens the object of the chain's tip in the first of the pools that has it; the others stand by. `fault_timeout`: how long
/// a guest may wait for a page.
///
/// # Errors
/// A spec that is not understood, no pool that has it, an object that is not this snapshot's.
pub fn open(cold: &ColdPools, chain: &Chain, fault_timeout: Duration) -> Result<Option<Arc<ColdPool>>, Error> {
    let bytes = cold.cache_mib.unwrap_or(CACHE_MIB).saturating_mul(1 << 20);
    let cache = cold.cache.as_ref().map(|dir| Cache::open(dir, bytes)).transpose()?;
    let patience = fault_timeout * PATIENCE.0 / PATIENCE.1;
    let mut places: Vec<Box<dyn Place>> = Vec::new();
    let mut alike = 0;
    for text in &cold.pools {
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
    // Of a full snapshot it is known how many pages there are without reading its page map.
    let held = tip.manifest().pages_held;
    if chain.layers().len() == 1 && pool.index().pages() != held {
        let problem = format!("it has {} pages, the snapshot holds {held}", pool.index().pages());
        return Err(
            tiering::Error::from(tiering::chunks::ChunkError::OtherMemory { object: pool.name(), problem }).into()
        );
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
            "ftp://host/x",
            "direct:",
            "direct:a,depth=0",
        ] {
            assert!(ColdSpec::parse(bad).is_err(), "{bad}");
        }
    }
}
