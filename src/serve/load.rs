//! The restore options of VMs: those of a request, and those of the daemon's command line.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::fault::Fault;
use crate::config::InvalidRestore;
use crate::config::NetworkOverrideBody;
use crate::config::restore::{NamedFile, RestoreOptions};
use crate::snapshot::ColdSpec;

/// The options that the daemon decides: clients cannot give them in `tvmm`.
const KEPT_FROM_CLIENTS: [&str; 8] =
    ["policy", "profile", "plan_dir", "verify", "decrypt_key", "trusted_keys", "standby", "drive_dir"];

/// Names options that exclude each other in the service's words.
pub(super) fn contradiction(invalid: InvalidRestore) -> Fault {
    Fault::bad(match invalid {
        InvalidRestore::Both { other: "policy", .. } => {
            "`policy` and `tvmm.plan` contradict each other: leave one out.".to_owned()
        }
        InvalidRestore::Both { option, .. } => {
            format!("`tvmm.{option}` says what costs and budgets would decide: leave them out.")
        }
        InvalidRestore::Needs { option, needed } => format!("`tvmm.{option}` needs `tvmm.{needed}`."),
        InvalidRestore::Zero { option } => format!("`tvmm.{option}` must be 1 or more."),
        // The service names neither a memory file nor a handler, and decides itself when a VM runs.
        InvalidRestore::PoolAndMemoryFile { .. }
        | InvalidRestore::ResumedAndStandby
        | InvalidRestore::PoolAndHandler
        | InvalidRestore::TrustElsewhere
        | InvalidRestore::EncryptedElsewhere => invalid.to_string(),
    })
}

/// Refuses options that the daemon decides, paths that depend on the daemon's current directory, and options that
/// exclude each other or miss an option that they need.
pub(super) fn check(options: &RestoreOptions) -> Result<(), Fault> {
    let said = [
        options.policy.is_some(),
        options.profile.is_some(),
        options.plan_dir.is_some(),
        options.verify.is_some(),
        options.decrypt_key.is_some(),
        options.trusted_keys.is_some(),
        options.standby,
        options.drive_dir.is_some(),
    ];
    if let Some((key, _)) = KEPT_FROM_CLIENTS.iter().zip(said).find(|(_, is_said)| *is_said) {
        return Err(Fault::bad(format!("The body is wrong: unknown field `{key}` of `tvmm`.")));
    }
    for NamedFile { key, path, .. } in options.clone().files_mut() {
        if path.is_absolute() || (key == "pools" && is_node(path)) {
            continue;
        }
        let path = path.display();
        return Err(Fault::bad(match key {
            "pools" => format!("`{path}` of `tvmm.pools` must be an absolute path, or numa:N."),
            "cold_pools" => format!("`{path}` of `tvmm.cold_pools` must be an absolute path or an address."),
            _ => format!("`tvmm.{key}` must be an absolute path."),
        }));
    }
    options.check().map_err(contradiction)
}

/// Returns whether a pool is a NUMA node's memory.
pub(super) fn is_node(path: &Path) -> bool {
    path.to_str().is_some_and(|text| text.starts_with("numa:"))
}

/// The pools, and the cold pools that are directories of this host; true for a cold one.
pub(super) fn on_this_host(options: &RestoreOptions) -> Vec<(PathBuf, bool)> {
    let pools = options.pools.iter().flatten().map(|pool| (pool.clone(), false));
    let cold = options.cold_pools.iter().flatten().filter_map(ColdSpec::dir).map(|dir| (dir.to_owned(), true));
    pools.chain(cold).collect()
}

/// A request's settings of the VM that it restores, other than the snapshot and the policy.
#[derive(Clone, Debug, Default)]
pub(super) struct RestoreSettings {
    /// `tvmm` of the request.
    pub(super) tvmm: Option<RestoreOptions>,
    /// `metadata` of the request: the same as `tvmm.metadata`.
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) network_overrides: Vec<NetworkOverrideBody>,
    pub(super) track_dirty_pages: Option<bool>,
    pub(super) clock_realtime: Option<bool>,
}

impl RestoreSettings {
    /// Returns whether the request has a setting that only a restore can carry out.
    pub(super) fn is_for_restores(&self) -> bool {
        let RestoreSettings { tvmm, metadata, network_overrides, track_dirty_pages, clock_realtime } = self;
        let has_switch = track_dirty_pages.is_some() || clock_realtime.is_some();
        tvmm.is_some() || has_switch || !metadata.is_empty() || !network_overrides.is_empty()
    }

    /// `tvmm`, checked, with `metadata` added.
    pub(super) fn options(&self) -> Result<RestoreOptions, Fault> {
        let mut options = self.tvmm.clone().unwrap_or_default();
        check(&options)?;
        if !self.metadata.is_empty() && !options.metadata.is_empty() {
            return Err(Fault::bad("`metadata` and `tvmm.metadata` are the same: leave one out."));
        }
        options.metadata.extend(self.metadata.clone());
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use utoipa::PartialSchema;

    use super::*;

    fn tiers(value: Value) -> RestoreOptions {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_a_request_says_goes_before_what_the_daemon_says() {
        let daemon = tiers(json!({ "pools": ["/a"], "cold_pools": ["/c"], "cold_cache": "/k", "dram_price": 5 }));
        let said = tiers(json!({ "dram_mib": 7, "dram_price": 0 })).or(&daemon);
        assert_eq!(said, RestoreOptions { dram_mib: Some(7), dram_price: Some(0), ..daemon.clone() });
        let said = tiers(json!({ "plan": "/p", "metadata": { "a": "b" } })).or(&daemon);
        let plan = Some("/p".into());
        let metadata = BTreeMap::from([("a".to_string(), "b".to_string())]);
        assert_eq!(said, RestoreOptions { plan, metadata, dram_price: None, ..daemon.clone() });
        let said = tiers(json!({ "pools": [], "cold_pools": [] })).or(&daemon);
        assert_eq!((said.pools, said.cold_pools, said.cold_cache), (Some(Vec::new()), Some(Vec::new()), None));
    }

    #[test]
    fn pools_of_this_host_are_found_whichever_way_they_are_read() {
        let all =
            json!({ "pools": ["/a", "numa:1"], "cold_pools": ["/c", "direct:/d,depth=3", "file:///e", "tcp:h:1"] });
        let found = on_this_host(&tiers(all));
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
            let fault = check(&tiers(bad.clone())).unwrap_err();
            assert!(fault.message.contains(said), "{bad}: {}", fault.message);
        }
        let good =
            json!({ "pools": ["/a", "numa:1"], "cold_pools": ["/a", "direct:/b", "tcp:h:1", "rdma:h:1", "s3://b/p"] });
        check(&tiers(good)).unwrap();
    }

    /// Every option is either one that clients read of in the OpenAPI document, or one that they cannot give.
    #[test]
    fn every_option_is_offered_to_clients_or_kept_from_them() {
        let schema = serde_json::to_value(RestoreOptions::schema()).unwrap();
        let all = serde_json::to_value(RestoreOptions::default()).unwrap();
        for key in all.as_object().unwrap().keys() {
            let is_offered = schema["properties"].get(key).is_some();
            assert_ne!(is_offered, KEPT_FROM_CLIENTS.contains(&key.as_str()), "{key}");
        }
        for kept in [json!({ "policy": "eager" }), json!({ "profile": "/a" }), json!({ "verify": "off" })] {
            let message = check(&tiers(kept)).unwrap_err().message;
            assert!(message.contains("unknown field"), "{message}");
        }
    }
}
