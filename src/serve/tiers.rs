//! Where restored VMs take their memory from, and what it may cost: what a request says, and what the daemon says for those
//! that do not.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::fault::Fault;

/// Where a restore takes memory from, and what it may cost. The keys are those of `tvmm` in `PUT /snapshot/load`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Tiers {
    /// Pools to take memory from instead of the snapshot's files; several: from the first that has the snapshot. `[]`: its
    /// files, whatever the daemon's default.
    #[schema(value_type = Option<Vec<String>>)]
    pub pools: Option<Vec<PathBuf>>,
    /// Cold pools, nearest first. With `pools` too, they stand by for a snapshot that no pool has.
    pub cold_pools: Option<Vec<String>>,
    /// Where chunks that come from other hosts are kept.
    #[schema(value_type = Option<String>)]
    pub cold_cache: Option<PathBuf>,
    /// The most it may hold, MiB.
    pub cold_cache_mib: Option<u64>,
    /// Local memory for what is preloaded or will be written, MiB.
    pub dram_mib: Option<u64>,
    /// Memory in the CXL tier, MiB.
    pub cxl_mib: Option<u64>,
    /// µs that a request may take longer to save a MiB of local memory, for policy `tiered`.
    pub dram_price: Option<u64>,
}

impl Tiers {
    /// Refuses what depends on where the daemon was started, and what means nothing alone.
    pub(super) fn check(&self) -> Result<(), Fault> {
        let is_place = |path: &Path| path.is_absolute() || path.to_str().is_some_and(|text| text.starts_with("numa:"));
        for pool in self.pools.iter().flatten() {
            if !is_place(pool) {
                let pool = pool.display();
                return Err(Fault::bad(format!("`{pool}` of `tvmm.pools` must be an absolute path, or numa:N.")));
            }
        }
        for pool in self.cold_pools.iter().flatten() {
            if !(pool.starts_with('/')
                || pool.contains(":/")
                || ["tcp:", "rdma:"].iter().any(|scheme| pool.starts_with(scheme)))
            {
                let message = format!("`{pool}` of `tvmm.cold_pools` must be an absolute path or an address.");
                return Err(Fault::bad(message));
            }
        }
        if self.cold_cache.as_ref().is_some_and(|dir| !dir.is_absolute()) {
            return Err(Fault::bad("`tvmm.cold_cache` must be an absolute path."));
        }
        if self.cold_cache_mib == Some(0) {
            return Err(Fault::bad("`tvmm.cold_cache_mib` must be 1 or more."));
        }
        let has_cold = self.cold_pools.as_ref().is_some_and(|pools| !pools.is_empty());
        if self.cold_cache.is_some() && !has_cold {
            return Err(Fault::bad("`tvmm.cold_cache` needs `tvmm.cold_pools`."));
        }
        match self.cold_cache_mib.is_some() && self.cold_cache.is_none() {
            true => Err(Fault::bad("`tvmm.cold_cache_mib` needs `tvmm.cold_cache`.")),
            false => Ok(()),
        }
    }

    /// What is said here, and of what is not, what `others` say.
    pub(super) fn or(self, others: &Tiers) -> Tiers {
        // A cache belongs to the cold pools that were said with it.
        let cold = if self.cold_pools.is_some() { &self } else { others };
        Tiers {
            cold_pools: cold.cold_pools.clone(),
            cold_cache: cold.cold_cache.clone(),
            cold_cache_mib: cold.cold_cache_mib,
            dram_mib: self.dram_mib.or(others.dram_mib),
            cxl_mib: self.cxl_mib.or(others.cxl_mib),
            dram_price: self.dram_price.or(others.dram_price),
            pools: self.pools.or_else(|| others.pools.clone()),
        }
    }

    /// The pools, and the cold pools that are directories of this host; of each whether it is to be a cold one.
    pub(super) fn on_this_host(&self) -> Vec<(PathBuf, bool)> {
        let pools = self.pools.iter().flatten().map(|pool| (pool.clone(), false));
        let cold = self.cold_pools.iter().flatten().filter_map(|text| Some((cold_dir(text)?.into(), true)));
        pools.chain(cold).collect()
    }

    /// Whether there are cold pools and no others.
    pub(super) fn is_cold_alone(&self) -> bool {
        let any = |count: Option<usize>| count.is_some_and(|count| count > 0);
        any(self.cold_pools.as_ref().map(Vec::len)) && !any(self.pools.as_ref().map(Vec::len))
    }

    /// The `tvmm` of the VM's `/snapshot/load`.
    pub(super) fn load_body(&self) -> Value {
        json!({
            "pools": self.pools.as_deref().unwrap_or_default(),
            "cold_pools": self.cold_pools.as_deref().unwrap_or_default(),
            "cold_cache": self.cold_cache,
            "cold_cache_mib": self.cold_cache_mib,
            "dram_mib": self.dram_mib,
            "cxl_mib": self.cxl_mib,
            "dram_price": self.dram_price,
        })
    }
}

/// The directory that a cold pool is in, if it is one of this host, however it is read (`docs/remote.md`).
fn cold_dir(text: &str) -> Option<&str> {
    if let Some(direct) = text.strip_prefix("direct:") {
        return Some(direct.rsplit_once(",depth=").map_or(direct, |(dir, _)| dir));
    }
    let dir = text.strip_prefix("file://").unwrap_or(text);
    let is_address = dir.starts_with("tcp:") || dir.starts_with("rdma:") || dir.contains("://");
    (!is_address).then_some(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiers(value: Value) -> Tiers {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_a_request_says_goes_before_what_the_daemon_says() {
        let daemon = tiers(json!({ "pools": ["/a"], "cold_pools": ["/c"], "cold_cache": "/k", "dram_price": 5 }));
        let said = tiers(json!({ "dram_mib": 7, "dram_price": 0 })).or(&daemon);
        assert_eq!(said, Tiers { dram_mib: Some(7), dram_price: Some(0), ..daemon.clone() });
        let said = tiers(json!({ "pools": [], "cold_pools": [] })).or(&daemon);
        assert_eq!((said.pools, said.cold_pools, said.cold_cache), (Some(Vec::new()), Some(Vec::new()), None));
    }

    #[test]
    fn pools_of_this_host_are_found_whichever_way_they_are_read() {
        let all =
            json!({ "pools": ["/a", "numa:1"], "cold_pools": ["/c", "direct:/d,depth=3", "file:///e", "tcp:h:1"] });
        let found = tiers(all.clone()).on_this_host();
        let expected = [("/a", false), ("numa:1", false), ("/c", true), ("/d", true), ("/e", true)];
        assert_eq!(found, expected.map(|(dir, is_cold)| (PathBuf::from(dir), is_cold)));
        assert!(!tiers(all).is_cold_alone() && tiers(json!({ "pools": [], "cold_pools": ["/c"] })).is_cold_alone());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (bad, said) in [
            (json!({ "pools": ["a"] }), "absolute"),
            (json!({ "pools": [""] }), "absolute"),
            (json!({ "cold_pools": ["a"] }), "absolute"),
            (json!({ "cold_cache": "/a" }), "needs `tvmm.cold_pools`"),
            (json!({ "cold_pools": ["/a"], "cold_cache": "a" }), "absolute"),
            (json!({ "cold_pools": ["/a"], "cold_cache_mib": 1 }), "needs `tvmm.cold_cache`"),
            (json!({ "cold_pools": ["/a"], "cold_cache": "/b", "cold_cache_mib": 0 }), "1 or more"),
        ] {
            let fault = tiers(bad.clone()).check().unwrap_err();
            assert!(fault.message.contains(said), "{bad}: {}", fault.message);
        }
        let good =
            json!({ "pools": ["/a", "numa:1"], "cold_pools": ["/a", "direct:/b", "tcp:h:1", "rdma:h:1", "s3://b/p"] });
        tiers(good).check().unwrap();
    }
}
