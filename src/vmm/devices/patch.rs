//! Changes to the devices of a machine that has started.

use std::path::PathBuf;

use serde::Deserialize;

use super::{BalloonPatch, VirtioDevices};
use crate::snapshot::MemoryLayout;
use crate::vmm::config::RateLimiterConfig;
use crate::vmm::control::Refused;

/// A change to one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DevicePatch {
    Drive(DrivePatch),
    Network(NetworkPatch),
    Balloon(BalloonPatch),
    Pmem(PmemPatch),
}

/// `PATCH /drives/{id}`; what is absent stays.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    pub drive_id: String,
    /// Opens this file instead; the guest is told of its size.
    pub path_on_host: Option<PathBuf>,
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// `PATCH /network-interfaces/{id}`; what is absent stays.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkPatch {
    pub iface_id: String,
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    pub tx_rate_limiter: Option<RateLimiterConfig>,
}

/// `PATCH /pmem/{id}`; what is absent stays.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemPatch {
    pub id: String,
    pub rate_limiter: Option<RateLimiterConfig>,
}

impl VirtioDevices {
    /// Changes a device of a machine with memory of `layout`, and its config.
    pub fn patch(&mut self, patch: DevicePatch, layout: &MemoryLayout) -> Result<(), Refused> {
        match patch {
            DevicePatch::Drive(patch) => Err(no_such("drive", &patch.drive_id)),
            DevicePatch::Network(patch) => Err(no_such("network interface", &patch.iface_id)),
            DevicePatch::Balloon(patch) => self.patch_balloon(patch, layout),
            DevicePatch::Pmem(patch) => self.patch_pmem(&patch),
        }
    }
}

pub(super) fn no_such(kind: &str, id: &str) -> Refused {
    Refused::bad_request(format!("There is no {kind} `{id}`."))
}
