//! Where cold pools are: directories, page servers, object stores; and the server itself.

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

/// The part of `--fault-timeout` that a cold pool may take: who waits is told why before the watch for stalls only knows
/// that it waits.
const PATIENCE: (u32, u32) = (3, 4);

/// One `--cold`: places that are equally near.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ColdSpec {
    /// A pool in a directory, read through the page cache.
    Dir(PathBuf),
    /// Page servers, `HOST:PORT` each.
    Tcp(Vec<String>),
}

impl ColdSpec {
    /// Understands `DIR`, `file:///DIR`, `tcp:HOST:PORT[,HOST:PORT…]`.
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
        if let Some(dir) = text.strip_prefix("file://") {
            return Ok(ColdSpec::Dir(dir.into()));
        }
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(format!("this build of tvmm has no cold pools at {scheme}:// addresses"));
        }
        if text.is_empty() { Err("it is empty".to_string()) } else { Ok(ColdSpec::Dir(text.into())) }
    }

    fn places(&self, attempt: Duration) -> Result<Vec<Box<dyn Place>>, Error> {
        Ok(match self {
            ColdSpec::Dir(dir) => vec![Box::new(file::FilePlace::open(dir)?)],
            ColdSpec::Tcp(servers) => servers
                .iter()
                .map(|server| Box::new(tcp::TcpPlace::new(server.clone(), attempt)) as Box<dyn Place>)
                .collect(),
        })
    }
}

/// Opens the object of the chain's tip in the first of `specs` that has it; the others stand by. `fault_timeout`: how long a
/// guest may wait for a page.
///
/// # Errors
/// A spec that is not understood, no pool that has it, an object that is not this snapshot's.
pub fn open(specs: &[String], chain: &Chain, fault_timeout: Duration) -> Result<Option<Arc<ColdPool>>, Error> {
    let patience = fault_timeout * PATIENCE.0 / PATIENCE.1;
    let mut places: Vec<Box<dyn Place>> = Vec::new();
    let mut alike = 0;
    for text in specs {
        let spec = ColdSpec::parse(text).map_err(|problem| Error::ColdSpec { text: text.clone(), problem })?;
        places.extend(spec.places(patience / 2)?);
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
        let servers = vec!["a:1".to_string(), "[::1]:65535".to_string()];
        assert_eq!(ColdSpec::parse("tcp:a:1,[::1]:65535"), Ok(ColdSpec::Tcp(servers)));
        for bad in ["", "tcp:", "tcp:host", "tcp::1", "tcp:host:65536", "tcp:a:1,", "ftp://host/x"] {
            assert!(ColdSpec::parse(bad).is_err(), "{bad}");
        }
    }
}
