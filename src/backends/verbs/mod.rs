//! RDMA over Converged Ethernet (RoCE v2) through libibverbs, which is loaded when it is first used: reliable
//! connections on which one side lends memory (`lend`) and the other reads it (`read`) without the lender's CPU.
//!
//! Verbs, states of a queue pair and their attributes: InfiniBand Architecture Specification, volume 1, chapters 10 and
//! 11; ibv_modify_qp(3), ibv_reg_mr(3). Addresses: annex A17 (RoCE v2), in which a GID is an IP address.

mod lend;
mod queue_pair;
mod read;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use rdma_mummy_sys::{
    IBV_GID_TYPE_ROCE_V2, ibv_access_flags, ibv_gid, ibv_gid_entry, ibv_global_route, ibv_qp_attr_mask as Mask,
    ibv_qp_state,
};
use sideway::ibverbs::device::{DeviceInfo, DeviceList};
use sideway::ibverbs::device_context::{DeviceContext, PortState};
use sideway::ibverbs::protection_domain::ProtectionDomain;

use crate::backends::cold::wire::Endpoint;
pub use lend::{Lent, Loan};
use queue_pair::{Pair, Queue, addresses};
pub use read::{Reader, Waited};

#[cfg(target_feature = "crt-static")]
compile_error!(
    "the feature `rdma` loads libibverbs when it runs, which a static binary cannot: build without crt-static"
);

/// Most concurrent reads on a connection, whatever the devices support.
const MOST_READS: u8 = 16;
/// Hop limit of a connection's packets.
const HOPS: u8 = 64;
/// Delay (0.64 ms) after which a receiver without a buffer asks for a message again; no messages are sent here.
const NOT_READY_TIMER: u8 = 12;

/// An error with its causes in the text, because the kernel's error number alone says too little.
fn told(doing: &str, error: &dyn Error) -> io::Error {
    let causes = std::iter::successors(error.source(), |cause| (*cause).source()).map(|cause| format!(": {cause}"));
    io::Error::other(format!("{doing}: {error}{}", causes.collect::<String>()))
}

/// The RDMA devices of this host, at least one.
///
/// # Errors
/// The host has no device or no libibverbs; the text says what to do.
pub fn devices() -> io::Result<DeviceList> {
    let none = |why: String| io::Error::new(io::ErrorKind::NotFound, format!("this host has no RDMA device{why}"));
    match DeviceList::new() {
        Ok(devices) if devices.is_empty() => Err(none(" that libibverbs (with its providers) knows".to_string())),
        Ok(devices) => Ok(devices),
        Err(error) => Err(none(format!(
            " that can be used; libibverbs must be installed, and the kernel must have ib_uverbs ({})",
            told("they cannot be listed", &error)
        ))),
    }
}

/// One port of a device.
#[derive(Clone, Debug)]
pub struct Port {
    context: Arc<DeviceContext>,
    number: u8,
    /// Index of the address in the port's table.
    gid_index: u8,
    mtu: u32,
    /// Concurrent reads that the device answers.
    answers: u8,
    /// Concurrent reads that the device makes.
    makes: u8,
}

impl Port {
    /// The port that has an address of this host.
    ///
    /// # Errors
    /// No device has the address; the port is down; errors of the driver.
    pub fn at(address: IpAddr) -> io::Result<Port> {
        let (wanted, mut names) = (gid(address), Vec::new());
        for device in &devices()? {
            let opened = device.open().map_err(|error| told("open it", &error));
            // A device that cannot be queried must not keep another from being used.
            let (context, table) = match opened.and_then(|context| Ok((addresses(&context)?, context))) {
                Ok((table, context)) => (context, table),
                Err(error) => {
                    names.push(format!("{} (cannot {error})", device.name()));
                    continue;
                }
            };
            let is_wanted = |entry: &&ibv_gid_entry| entry.gid_type == IBV_GID_TYPE_ROCE_V2 && octets(entry) == wanted;
            let entry = table.iter().find(is_wanted);
            if let Some(entry) = entry {
                let index = u8::try_from(entry.gid_index).map_err(io::Error::other)?;
                let number = u8::try_from(entry.port_num).map_err(io::Error::other)?;
                return Port::of(context, number, index).map_err(|error| {
                    io::Error::new(error.kind(), format!("{}, port {number}: {error}", device.name()))
                });
            }
            names.push(device.name());
        }
        let said =
            format!("no RDMA device of this host has the address {address} (RoCE v2); there are {}", names.join(", "));
        Err(io::Error::new(io::ErrorKind::AddrNotAvailable, said))
    }

    fn of(context: Arc<DeviceContext>, number: u8, gid_index: u8) -> io::Result<Port> {
        let port = context.query_port(number).map_err(|error| told("ask for its state", &error))?;
        if port.port_state() != PortState::Active {
            return Err(io::Error::new(io::ErrorKind::NetworkDown, "it is not active"));
        }
        let mtu = 128 << (port.active_mtu() as u32);
        let device = context.query_device().map_err(|error| told("ask for its limits", &error))?;
        let reads = |most: i32| most.clamp(1, i32::from(MOST_READS)) as u8;
        let (answers, makes) = (reads(device.max_qp_rd_atom()), reads(device.max_qp_init_rd_atom()));
        Ok(Port { context, number, gid_index, mtu, answers, makes })
    }
}

/// The form of an IP address in RoCE v2.
fn gid(address: IpAddr) -> [u8; 16] {
    match address.to_canonical() {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn octets(entry: &ibv_gid_entry) -> [u8; 16] {
    // SAFETY: either form of a GID is 16 bytes, whatever they are.
    unsafe { entry.gid.raw }
}

fn new_sequence() -> io::Result<u32> {
    let mut bytes = [0; 4];
    // getrandom(2) never cuts a request of up to 256 bytes short.
    rustix::rand::getrandom(&mut bytes[1..], rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_be_bytes(bytes))
}

/// A queue pair in the state INIT, for up to `depth` concurrent requests, with access to `memory`.
fn queue_pair<M>(
    (domain, queue): (&Arc<ProtectionDomain>, &Arc<Queue>),
    (port, allows): (&Port, ibv_access_flags),
    depth: u32,
    memory: M,
) -> io::Result<Pair<M>> {
    let mut pair = Pair::new(domain, queue, depth, memory)?;
    pair.modify("initialise a queue pair", |set| {
        (set.qp_state, set.pkey_index) = (ibv_qp_state::IBV_QPS_INIT, 0);
        (set.port_num, set.qp_access_flags) = (port.number, allows.0);
        Mask::IBV_QP_STATE | Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_PORT | Mask::IBV_QP_ACCESS_FLAGS
    })?;
    Ok(pair)
}

/// Connects a queue pair to its peer, which is at `address`; it answers requests from now on.
fn accept<M>(pair: &mut Pair<M>, port: &Port, (address, peer): (IpAddr, Endpoint)) -> io::Result<()> {
    let dgid = ibv_gid { raw: gid(address) };
    let grh = ibv_global_route { dgid, flow_label: 0, sgid_index: port.gid_index, hop_limit: HOPS, traffic_class: 0 };
    pair.modify(&format!("connect a queue pair to {address}"), |set| {
        set.qp_state = ibv_qp_state::IBV_QPS_RTR;
        (set.ah_attr.grh, set.ah_attr.is_global, set.ah_attr.port_num) = (grh, 1, port.number);
        // 1 is 256 bytes (`ibv_mtu`).
        set.path_mtu = port.mtu.min(peer.mtu).ilog2() - 7;
        (set.dest_qp_num, set.rq_psn) = (peer.queue_pair, peer.sequence);
        (set.max_dest_rd_atomic, set.min_rnr_timer) = (port.answers.min(peer.reads), NOT_READY_TIMER);
        let about_peer = Mask::IBV_QP_AV | Mask::IBV_QP_PATH_MTU | Mask::IBV_QP_DEST_QPN | Mask::IBV_QP_RQ_PSN;
        Mask::IBV_QP_STATE | about_peer | Mask::IBV_QP_MAX_DEST_RD_ATOMIC | Mask::IBV_QP_MIN_RNR_TIMER
    })
}
