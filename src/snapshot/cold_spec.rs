//! Cold pools as users name them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::KeySource;

/// The schemes of object stores.
const OBJECT_SCHEMES: [&str; 5] = ["s3", "gs", "az", "http", "https"];
/// Default number of concurrent reads past the page cache (measured: `docs/remote.md`).
const DEFAULT_DEPTH: usize = 8;

/// One `--cold`: places that are equally near. Every build understands all names; whether a build reaches the place is
/// decided when the pool is opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ColdSpec {
    /// A pool in a directory, read through the page cache.
    Dir(PathBuf),
    /// The same, read past the page cache, with so many reads under way at once.
    Direct(PathBuf, usize),
    /// Page servers, `HOST:PORT` each.
    Tcp(Vec<String>),
    /// Page servers that are read by RDMA, `HOST:PORT` each.
    Rdma(Vec<String>),
    /// An object store, by its URL.
    Object(String),
}

/// Cold pools, and the cache of chunks from other hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cold {
    /// Nearest first; there is one at least.
    pub pools: Vec<ColdSpec>,
    pub cache: Option<ColdCache>,
    /// The source of the key of an encrypted snapshot.
    pub key: Option<KeySource>,
}

/// The cache of chunks from other hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColdCache {
    pub dir: PathBuf,
    /// Limit on its size, MiB; `None`: the default of the cache.
    pub limit_mib: Option<u64>,
}

/// A text that names no cold pool.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no cold pool: {problem}")]
pub struct NoColdPool {
    pub text: String,
    pub problem: String,
}

/// Returns true for the URL of a pool in an object store, which not every build can reach.
pub fn is_object_url(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| OBJECT_SCHEMES.contains(&scheme))
}

/// The page servers in `HOST:PORT[,HOST:PORT…]`.
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
    /// The directory of this host that the pool is in, if it is in one.
    pub fn dir(&self) -> Option<&Path> {
        match self {
            ColdSpec::Dir(dir) | ColdSpec::Direct(dir, _) => Some(dir),
            ColdSpec::Tcp(_) | ColdSpec::Rdma(_) | ColdSpec::Object(_) => None,
        }
    }

    /// The same, to be replaced.
    pub fn dir_mut(&mut self) -> Option<&mut PathBuf> {
        match self {
            ColdSpec::Dir(dir) | ColdSpec::Direct(dir, _) => Some(dir),
            ColdSpec::Tcp(_) | ColdSpec::Rdma(_) | ColdSpec::Object(_) => None,
        }
    }
}

/// Understands `DIR`, `file:///DIR`, `direct:DIR[,depth=N]`, `tcp:` and `rdma:HOST:PORT[,HOST:PORT…]`, and the URLs of
/// object stores.
impl FromStr for ColdSpec {
    type Err = NoColdPool;

    fn from_str(text: &str) -> Result<ColdSpec, NoColdPool> {
        parse(text).map_err(|problem| NoColdPool { text: text.to_string(), problem })
    }
}

fn parse(text: &str) -> Result<ColdSpec, String> {
    if let Some(servers) = text.strip_prefix("tcp:") {
        return Ok(ColdSpec::Tcp(servers_of(servers)?));
    }
    if let Some(servers) = text.strip_prefix("rdma:") {
        return Ok(ColdSpec::Rdma(servers_of(servers)?));
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
        return Ok(ColdSpec::Object(text.trim_end_matches('/').to_string()));
    }
    if let Some((scheme, _)) = text.split_once("://") {
        return Err(format!("there are no cold pools at {scheme}:// addresses"));
    }
    if text.is_empty() { Err("it is empty".to_string()) } else { Ok(ColdSpec::Dir(text.into())) }
}

impl TryFrom<String> for ColdSpec {
    type Error = NoColdPool;

    fn try_from(text: String) -> Result<ColdSpec, NoColdPool> {
        text.parse()
    }
}

impl From<ColdSpec> for String {
    fn from(spec: ColdSpec) -> String {
        spec.to_string()
    }
}

/// Writes the name so that it is understood again as the same pool.
impl fmt::Display for ColdSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ColdSpec::Dir(dir) => write!(f, "{}", dir.display()),
            ColdSpec::Direct(dir, depth) => write!(f, "direct:{},depth={depth}", dir.display()),
            ColdSpec::Tcp(servers) => write!(f, "tcp:{}", servers.join(",")),
            ColdSpec::Rdma(servers) => write!(f, "rdma:{}", servers.join(",")),
            ColdSpec::Object(url) => f.write_str(url),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cold_pools_are_named_by_directory_or_address() {
        let parse = |text: &str| text.parse::<ColdSpec>();
        let dir = |dir: &str| Ok(ColdSpec::Dir(dir.into()));
        assert_eq!(parse("pool/a"), dir("pool/a"));
        assert_eq!(parse("file:///pool"), dir("/pool"));
        assert_eq!(parse("direct:/pool"), Ok(ColdSpec::Direct("/pool".into(), DEFAULT_DEPTH)));
        assert_eq!(parse("direct:a,depth=3"), Ok(ColdSpec::Direct("a".into(), 3)));
        let servers = vec!["a:1".to_string(), "[::1]:65535".to_string()];
        assert_eq!(parse("tcp:a:1,[::1]:65535"), Ok(ColdSpec::Tcp(servers)));
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
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_that_is_written_is_understood_as_the_same_pool() {
        for text in
            ["a", "file:///a", "direct:/a", "direct:/a,depth=9", "tcp:a:1,b:2", "tcp://a:1", "rdma:a:1", "s3://b/c/"]
        {
            let spec: ColdSpec = text.parse().unwrap();
            assert_eq!(spec.to_string().parse(), Ok(spec), "{text}");
        }
    }
}
