//! The restore options of VMs, with the keys of `/snapshot/load`: those of a request, and the daemon's defaults.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::allowed::is_node;
use super::fault::Fault;

/// Mapping of pages in place on a tier that allows more than one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mapping {
    /// The kernel copies pages that are written.
    Private,
    /// Read-only: the VMM copies pages that are written.
    Shared,
}

/// Another image for a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// The drive.
    pub drive_id: String,
    /// The image: a file or block device of the host.
    #[schema(value_type = String)]
    pub path_on_host: PathBuf,
}

/// Another MAC address for a network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MacOverride {
    /// The interface.
    pub iface_id: String,
    /// Six hexadecimal bytes with colons between them.
    pub guest_mac: String,
}

/// Another tap for a network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TapOverride {
    /// The interface.
    pub(super) iface_id: String,
    /// The tap, in the network namespace of the VM's process.
    pub(super) host_dev_name: String,
}

/// The sources of memory, the budgets, and the clone's settings of a restore. The keys are those of `tvmm` in `PUT
/// /snapshot/load`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadOptions {
    /// Pools to take memory from instead of the snapshot's files; several: from the first that has the snapshot. `[]`:
    /// its files, whatever the daemon's default.
    #[schema(value_type = Option<Vec<String>>)]
    pub pools: Option<Vec<PathBuf>>,
    /// Cold pools, nearest first. With `pools` too, they are used for a snapshot that no pool has.
    pub cold_pools: Option<Vec<String>>,
    /// Directory for chunks from other hosts.
    #[schema(value_type = Option<String>)]
    pub cold_cache: Option<PathBuf>,
    /// Its limit, MiB.
    pub cold_cache_mib: Option<u64>,
    /// Local memory for preloaded pages and pages that the guest will write, MiB.
    pub dram_mib: Option<u64>,
    /// Memory in the CXL tier, MiB.
    pub cxl_mib: Option<u64>,
    /// µs that a request may take longer to save a MiB of local memory, for policy `tiered`.
    pub dram_price: Option<u64>,
    /// A plan (`tvmm plan --out`), a file of the host, instead of a policy and its budgets.
    #[schema(value_type = Option<String>)]
    pub plan: Option<PathBuf>,
    /// Costs of this host (`tvmm calibrate --out`), a file of the host.
    #[schema(value_type = Option<String>)]
    pub costs: Option<PathBuf>,
    /// Mapping of pages in place.
    pub in_place_mapping: Option<Mapping>,
    /// Other images for drives.
    #[serde(default)]
    pub drive_overrides: Vec<DriveOverride>,
    /// Other MAC addresses for network interfaces.
    #[serde(default)]
    pub mac_overrides: Vec<MacOverride>,
    /// Metadata that the clone reads in addition to the snapshot's, or instead of them: keys and values.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

impl LoadOptions {
    /// Refuses paths that depend on the daemon's current directory, and options that lack another one.
    pub(super) fn check(&self) -> Result<(), Fault> {
        let is_place = |path: &Path| path.is_absolute() || is_node(path);
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
        let files = [("cold_cache", &self.cold_cache), ("plan", &self.plan), ("costs", &self.costs)];
        let drives = self.drive_overrides.iter().map(|drive| ("drive_overrides", Some(&drive.path_on_host)));
        for (key, path) in files.map(|(key, path)| (key, path.as_ref())).into_iter().chain(drives) {
            if path.is_some_and(|path| !path.is_absolute()) {
                return Err(Fault::bad(format!("`tvmm.{key}` must be an absolute path.")));
            }
        }
        let has_budget = self.dram_mib.is_some() || self.cxl_mib.is_some() || self.dram_price.is_some();
        if self.plan.is_some() && (has_budget || self.costs.is_some()) {
            return Err(Fault::bad("`tvmm.plan` says what costs and budgets would decide: leave them out."));
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

    /// Returns these options, with missing ones filled in from `others`.
    pub(super) fn or(self, others: &LoadOptions) -> LoadOptions {
        // A cache belongs to the cold pools given with it.
        let cold = if self.cold_pools.is_some() { &self } else { others };
        // A plan replaces the budgets.
        let budgets = if self.plan.is_some() { &LoadOptions::default() } else { others };
        LoadOptions {
            cold_pools: cold.cold_pools.clone(),
            cold_cache: cold.cold_cache.clone(),
            cold_cache_mib: cold.cold_cache_mib,
            dram_mib: self.dram_mib.or(budgets.dram_mib),
            cxl_mib: self.cxl_mib.or(budgets.cxl_mib),
            dram_price: self.dram_price.or(budgets.dram_price),
            pools: self.pools.or_else(|| others.pools.clone()),
            ..self
        }
    }

    /// The pools, and the cold pools that are directories of this host; true for a cold one.
    pub(super) fn on_this_host(&self) -> Vec<(PathBuf, bool)> {
        let pools = self.pools.iter().flatten().map(|pool| (pool.clone(), false));
        let cold = self.cold_pools.iter().flatten().filter_map(|text| Some((cold_dir(text)?.into(), true)));
        pools.chain(cold).collect()
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
            "plan": self.plan,
            "costs": self.costs,
            "in_place_mapping": self.in_place_mapping.unwrap_or(Mapping::Private),
            "drive_overrides": self.drive_overrides,
            "mac_overrides": self.mac_overrides,
            "metadata": self.metadata,
        })
    }
}

/// A request's settings of the VM that it restores, other than the snapshot and the policy.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    /// `tvmm` of the request.
    pub(super) tvmm: Option<LoadOptions>,
    /// `metadata` of the request: the same as `tvmm.metadata`.
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) network_overrides: Vec<TapOverride>,
    pub(super) track_dirty_pages: Option<bool>,
    pub(super) clock_realtime: Option<bool>,
}

impl Wanted {
    /// Returns whether the request has a setting that only a restore can carry out.
    pub(super) fn is_for_restores(&self) -> bool {
        let Wanted { tvmm, metadata, network_overrides, track_dirty_pages, clock_realtime } = self;
        let has_switch = track_dirty_pages.is_some() || clock_realtime.is_some();
        tvmm.is_some() || has_switch || !metadata.is_empty() || !network_overrides.is_empty()
    }

    /// `tvmm`, checked, with `metadata` added.
    pub(super) fn options(&self) -> Result<LoadOptions, Fault> {
        let mut options = self.tvmm.clone().unwrap_or_default();
        options.check()?;
        if !self.metadata.is_empty() && !options.metadata.is_empty() {
            return Err(Fault::bad("`metadata` and `tvmm.metadata` are the same: leave one out."));
        }
        options.metadata.extend(self.metadata.clone());
        Ok(options)
    }
}

/// Returns the directory of a cold pool if it is on this host, however it is read (`docs/remote.md`).
pub(super) fn cold_dir(text: &str) -> Option<&str> {
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

    fn tiers(value: Value) -> LoadOptions {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_a_request_says_goes_before_what_the_daemon_says() {
        let daemon = tiers(json!({ "pools": ["/a"], "cold_pools": ["/c"], "cold_cache": "/k", "dram_price": 5 }));
        let said = tiers(json!({ "dram_mib": 7, "dram_price": 0 })).or(&daemon);
        assert_eq!(said, LoadOptions { dram_mib: Some(7), dram_price: Some(0), ..daemon.clone() });
        let said = tiers(json!({ "plan": "/p", "metadata": { "a": "b" } })).or(&daemon);
        let plan = Some("/p".into());
        let metadata = BTreeMap::from([("a".to_string(), "b".to_string())]);
        assert_eq!(said, LoadOptions { plan, metadata, dram_price: None, ..daemon.clone() });
        let said = tiers(json!({ "pools": [], "cold_pools": [] })).or(&daemon);
        assert_eq!((said.pools, said.cold_pools, said.cold_cache), (Some(Vec::new()), Some(Vec::new()), None));
    }

    #[test]
    fn pools_of_this_host_are_found_whichever_way_they_are_read() {
        let all =
            json!({ "pools": ["/a", "numa:1"], "cold_pools": ["/c", "direct:/d,depth=3", "file:///e", "tcp:h:1"] });
        let found = tiers(all).on_this_host();
        let expected = [("/a", false), ("numa:1", false), ("/c", true), ("/d", true), ("/e", true)];
        assert_eq!(found, expected.map(|(dir, is_cold)| (PathBuf::from(dir), is_cold)));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (bad, said) in [
            (json!({ "pools": ["a"] }), "absolute"),
            (json!({ "pools": [""] }), "absolute"),
            (json!({ "cold_pools": ["a"] }), "absolute"),
            (json!({ "cold_cache": "/a" }), "needs `tvmm.cold_pools`"),
            (json!({ "cold_pools": ["/a"], "cold_cache": "a" }), "absolute"),
            (json!({ "plan": "a" }), "absolute"),
            (json!({ "costs": "a" }), "absolute"),
            (json!({ "drive_overrides": [{ "drive_id": "a", "path_on_host": "a" }] }), "absolute"),
            (json!({ "plan": "/a", "dram_mib": 1 }), "leave them out"),
            (json!({ "plan": "/a", "costs": "/b" }), "leave them out"),
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
