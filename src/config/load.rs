//! The loading of a snapshot, in Firecracker's keys and `tvmm`'s: the body of `PUT /snapshot/load`, and `snapshot-load`
//! of a config.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::{ConfigError, parse_mac};
use crate::config::overrides::{NetworkOverride, Overrides};
use crate::config::request::ColdPools;
use crate::config::request::{DEFAULT_POLICY, LoadSnapshot, SnapshotPaths};
use crate::snapshot::{InPlaceMapping, Verify};

/// The body as parsed, before it is checked.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Fields")]
pub struct LoadBody(Fields);

#[derive(Debug, Deserialize)]
enum MemBackendType {
    File,
    Uffd,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemBackend {
    backend_type: MemBackendType,
    backend_path: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkOverrideBody {
    iface_id: String,
    host_dev_name: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VsockOverrideBody {
    uds_path: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DriveOverrideBody {
    drive_id: String,
    path_on_host: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MacOverrideBody {
    iface_id: String,
    guest_mac: String,
}

/// Fields that Firecracker's body does not have.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Extension {
    /// The name of the restore policy.
    policy: Option<String>,
    /// The profile that the policy uses.
    profile: Option<PathBuf>,
    /// A plan from a file, instead of a policy's.
    plan: Option<PathBuf>,
    /// Directory for plans and working-set images, instead of beside the snapshot.
    plan_dir: Option<PathBuf>,
    /// File of this host's costs.
    costs: Option<PathBuf>,
    /// Budgets, MiB.
    dram_mib: Option<u64>,
    cxl_mib: Option<u64>,
    /// µs that a request may take longer to save a MiB of local memory.
    dram_price: Option<u64>,
    /// Mapping of pages in place.
    #[serde(default)]
    in_place_mapping: InPlaceMapping,
    /// The time at which the memory is compared with the snapshot's checksums.
    #[serde(default)]
    verify: Verify,
    /// Cold pools that hold the snapshot's memory, nearest first.
    #[serde(default)]
    cold_pools: Vec<String>,
    /// Directory for chunks from other hosts, and its limit in MiB.
    cold_cache: Option<PathBuf>,
    cold_cache_mib: Option<u64>,
    /// Pools to take guest memory from, in order of preference.
    #[serde(default)]
    pools: Vec<PathBuf>,
    /// Other backing files for drives.
    #[serde(default)]
    drive_overrides: Vec<DriveOverrideBody>,
    /// Directory for this clone's copies of drives, for a snapshot that contains copies.
    drive_dir: Option<PathBuf>,
    /// Metadata to add or replace.
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    /// Other MAC addresses for network interfaces.
    #[serde(default)]
    mac_overrides: Vec<MacOverrideBody>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    snapshot_path: PathBuf,
    /// Deprecated: `mem_backend` of type `File`.
    mem_file_path: Option<PathBuf>,
    mem_backend: Option<MemBackend>,
    #[serde(default)]
    track_dirty_pages: bool,
    /// Deprecated: `track_dirty_pages`.
    #[serde(default)]
    enable_diff_snapshots: bool,
    #[serde(default)]
    resume_vm: bool,
    #[serde(default)]
    network_overrides: Vec<NetworkOverrideBody>,
    vsock_override: Option<VsockOverrideBody>,
    #[serde(default)]
    clock_realtime: bool,
    #[serde(default)]
    tvmm: Extension,
}

impl TryFrom<Fields> for LoadBody {
    type Error = &'static str;

    /// Refuses what Firecracker's own parser refuses, in its words: clients match them.
    fn try_from(fields: Fields) -> Result<Self, &'static str> {
        match fields.mem_backend.is_some() && fields.mem_file_path.is_some() {
            true => Err("too many fields: either `mem_backend` or `mem_file_path` exclusively is required"),
            false => Ok(LoadBody(fields)),
        }
    }
}

impl LoadBody {
    /// Returns whether it has a field that Firecracker calls deprecated.
    pub fn is_deprecated(&self) -> bool {
        self.0.mem_file_path.is_some() || self.0.enable_diff_snapshots
    }

    /// Returns the request after all checks that need no look at the host.
    ///
    /// # Errors
    /// Empty paths, invalid MAC addresses, and keys that exclude each other or miss a key that they need.
    pub fn check(self) -> Result<LoadSnapshot, ConfigError> {
        let LoadBody(mut fields) = self;
        let overrides = overrides(&mut fields)?;
        let (memory, memory_key, handler) = match (fields.mem_backend, fields.mem_file_path) {
            (Some(MemBackend { backend_type: MemBackendType::Uffd, backend_path }), _) => {
                (None, "backend_path", Some(backend_path))
            }
            (Some(backend), _) => (Some(backend.backend_path), "backend_path", None),
            (None, memory) => (memory, "mem_file_path", None),
        };
        fields.tvmm.check()?;
        let tvmm = fields.tvmm;
        let location = snapshot_paths(fields.snapshot_path, memory, memory_key)?;
        if location.memory.is_some() && !(tvmm.pools.is_empty() && tvmm.cold_pools.is_empty()) {
            return Err(ConfigError::LoadConflict { key: "a pool", other: memory_key });
        }
        Ok(LoadSnapshot {
            location,
            policy: tvmm.policy.unwrap_or_else(|| DEFAULT_POLICY.to_owned()),
            profile: tvmm.profile,
            plan: tvmm.plan,
            plan_dir: tvmm.plan_dir,
            costs: tvmm.costs,
            dram_mib: tvmm.dram_mib,
            cxl_mib: tvmm.cxl_mib,
            dram_price_us: tvmm.dram_price,
            in_place_mapping: tvmm.in_place_mapping,
            verify: tvmm.verify,
            cold: ColdPools { pools: tvmm.cold_pools, cache: tvmm.cold_cache, cache_mib: tvmm.cold_cache_mib },
            pools: tvmm.pools,
            handler,
            overrides,
            track_dirty_pages: fields.track_dirty_pages || fields.enable_diff_snapshots,
            clock_realtime: fields.clock_realtime,
            resume: fields.resume_vm,
        })
    }
}

impl Extension {
    fn check(&self) -> Result<(), ConfigError> {
        let besides_a_plan = [
            ("tvmm.policy", self.policy.is_some()),
            ("tvmm.profile", self.profile.is_some()),
            ("tvmm.costs", self.costs.is_some()),
            ("tvmm.dram_mib", self.dram_mib.is_some()),
            ("tvmm.cxl_mib", self.cxl_mib.is_some()),
            ("tvmm.dram_price", self.dram_price.is_some()),
        ];
        if self.plan.is_some()
            && let Some((other, _)) = besides_a_plan.into_iter().find(|(_, is_there)| *is_there)
        {
            return Err(ConfigError::LoadConflict { key: "tvmm.plan", other });
        }
        if self.cold_cache.is_some() && self.cold_pools.is_empty() {
            return Err(ConfigError::LoadNeeds { key: "tvmm.cold_cache", needed: "tvmm.cold_pools" });
        }
        match self.cold_cache_mib {
            Some(_) if self.cold_cache.is_none() => {
                Err(ConfigError::LoadNeeds { key: "tvmm.cold_cache_mib", needed: "tvmm.cold_cache" })
            }
            Some(0) => Err(ConfigError::EmptyCache),
            _ => Ok(()),
        }
    }
}

/// The host-side settings of the clone's devices.
fn overrides(fields: &mut Fields) -> Result<Overrides, ConfigError> {
    let tap = |body: NetworkOverrideBody| NetworkOverride {
        iface_id: body.iface_id,
        host_dev_name: Some(body.host_dev_name),
        guest_mac: None,
    };
    let mut networks: Vec<NetworkOverride> =
        std::mem::take(&mut fields.network_overrides).into_iter().map(tap).collect();
    let tvmm = &mut fields.tvmm;
    for body in std::mem::take(&mut tvmm.mac_overrides) {
        let guest_mac = Some(parse_mac(&body.guest_mac).ok_or(ConfigError::Mac { text: body.guest_mac })?);
        match networks.iter_mut().find(|network| network.iface_id == body.iface_id) {
            Some(network) => network.guest_mac = guest_mac,
            None => networks.push(NetworkOverride { iface_id: body.iface_id, host_dev_name: None, guest_mac }),
        }
    }
    let drives = std::mem::take(&mut tvmm.drive_overrides);
    let drives = drives.into_iter().map(|body| (body.drive_id, body.path_on_host)).collect();
    let metadata = std::mem::take(&mut tvmm.metadata);
    let (drive_dir, vsock) = (tvmm.drive_dir.take(), fields.vsock_override.take().map(|body| body.uds_path));
    Ok(Overrides { drives, drive_dir, networks, metadata, vsock })
}

/// The paths of a snapshot. Refuses empty ones, which would otherwise be reported as a missing file without a name.
pub fn snapshot_paths(
    snapshot: PathBuf,
    memory: Option<PathBuf>,
    memory_key: &'static str,
) -> Result<SnapshotPaths, ConfigError> {
    for (key, path) in [("snapshot_path", Some(&snapshot)), (memory_key, memory.as_ref())] {
        if path.is_some_and(|path| path.as_os_str().is_empty()) {
            return Err(ConfigError::EmptySnapshotPath { key });
        }
    }
    Ok(SnapshotPaths { snapshot, memory })
}
