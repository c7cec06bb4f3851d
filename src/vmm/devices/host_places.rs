//! The files, sockets and taps of the host that the devices of a snapshot will use.

use std::path::PathBuf;

use super::SavedDevice;
use crate::config::overrides::Overrides;
use crate::devices::virtio::block::BlockState;
use crate::devices::virtio::{NetState, PmemState, VsockParams, id};
use crate::snapshot::{SectionKind, Snapshot};
use crate::vmm::error::Error;
use crate::vmm::state;

/// Files, sockets and taps.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct HostPlaces {
    /// Images that the guest can only read.
    pub read_only: Vec<PathBuf>,
    /// Images that the guest can write.
    pub writable: Vec<PathBuf>,
    /// The socket of the vsock device.
    pub vsock: Option<PathBuf>,
    /// Taps.
    pub taps: Vec<String>,
}

impl HostPlaces {
    fn add_image(&mut self, path: PathBuf, read_only: bool) {
        if read_only { self.read_only.push(path) } else { self.writable.push(path) }
    }
}

/// The places of the devices of `snapshot`, those of `overrides` instead of their own. A drive that the snapshot has a
/// copy of is in the overrides' directory.
///
/// # Errors
/// A device's state that cannot be decoded.
pub fn of_snapshot(snapshot: &Snapshot, overrides: &Overrides) -> Result<HostPlaces, Error> {
    let mut places = HostPlaces::default();
    let image = |id: &str, own: PathBuf| {
        let given = overrides.drives.iter().find(|(named, _)| named == id);
        given.map_or(own, |(_, path)| path.clone())
    };
    let count = snapshot.sections().iter().filter(|section| section.kind == SectionKind::Virtio).count();
    for index in 0..count as u32 {
        let saved: SavedDevice = state::decode(snapshot, SectionKind::Virtio, index)?;
        match saved.device_type {
            id::BLOCK => {
                let params = saved.decode::<BlockState>()?.params;
                places.add_image(image(&params.id, params.path), params.read_only);
            }
            id::PMEM => {
                let params = saved.decode::<PmemState>()?.params;
                places.add_image(image(&params.id, params.path), params.read_only);
            }
            id::NET => {
                let net = saved.decode::<NetState>()?;
                let given = overrides.network(net.id()).and_then(|network| network.host_dev_name.clone());
                places.taps.push(given.unwrap_or_else(|| net.tap().to_owned()));
            }
            id::VSOCK => {
                let own = VsockParams::restored(saved.decode()?)?.uds_path;
                places.vsock = Some(overrides.vsock.clone().unwrap_or(own));
            }
            _ => {}
        }
    }
    Ok(places)
}
