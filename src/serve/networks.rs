//! `/net-ifaces/{namespace}`: the tap of a VM's network interface, and its network namespace.

use axum::extract::{Path, State};
use serde::Deserialize;
use utoipa::ToSchema;

use super::blocking::blocking;
use super::body::{Body, check_name};
use super::daemon::Shared;
use super::fault::{Fault, FaultBody, Reply};
use super::network::Network;
use super::store::Kind;

/// The body of `PUT /net-ifaces/{namespace}`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NetworkBody {
    /// The tap, in the network namespace of this name (`ip netns add`).
    host_dev_name: String,
    /// True: the tap is in the daemon's own network namespace, and `namespace` is only a name.
    #[serde(default)]
    host_netns: bool,
    /// The interface's name in the machine.
    #[serde(default = "default_iface")]
    iface_id: String,
    guest_mac: Option<String>,
    /// FaaSnap's. Refused: requests reach guests by their serial line or vsock, the daemon needs no address.
    guest_addr: Option<String>,
    /// FaaSnap's. Refused for the same reason.
    unique_addr: Option<String>,
}

fn default_iface() -> String {
    "eth0".to_string()
}

/// All network interfaces.
#[utoipa::path(get, path = "/net-ifaces", tag = "net-ifaces",
    responses((status = 200, description = "All network interfaces", body = Vec<Network>)))]
pub(super) async fn get_networks(State(daemon): State<Shared>) -> Reply<Vec<Network>> {
    Reply(daemon.networks().values().cloned().collect())
}

/// One network interface.
#[utoipa::path(get, path = "/net-ifaces/{namespace}", tag = "net-ifaces", params(("namespace" = String, Path)),
    responses((status = 200, description = "The interface", body = Network),
        (status = 404, body = FaultBody, description = "The interface does not exist")))]
pub(super) async fn get_network(
    State(daemon): State<Shared>,
    Path(namespace): Path<String>,
) -> Result<Reply<Network>, Fault> {
    daemon.network(&namespace).map(Reply)
}

/// Sets the tap of the VMs of this namespace. Namespace and tap must exist when a VM is started.
#[utoipa::path(put, path = "/net-ifaces/{namespace}", tag = "net-ifaces", params(("namespace" = String, Path)),
    request_body = NetworkBody,
    responses((status = 200, description = "The interface as it is stored", body = Network),
        (status = 400, body = FaultBody, description = "The request is invalid")))]
pub(super) async fn put_network(
    State(daemon): State<Shared>,
    Path(namespace): Path<String>,
    Body(body): Body<NetworkBody>,
) -> Result<Reply<Network>, Fault> {
    check_name("namespace", &namespace)?;
    check_name("interface", &body.iface_id)?;
    if body.guest_addr.is_some() || body.unique_addr.is_some() {
        return Err(Fault::bad(
            "`guest_addr` and `unique_addr` have no use here: requests reach guests by their serial line or by vsock. \
             Leave them out.",
        ));
    }
    // The kernel's limit of a device's name (IFNAMSIZ), its NUL included.
    if body.host_dev_name.is_empty() || body.host_dev_name.len() > 15 || body.host_dev_name.contains(['/', '\0', ' ']) {
        return Err(Fault::bad("`host_dev_name` must be the name of a tap: 1 to 15 characters."));
    }
    if body.guest_mac.as_deref().is_some_and(|mac| !is_mac(mac)) {
        return Err(Fault::bad("`guest_mac` must be six hexadecimal bytes with colons between them."));
    }
    let NetworkBody { host_dev_name, iface_id, guest_mac, host_netns, .. } = body;
    let netns = (!host_netns).then(|| namespace.clone());
    let network = Network { namespace: namespace.clone(), host_dev_name, iface_id, guest_mac, netns };
    let kept = blocking({
        let daemon = daemon.clone();
        let network = network.clone();
        move || {
            daemon.store.save(Kind::Networks, &namespace, &network)?;
            daemon.networks().insert(namespace, network);
            Ok::<(), crate::snapshot::Error>(())
        }
    });
    kept.await?.map_err(|error| Fault::of(&error))?;
    Ok(Reply(network))
}

fn is_mac(text: &str) -> bool {
    let bytes: Vec<&str> = text.split(':').collect();
    bytes.len() == 6 && bytes.iter().all(|byte| byte.len() == 2 && byte.chars().all(|c| c.is_ascii_hexdigit()))
}

/// Removes a network interface.
#[utoipa::path(delete, path = "/net-ifaces/{namespace}", tag = "net-ifaces", params(("namespace" = String, Path)),
    responses((status = 200, description = "The removed interface", body = Network),
        (status = 404, body = FaultBody, description = "The interface does not exist")))]
pub(super) async fn delete_network(
    State(daemon): State<Shared>,
    Path(namespace): Path<String>,
) -> Result<Reply<Network>, Fault> {
    let network = daemon.network(&namespace)?;
    daemon.store.remove(Kind::Networks, &namespace).map_err(|error| Fault::of(&error))?;
    daemon.networks().remove(&namespace);
    if let Some(netns) = &network.netns {
        daemon.shells.leave(netns);
    }
    Ok(Reply(network))
}
