//! RDMA over Converged Ethernet (RoCE v2) through libibverbs, which is loaded when it is first used: reliable connections
//! on which one side lends memory (`lend`) and the other reads it (`read`) without the lender's CPU.
//!
//! Verbs, states of a queue pair and their attributes: InfiniBand Architecture Specification, volume 1, chapters 10 and 11;
//! ibv_modify_qp(3), ibv_reg_mr(3). Addresses: annex A17 (RoCE v2), in which a GID is an IP address.

mod lend;
mod read;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use sideway::ibverbs::address::{AddressHandleAttribute, Gid, GidType};
use sideway::ibverbs::completion::GenericCompletionQueue;
use sideway::ibverbs::device::{DeviceInfo, DeviceList};
use sideway::ibverbs::device_context::{DeviceContext, Mtu, PortState};
use sideway::ibverbs::protection_domain::ProtectionDomain;
use sideway::ibverbs::queue_pair::{BasicQueuePair, QueuePair, QueuePairAttribute, QueuePairState};
use sideway::ibverbs::{AccessFlags, completion::BasicCompletionQueue};

use crate::tiering::chunks::wire::Endpoint;
pub use lend::{Lent, Loan};
pub use read::{Reader, Waited};

#[cfg(target_feature = "crt-static")]
compile_error!(
    "the feature `rdma` loads libibverbs when it runs, which a static binary cannot: build without crt-static"
);

/// The most reads at once on a connection, whatever the devices could do.
const MOST_READS: u8 = 16;
/// Packets of a connection go so many hops.
const HOPS: u8 = 64;
/// The receiver of a message that nobody wants asks for it again after 0.64 ms; nothing here sends messages.
const NOT_READY_TIMER: u8 = 12;

/// What went wrong, with its causes: they say no more than the kernel's error number.
fn told(doing: &str, error: &dyn Error) -> io::Error {
    let causes = std::iter::successors(error.source(), |cause| (*cause).source()).map(|cause| format!(": {cause}"));
    io::Error::other(format!("{doing}: {error}{}", causes.collect::<String>()))
}

/// The devices of this host, at least one.
///
/// # Errors
/// That there are none, or no libibverbs, and what to do.
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
    /// Where in the port's table the address stands.
    gid_index: u8,
    mtu: u32,
    /// Reads at once that the device answers.
    answers: u8,
    /// Reads at once that the device makes.
    makes: u8,
}

impl Port {
    /// The port that has an address of this host.
    ///
    /// # Errors
    /// No device has it; the port is down; what the driver says.
    pub fn at(address: IpAddr) -> io::Result<Port> {
        let (wanted, mut names) = (gid(address), Vec::new());
        for device in &devices()? {
            let context = match device.open() {
                Ok(context) => context,
                Err(error) => {
                    names.push(format!("{} ({})", device.name(), told("it cannot be opened", &error)));
                    continue;
                }
            };
            let table = context.query_gid_table().map_err(|error| told("ask a device for its addresses", &error))?;
            let entry = table.iter().find(|entry| entry.gid() == wanted && entry.gid_type() == GidType::RoceV2);
            if let Some(entry) = entry {
                let index = u8::try_from(entry.gid_index()).map_err(io::Error::other)?;
                let number = u8::try_from(entry.port_num()).map_err(io::Error::other)?;
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

/// How RoCE v2 writes an IP address.
fn gid(address: IpAddr) -> Gid {
    match address.to_canonical() {
        IpAddr::V4(address) => address.to_ipv6_mapped().into(),
        IpAddr::V6(address) => address.into(),
    }
}

fn new_sequence() -> io::Result<u32> {
    let mut bytes = [0; 4];
    // Up to 256 bytes are never cut short (getrandom(2)).
    rustix::rand::getrandom(&mut bytes[1..], rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_be_bytes(bytes))
}

/// A queue pair in the state INIT.
fn queue_pair(
    domain: &Arc<ProtectionDomain>,
    queue: &Arc<BasicCompletionQueue>,
    (port, allows): (&Port, AccessFlags),
    depth: u32,
) -> io::Result<BasicQueuePair> {
    let queue = GenericCompletionQueue::Basic(queue.clone());
    let mut builder = domain.create_qp_builder();
    builder.setup_max_send_wr(depth).setup_max_recv_wr(1).setup_send_cq(queue.clone()).setup_recv_cq(queue);
    let mut made = builder.build().map_err(|error| told("make a queue pair", &error))?;
    let mut init = QueuePairAttribute::new();
    init.setup_state(QueuePairState::Init).setup_pkey_index(0).setup_port(port.number).setup_access_flags(allows);
    made.modify(&init).map_err(|error| told("initialise a queue pair", &error))?;
    Ok(made)
}

/// Connects a queue pair to its peer, which is at `address`; it answers requests from now on.
fn accept(made: &mut BasicQueuePair, port: &Port, (address, peer): (IpAddr, Endpoint)) -> io::Result<()> {
    let mut route = AddressHandleAttribute::new();
    route.setup_port(port.number).setup_grh(&gid(address), 0, port.gid_index, HOPS, 0);
    let mtu = Mtu::from(port.mtu.min(peer.mtu).ilog2() - 7);
    let mut attributes = QueuePairAttribute::new();
    attributes.setup_state(QueuePairState::ReadyToReceive).setup_path_mtu(mtu).setup_address_vector(&route);
    attributes.setup_dest_qp_num(peer.queue_pair).setup_rq_psn(peer.sequence);
    attributes.setup_max_dest_read_atomic(port.answers.min(peer.reads)).setup_min_rnr_timer(NOT_READY_TIMER);
    made.modify(&attributes).map_err(|error| told(&format!("connect a queue pair to {address}"), &error))
}
