//! Makes a queue pair and connects it to its peer.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use rdma_mummy_sys::{ibv_access_flags, ibv_gid, ibv_global_route, ibv_qp_attr_mask as Mask, ibv_qp_state};
use sideway::ibverbs::protection_domain::ProtectionDomain;

use super::port::{Port, gid};
use super::queue_pair::{Pair, Queue};
use crate::backends::cold::wire::Endpoint;

/// Hop limit of a connection's packets.
const HOPS: u8 = 64;
/// Delay (0.64 ms) after which a receiver without a buffer asks for a message again; no messages are sent here.
const NOT_READY_TIMER: u8 = 12;

pub(super) fn new_sequence() -> io::Result<u32> {
    let mut bytes = [0; 4];
    // getrandom(2) never cuts a request of up to 256 bytes short.
    rustix::rand::getrandom(&mut bytes[1..], rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_be_bytes(bytes))
}

/// A queue pair in the state INIT, for up to `depth` concurrent requests, with access to `memory`.
pub(super) fn queue_pair<M>(
    domain: &Arc<ProtectionDomain>,
    queue: &Arc<Queue>,
    port: &Port,
    allows: ibv_access_flags,
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
pub(super) fn accept<M>(pair: &mut Pair<M>, port: &Port, address: IpAddr, peer: Endpoint) -> io::Result<()> {
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
