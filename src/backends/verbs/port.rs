//! The RDMA devices of this host, and their ports.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use rdma_mummy_sys::{IBV_GID_TYPE_ROCE_V2, ibv_gid_entry};
use sideway::ibverbs::device::{DeviceInfo, DeviceList};
use sideway::ibverbs::device_context::{DeviceContext, PortState};

use super::queue_pair::{addresses, told};

/// Most concurrent reads on a connection, whatever the devices support.
const MOST_READS: u8 = 16;

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
    pub(super) context: Arc<DeviceContext>,
    pub(super) number: u8,
    /// Index of the address in the port's table.
    pub(super) gid_index: u8,
    pub(super) mtu: u32,
    /// Concurrent reads that the device answers.
    pub(super) answers: u8,
    /// Concurrent reads that the device makes.
    pub(super) makes: u8,
}

impl Port {
    /// The port that has an address of this host.
    ///
    /// # Errors
    /// No device has the address; the port is down; errors of the driver.
    pub fn at(address: IpAddr) -> io::Result<Port> {
        let wanted = gid(address);
        let mut names = Vec::new();
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
        let answers = reads(device.max_qp_rd_atom());
        let makes = reads(device.max_qp_init_rd_atom());
        Ok(Port { context, number, gid_index, mtu, answers, makes })
    }
}

pub(super) fn octets(entry: &ibv_gid_entry) -> [u8; 16] {
    // SAFETY: either form of a GID is 16 bytes, whatever they are.
    unsafe { entry.gid.raw }
}

/// The form of an IP address in RoCE v2.
pub(super) fn gid(address: IpAddr) -> [u8; 16] {
    match address.to_canonical() {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}
