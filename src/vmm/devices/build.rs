//! Making devices, from a config or from saved state: one path each, so that a device knows one constructor.

use std::path::PathBuf;

use super::limits::config_of;
use super::{SavedDevice, balloon, drives, limits, pmem};
use crate::devices::Metadata;
use crate::devices::virtio::{
    Balloon, Entropy, EntropyState, Net, NetOverride, NetParams, NetState, RateLimits, VirtioDevice, Vsock,
    VsockParams, VsockState, id,
};
use crate::vmm::config::{DeviceConfigs, EntropyConfig, NetworkConfig, VsockConfig, format_mac, parse_mac};
use crate::vmm::error::Error;
use crate::vmm::memory::GuestRam;
use crate::vmm::stall::Stalls;
use crate::vmm::sys::limits::raise_open_files;

/// What a restored device is to have instead of what it had: the host's side differs from clone to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Id of a drive or a pmem device → backing file.
    pub drives: Vec<(String, PathBuf)>,
    /// Where the clone's own copies of drives go, for a snapshot that has copies.
    pub drive_dir: Option<PathBuf>,
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
    for drive in drives::open(configs)? {
        devices.push(Box::new(drive));
    }
    for network in &configs.network_interfaces {
        devices.push(Box::new(Net::new(net_params(network))?));
    }
    if let Some(vsock) = &configs.vsock {
        devices.push(Box::new(make_vsock(VsockParams::new(vsock.guest_cid, vsock.uds_path.clone()))?));
    }
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

/// Descriptors of everything else in the process.
const DESCRIPTORS_BESIDES: u64 = 256;

fn make_vsock(params: VsockParams) -> Result<Vsock, Error> {
    raise_open_files(Vsock::DESCRIPTORS_MAX + DESCRIPTORS_BESIDES);
    Ok(Vsock::new(params)?)
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
            id::BLOCK => {
                let drive = drives::restore(saved.decode()?, overrides)?;
                configs.drives.push(drives::config_of(&drive));
                devices.push(Box::new(drive));
            }
            id::NET => {
                let state: NetState = saved.decode()?;
                let net = Net::restore(state, |id| overrides.network(id))?;
                configs.network_interfaces.push(net_config(net.params()));
                devices.push(Box::new(net));
            }
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
            id::VSOCK => {
                let state: VsockState = saved.decode()?;
                let mut params = VsockParams::restored(state)?;
                if let Some(path) = &overrides.vsock {
                    params.uds_path = path.clone();
                }
                let (guest_cid, uds_path) = (params.guest_cid, params.uds_path.clone());
                configs.vsock = Some(VsockConfig { guest_cid, uds_path, vsock_id: None });
                devices.push(Box::new(make_vsock(params)?));
            }
            other => return Err(Error::DeviceMissing { index, device_type: other }),
        }
    }
    overrides.check(&configs)?;
    Ok((devices, configs))
}

fn net_params(config: &NetworkConfig) -> NetParams {
    NetParams {
        id: config.iface_id.clone(),
        tap: config.host_dev_name.clone(),
        // Validated with the config.
        mac: config.guest_mac.as_deref().and_then(parse_mac),
        mtu: config.mtu,
        rx_limits: config.rx_rate_limiter.unwrap_or_default().into(),
        tx_limits: config.tx_rate_limiter.unwrap_or_default().into(),
    }
}

/// The config of the interface that is now.
pub fn net_config(params: &NetParams) -> NetworkConfig {
    NetworkConfig {
        iface_id: params.id.clone(),
        host_dev_name: params.tap.clone(),
        guest_mac: params.mac.map(format_mac),
        mtu: params.mtu,
        rx_rate_limiter: config_of(params.rx_limits),
        tx_rate_limiter: config_of(params.tx_limits),
    }
}

impl Overrides {
    /// What the network interface `id` is to have.
    fn network(&self, id: &str) -> NetOverride {
        let network = self.networks.iter().find(|network| network.iface_id == id);
        network.map_or_else(NetOverride::default, |network| NetOverride {
            tap: network.host_dev_name.clone(),
            mac: network.guest_mac,
        })
    }

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
