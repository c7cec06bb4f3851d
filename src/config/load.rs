//! The loading of a snapshot, in Firecracker's keys and `tvmm`'s: the body of `PUT /snapshot/load`, and `snapshot-load`
//! of a config.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ConfigError, format_mac, parse_mac};
use crate::config::error::InvalidRestore;
use crate::config::overrides::{NetworkOverride, NetworkOverrideBody, Overrides, VsockOverrideBody};
use crate::config::request::{RepurposeRequest, SnapshotPaths};
use crate::config::restore::{DriveOverride, MacOverride, MemorySaid, RestoreOptions, RestoreRequest, Start};

/// The body as parsed, before it is checked.
#[derive(Debug, Deserialize)]
#[serde(try_from = "LoadFields")]
pub struct LoadBody(LoadFields);

/// The kinds of sources of guest memory, by Firecracker's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemBackendType {
    File,
    Uffd,
}

/// A memory file, or the socket of a page-fault handler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemBackend {
    pub backend_type: MemBackendType,
    pub backend_path: PathBuf,
}

/// The body of `PUT /snapshot/load`, field by field: clients write it, and the service sends it to its VMs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadFields {
    pub snapshot_path: PathBuf,
    /// Deprecated: `mem_backend` of type `File`.
    pub mem_file_path: Option<PathBuf>,
    pub mem_backend: Option<MemBackend>,
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Deprecated: `track_dirty_pages`.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    #[serde(default)]
    pub resume_vm: bool,
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverrideBody>,
    pub vsock_override: Option<VsockOverrideBody>,
    #[serde(default)]
    pub clock_realtime: bool,
    /// Options that Firecracker's body has no field for.
    #[serde(default)]
    pub tvmm: RestoreOptions,
}

impl TryFrom<LoadFields> for LoadBody {
    type Error = &'static str;

    /// Refuses what Firecracker's own parser refuses, in its words: clients match them.
    fn try_from(fields: LoadFields) -> Result<Self, &'static str> {
        if fields.mem_backend.is_some() && fields.mem_file_path.is_some() {
            Err("too many fields: either `mem_backend` or `mem_file_path` exclusively is required")
        } else {
            Ok(LoadBody(fields))
        }
    }
}

impl LoadBody {
    /// A body that was not parsed from JSON.
    pub fn new(fields: LoadFields) -> LoadBody {
        LoadBody(fields)
    }

    /// Returns whether it has a field that Firecracker calls deprecated.
    pub fn is_deprecated(&self) -> bool {
        self.0.mem_file_path.is_some() || self.0.enable_diff_snapshots
    }

    /// Returns the request after all checks that need no look at the host.
    ///
    /// # Errors
    /// Empty paths, invalid MAC addresses, and keys that exclude each other or miss a key that they need.
    pub fn check(self) -> Result<RestoreRequest, ConfigError> {
        let LoadBody(mut fields) = self;
        let overrides = overrides(&mut fields)?;
        let file = |path, key| MemorySaid::File { path, key };
        let memory = match (fields.mem_backend, fields.mem_file_path) {
            (Some(MemBackend { backend_type: MemBackendType::Uffd, backend_path }), _) => {
                MemorySaid::Handler(backend_path)
            }
            (Some(backend), _) => file(backend.backend_path, "backend_path"),
            (None, Some(path)) => file(path, "mem_file_path"),
            (None, None) => MemorySaid::Nothing,
        };
        refuse_empty("snapshot_path", &fields.snapshot_path)?;
        if let MemorySaid::File { path, key } = &memory {
            refuse_empty(key, path)?;
        }
        let request = RestoreRequest::new(fields.snapshot_path, memory, fields.tvmm)?;
        if fields.resume_vm && request.start == Start::Standby {
            return Err(InvalidRestore::ResumedAndStandby.into());
        }
        Ok(RestoreRequest {
            overrides,
            track_dirty_pages: fields.track_dirty_pages || fields.enable_diff_snapshots,
            clock_realtime: fields.clock_realtime,
            start: if fields.resume_vm { Start::Running } else { request.start },
            ..request
        })
    }
}

/// The body of `PUT /tvmm/repurpose`: that of `PUT /snapshot/load`, and beside it `compare` and `discard_console`.
#[derive(Debug, Deserialize)]
#[serde(try_from = "serde_json::Map<String, serde_json::Value>")]
pub struct RepurposeBody {
    load: LoadBody,
    compare: bool,
    discard_console: bool,
}

impl TryFrom<serde_json::Map<String, serde_json::Value>> for RepurposeBody {
    type Error = serde_json::Error;

    fn try_from(mut fields: serde_json::Map<String, serde_json::Value>) -> Result<Self, serde_json::Error> {
        let mut take = |key| fields.remove(key).map(serde_json::from_value).transpose();
        let compare = take("compare")?;
        let discard_console = take("discard_console")?;
        let load = serde_json::from_value(fields.into())?;
        Ok(RepurposeBody { load, compare: compare.unwrap_or(false), discard_console: discard_console.unwrap_or(false) })
    }
}

/// The same body, as the service writes it.
#[derive(Debug, Serialize)]
pub struct RepurposeFields {
    #[serde(flatten)]
    pub load: LoadFields,
    pub discard_console: bool,
}

impl RepurposeBody {
    pub fn is_deprecated(&self) -> bool {
        self.load.is_deprecated()
    }

    /// See [`LoadBody::check`].
    pub fn check(self) -> Result<RepurposeRequest, ConfigError> {
        let RepurposeBody { load, compare, discard_console } = self;
        Ok(RepurposeRequest { load: load.check()?, compare, discard_console })
    }
}

impl LoadFields {
    /// Sets the fields of the clone's devices.
    pub fn set_overrides(&mut self, overrides: Overrides) {
        let Overrides { drives, drive_dir, networks, metadata, vsock } = overrides;
        for NetworkOverride { iface_id, host_dev_name, guest_mac } in networks {
            if let Some(guest_mac) = guest_mac.map(format_mac) {
                self.tvmm.mac_overrides.push(MacOverride { iface_id: iface_id.clone(), guest_mac });
            }
            if let Some(host_dev_name) = host_dev_name {
                self.network_overrides.push(NetworkOverrideBody { iface_id, host_dev_name });
            }
        }
        let drive = |(drive_id, path_on_host)| DriveOverride { drive_id, path_on_host };
        self.tvmm.drive_overrides = drives.into_iter().map(drive).collect();
        self.tvmm.drive_dir = drive_dir;
        self.tvmm.metadata = metadata;
        self.vsock_override = vsock.map(|uds_path| VsockOverrideBody { uds_path });
    }
}

/// The host-side settings of the clone's devices.
fn overrides(fields: &mut LoadFields) -> Result<Overrides, ConfigError> {
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
    let drive_dir = tvmm.drive_dir.take();
    let vsock = fields.vsock_override.take().map(|body| body.uds_path);
    Ok(Overrides { drives, drive_dir, networks, metadata, vsock })
}

/// The paths of a snapshot that is made.
///
/// # Errors
/// Empty paths.
pub fn snapshot_paths(
    snapshot: PathBuf,
    memory: Option<PathBuf>,
    memory_key: &'static str,
) -> Result<SnapshotPaths, ConfigError> {
    refuse_empty("snapshot_path", &snapshot)?;
    memory.as_deref().map_or(Ok(()), |path| refuse_empty(memory_key, path))?;
    Ok(SnapshotPaths { snapshot, memory })
}

/// Refuses an empty path, which would otherwise be reported as a missing file without a name.
fn refuse_empty(key: &'static str, path: &Path) -> Result<(), ConfigError> {
    if path.as_os_str().is_empty() { Err(ConfigError::EmptySnapshotPath { key }) } else { Ok(()) }
}
