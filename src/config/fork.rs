//! The fork of a VM: the request.
//!
//! Names in a request may contain the number of the child, from 1 on: `{n}` in decimal, `{n:02x}` as two hexadecimal
//! digits, for MAC addresses. `fork_children.rs` puts it in.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::overrides::{NetworkOverrideBody, VsockOverrideBody};
use crate::config::restore::{DriveOverride, MacOverride};

/// The most children of one fork: each takes a few descriptors of the parent while it starts.
pub const MAX_CHILDREN: u32 = 256;

/// A request to fork a machine: the body of `PUT /tvmm/fork`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// The number of children.
    pub count: u32,
    /// The API socket of each child.
    pub out_sock: PathBuf,
    /// The directory of the fork point; none: that of the first child's socket.
    #[serde(default)]
    pub dir: Option<PathBuf>,
    /// True: a running machine is captured while it runs, and stands still only for its state and the last pages.
    #[serde(default)]
    pub live: bool,
    /// True: the children stay paused.
    #[serde(default)]
    pub paused: bool,
    /// The most memory that each child copies before it runs, of the pages that the parent has copies of, MiB.
    #[serde(default)]
    pub dram_mib: u64,
    /// The file of each child's console and messages.
    #[serde(default)]
    pub log: Option<PathBuf>,
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverrideBody>,
    #[serde(default)]
    pub vsock_override: Option<VsockOverrideBody>,
    #[serde(default)]
    pub drive_overrides: Vec<DriveOverride>,
    /// The directory for each child's own copies of drives; none: one in the fork point.
    #[serde(default)]
    pub drive_dir: Option<PathBuf>,
    #[serde(default)]
    pub mac_overrides: Vec<MacOverride>,
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

/// The forks of a machine so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ForkCounts {
    pub done: u64,
    pub failed: u64,
    pub children: u64,
}
