//! Making devices, from a config or from saved state: one path each, so that a device knows one constructor.

use std::path::PathBuf;

use super::{SavedDevice, balloon, limits, pmem};
use crate::devices::Metadata;
use crate::devices::virtio::{Balloon, Entropy, EntropyState, RateLimits, VirtioDevice, id};
use crate::vmm::config::{DeviceConfigs, EntropyConfig};
use crate::vmm::error::Error;
use crate::vmm::memory::GuestRam;
use crate::vmm::stall::Stalls;

/// What a restored device is to have instead of what it had: the host's side differs from clone to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Id of a drive or a pmem device → backing file.
    pub drives: Vec<(String, PathBuf)>,
    /// Interface id → tap, and the MAC address to have from now on.
    pub networks: Vec<NetworkOverride>,
    /// Metadata that are new or have other values; the others stay.
    pub metadata: Metadata,
    /// The Unix socket of the vsock device.
    pub vsock: Option<PathBuf>,
}

/// Another tap, another MAC address, or both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkOverride {
    pub iface_id: String,
    pub host_dev_name: Option<String>,
    pub guest_mac: Option<[u8; 6]>,
}

/// Makes the devices of a config, for a machine with `ram`.
pub fn from_configs(configs: &DeviceConfigs, ram: &GuestRam) -> Result<Vec<Box<dyn VirtioDevice>>, Error> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    if let Some(config) = &configs.balloon {
        devices.push(Box::new(balloon::make(config, ram.layout(), Box::new(ram.releaser(None)))?));
    }
    if let Some(EntropyConfig { rate_limiter }) = configs.entropy {
        devices.push(Box::new(Entropy::new(rate_limiter.map(RateLimits::from).unwrap_or_default())?));
    }
    for pmem in pmem::open(configs, ram.layout())? {
        devices.push(Box::new(pmem));
    }
    Ok(devices)
}

/// Makes devices again from their saved state, for a machine with `ram`, and the config they now have.
pub fn from_saved(
    saved: &[SavedDevice],
    overrides: &Overrides,
    ram: &GuestRam,
    stalls: &Stalls,
) -> Result<(Vec<Box<dyn VirtioDevice>>, DeviceConfigs), Error> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    let mut configs = DeviceConfigs::default();
    let mut pmem_end = pmem::ram_end(ram.layout());
    for (index, saved) in saved.iter().enumerate() {
        match saved.device_type {
            id::ENTROPY => {
                let entropy = Entropy::restore(&saved.decode::<EntropyState>()?)?;
                configs.entropy = Some(EntropyConfig { rate_limiter: limits::config_of(entropy.limits()) });
                devices.push(Box::new(entropy));
            }
            id::BALLOON => {
                let releaser = ram.releaser(Some(stalls.activity()));
                let balloon = Balloon::restore(saved.decode()?, Box::new(releaser))?;
                configs.balloon = Some(balloon::config_of(&balloon));
                devices.push(Box::new(balloon));
            }
            id::PMEM => {
                let pmem = pmem::restore(saved.decode()?, overrides, &mut pmem_end)?;
                configs.pmem.push(pmem::config_of(&pmem));
                devices.push(Box::new(pmem));
            }
            other => return Err(Error::DeviceMissing { index, device_type: other }),
        }
    }
    overrides.check(&configs)?;
    Ok((devices, configs))
}

impl Overrides {
    /// Every override must have a device to override.
    fn check(&self, configs: &DeviceConfigs) -> Result<(), Error> {
        let drives = configs.drives.iter().map(|drive| drive.drive_id.as_str());
        let drives: Vec<&str> = drives.chain(configs.pmem.iter().map(|pmem| pmem.id.as_str())).collect();
        let networks: Vec<&str> = configs.network_interfaces.iter().map(|network| network.iface_id.as_str()).collect();
        let missing = |kind, id: &str, has: &[&str]| {
            let has = if has.is_empty() { "none".to_owned() } else { has.join(", ") };
            Err(Error::NoSuchDevice { kind, id: id.to_owned(), has })
        };
        if let Some((id, _)) = self.drives.iter().find(|(id, _)| !drives.contains(&id.as_str())) {
            return missing("drive", id, &drives);
        }
        if let Some(network) = self.networks.iter().find(|network| !networks.contains(&network.iface_id.as_str())) {
            return missing("network interface", &network.iface_id, &networks);
        }
        match (&self.vsock, &configs.vsock) {
            (Some(path), None) => missing("vsock device", &path.display().to_string(), &[]),
            _ => Ok(()),
        }
    }
}
