//! Changes to the devices of a machine that has started.

use crate::config::patch::{DevicePatch, DrivePatch, NetworkPatch, PmemPatch};

use super::build::net_config;
use super::virtio_devices::VirtioDevices;
use super::{drives, pmem};
use crate::config::refusal::Refused;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::{Net, Pmem};
use crate::snapshot::MemoryLayout;

impl VirtioDevices {
    /// Changes a device of a machine with memory of `layout`, and its config.
    pub fn patch(&mut self, patch: DevicePatch, layout: &MemoryLayout) -> Result<(), Refused> {
        match patch {
            DevicePatch::Drive(patch) => self.patch_drive(&patch),
            DevicePatch::Network(patch) => self.patch_network(&patch),
            DevicePatch::Balloon(patch) => self.patch_balloon(patch, layout),
            DevicePatch::Pmem(patch) => self.patch_pmem(&patch),
        }
    }

    fn patch_drive(&mut self, patch: &DrivePatch) -> Result<(), Refused> {
        let changed = self.with(&patch.drive_id, |block: &mut Block| drives::patch(block, patch));
        let changed = changed.ok_or_else(|| no_such("drive", &patch.drive_id))?;
        let config = changed.map_err(|error| Refused::bad_request_because(&error))?;
        let known = self.configs.drives.iter_mut().find(|drive| drive.drive_id == patch.drive_id);
        known.into_iter().for_each(|known| *known = config.clone());
        Ok(())
    }

    fn patch_network(&mut self, patch: &NetworkPatch) -> Result<(), Refused> {
        let rx = patch.rx_rate_limiter.unwrap_or_default().into();
        let tx = patch.tx_rate_limiter.unwrap_or_default().into();
        let changed = self.with(&patch.iface_id, |net: &mut Net| {
            net.set_limits(rx, tx);
            (net_config(net.params()), false)
        });
        let config = changed.ok_or_else(|| no_such("network interface", &patch.iface_id))?;
        let networks = &mut self.configs_mut().network_interfaces;
        networks.iter_mut().filter(|network| network.iface_id == config.iface_id).for_each(|network| {
            *network = config.clone();
        });
        Ok(())
    }

    fn patch_pmem(&mut self, patch: &PmemPatch) -> Result<(), Refused> {
        let changed = self.with(&patch.id, |device: &mut Pmem| (pmem::patch(device, patch), false));
        let config = changed.ok_or_else(|| no_such("pmem device", &patch.id))?;
        let known = self.configs.pmem.iter_mut().find(|known| known.id == patch.id);
        known.into_iter().for_each(|known| *known = config.clone());
        Ok(())
    }
}

fn no_such(kind: &str, id: &str) -> Refused {
    Refused::bad_request(format!("There is no {kind} `{id}`."))
}
