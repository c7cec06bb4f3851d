//! Settings of a restored VM that replace those in its snapshot.

use crate::config::DeviceConfigs;
use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Settings of restored devices that replace those in the snapshot: the host's side differs from clone to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Id of a drive or a pmem device → backing file.
    pub drives: Vec<(String, PathBuf)>,
    /// Directory for the clone's own copies of drives, for a snapshot that contains copies.
    pub drive_dir: Option<PathBuf>,
    /// Interface id → tap and MAC address.
    pub networks: Vec<NetworkOverride>,
    /// Metadata to add or replace; other keys stay.
    pub metadata: BTreeMap<String, String>,
    /// The Unix socket of the vsock device.
    pub vsock: Option<PathBuf>,
}

/// Another tap, another MAC address, or both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkOverride {
    pub iface_id: String,
    pub host_dev_name: Option<String>,
    pub guest_mac: Option<[u8; 6]>,
}

/// Another tap for a network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TapOverride)]
pub struct NetworkOverrideBody {
    /// The interface.
    pub iface_id: String,
    /// The tap, in the network namespace of the VM's process.
    pub host_dev_name: String,
}

/// Another socket for the vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverrideBody {
    pub uds_path: PathBuf,
}

/// The names of a machine's devices that overrides may name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceNames {
    /// Drives and pmem devices.
    pub drives: Vec<String>,
    pub networks: Vec<String>,
    pub has_vsock: bool,
}

/// An override of a device that the snapshot does not have.
#[derive(Debug, thiserror::Error)]
#[error("The snapshot has no {kind} `{id}` to override; it has: {has}")]
pub struct NoSuchDevice {
    pub kind: &'static str,
    pub id: String,
    pub has: String,
}

impl Overrides {
    /// The override of network interface `id`.
    pub(crate) fn network(&self, id: &str) -> Option<&NetworkOverride> {
        self.networks.iter().find(|network| network.iface_id == id)
    }

    /// Checks that every override has a device.
    pub(crate) fn check(&self, configs: &DeviceConfigs) -> Result<(), NoSuchDevice> {
        let drives = configs.drives.iter().map(|drive| drive.drive_id.clone());
        let drives = drives.chain(configs.pmem.iter().map(|pmem| pmem.id.clone())).collect();
        let networks = configs.network_interfaces.iter().map(|network| network.iface_id.clone()).collect();
        self.check_names(&DeviceNames { drives, networks, has_vsock: configs.vsock.is_some() })
    }

    /// The same, for devices of which only the names are known.
    pub(crate) fn check_names(&self, names: &DeviceNames) -> Result<(), NoSuchDevice> {
        let DeviceNames { drives, networks, has_vsock } = names;
        let missing = |kind, id: &str, has: &[String]| {
            let has = if has.is_empty() { "none".to_owned() } else { has.join(", ") };
            Err(NoSuchDevice { kind, id: id.to_owned(), has })
        };
        if let Some((id, _)) = self.drives.iter().find(|(id, _)| !drives.contains(id)) {
            return missing("drive", id, drives);
        }
        if let Some(network) = self.networks.iter().find(|network| !networks.contains(&network.iface_id)) {
            return missing("network interface", &network.iface_id, networks);
        }
        match &self.vsock {
            Some(path) if !has_vsock => missing("vsock device", &path.display().to_string(), &[]),
            _ => Ok(()),
        }
    }
}
