//! Makes devices from a config or from saved state: one path for each, so that a device has one constructor.

use crate::config::overrides::{DeviceNames, Overrides};
use crate::devices::virtio::NetOverride;
use crate::devices::virtio::block::BlockState;
use crate::vmm::restore::StateError;

use super::limits::config_of;
use super::{SavedDevice, VirtioDevices, balloon, drives, limits, pmem};
use crate::config::{DeviceConfigs, EntropyConfig, NetworkConfig, VsockConfig, format_mac, parse_mac};
use crate::devices::virtio::{
    Balloon, Entropy, EntropyState, Net, NetParams, NetState, RateLimits, VirtioDevice, Vsock, VsockParams, VsockState,
    id,
};
use crate::memory::guest_ram::GuestRam;
use crate::memory::stall::Stalls;
use crate::sys::limits::raise_open_files;
use crate::vmm::error::Error;

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

/// Descriptors that the rest of the process needs.
const DESCRIPTORS_BESIDES: u64 = 256;

fn make_vsock(params: VsockParams) -> Result<Vsock, Error> {
    raise_open_files(Vsock::DESCRIPTORS_MAX + DESCRIPTORS_BESIDES);
    Ok(Vsock::new(params)?)
}

/// Makes devices from their saved state for a machine with `ram`. Returns them with their present config.
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
                let net = Net::restore(state, |id| net_override(overrides, id))?;
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
                let guest_cid = params.guest_cid;
                let uds_path = params.uds_path.clone();
                configs.vsock = Some(VsockConfig { guest_cid, uds_path, vsock_id: None });
                devices.push(Box::new(make_vsock(params)?));
            }
            other => return Err(StateError::DeviceMissing { index, device_type: other }.into()),
        }
    }
    overrides.check(&configs).map_err(StateError::from)?;
    Ok((devices, configs))
}

/// Checks that [`from_saved`] can find the files, taps and sockets of the devices, and changes nothing. `former`: the
/// devices that end before.
///
/// # Errors
/// Those of [`from_saved`]. It may still fail, because the host can change.
pub fn check_saved(saved: &[SavedDevice], overrides: &Overrides, former: &VirtioDevices) -> Result<(), Error> {
    let held = former.images();
    let mut names = DeviceNames::default();
    for saved in saved {
        match saved.device_type {
            id::BLOCK => {
                let state: BlockState = saved.decode()?;
                drives::check(&state, overrides, &held)?;
                names.drives.push(state.params.id);
            }
            id::NET => {
                let state: NetState = saved.decode()?;
                Net::check(&state, &net_override(overrides, state.id()))?;
                names.networks.push(state.id().to_owned());
            }
            id::VSOCK => {
                let params = VsockParams::restored(saved.decode()?)?;
                let path = overrides.vsock.as_ref().unwrap_or(&params.uds_path);
                if former.configs().vsock.as_ref().is_none_or(|vsock| vsock.uds_path != *path) {
                    Vsock::check_path(path)?;
                }
                names.has_vsock = true;
            }
            _ => {}
        }
    }
    Ok(overrides.check_names(&names).map_err(StateError::from)?)
}

/// The settings that a restored interface has instead of its old ones.
fn net_override(overrides: &Overrides, id: &str) -> NetOverride {
    let network = overrides.network(id);
    let given = network.map(|network| NetOverride { tap: network.host_dev_name.clone(), mac: network.guest_mac });
    given.unwrap_or_default()
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

/// The present config of the interface.
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
