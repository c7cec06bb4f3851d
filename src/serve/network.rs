//! A network interface: its tap on the host.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A network interface for one VM at a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(super) struct Network {
    /// The name by which VMs ask for it.
    pub(super) namespace: String,
    /// The tap on the host.
    pub(super) host_dev_name: String,
    /// The interface's name in the machine; of a snapshot, that of the interface whose tap is replaced.
    pub(super) iface_id: String,
    pub(super) guest_mac: Option<String>,
    /// The network namespace the tap is in and VMs start in; none: the daemon's.
    #[serde(default)]
    pub(super) netns: Option<String>,
}
