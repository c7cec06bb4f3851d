//! Host-side settings of a restored VM's devices that replace those in the snapshot.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;

use crate::config::overrides::{NetworkOverride, Overrides};
use crate::config::parse_mac;

#[derive(Debug, Args)]
pub struct OverrideArgs {
    /// Connect network interface ID to another tap, give it another MAC address, or both (repeatable)
    #[arg(long, value_name = "ID=TAP[,mac=MAC] | ID=mac=MAC", value_parser = network)]
    net: Vec<NetworkOverride>,
    #[command(flatten)]
    devices: DeviceArgs,
}

/// The settings that a restored VM and a child of a fork name alike.
#[derive(Debug, Args)]
pub struct DeviceArgs {
    /// Give a drive another image (repeatable); an image named here may have changed since the snapshot
    #[arg(long, value_name = "ID=PATH", value_parser = drive_override)]
    pub drive: Vec<(String, PathBuf)>,
    /// Directory for this VM's own copies of drives, for a snapshot taken with --copy-drives
    #[arg(long, value_name = "DIR")]
    pub drive_dir: Option<PathBuf>,
    /// Set a key of this clone's metadata to a value (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    metadata: Vec<(String, String)>,
    /// Unix socket of the vsock device, instead of the one in the snapshot
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
}

impl OverrideArgs {
    pub fn overrides(&self) -> Overrides {
        let DeviceArgs { drive, drive_dir, vsock, .. } = &self.devices;
        Overrides {
            drives: drive.clone(),
            drive_dir: drive_dir.clone(),
            networks: self.net.clone(),
            metadata: self.devices.metadata(),
            vsock: vsock.clone(),
        }
    }
}

impl DeviceArgs {
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.metadata.iter().cloned().collect()
    }
}

pub(super) fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("it is not like KEY=VALUE")?;
    if key.is_empty() { Err("the key is empty".to_owned()) } else { Ok((key.to_owned(), value.to_owned())) }
}

fn drive_override(text: &str) -> Result<(String, PathBuf), String> {
    match key_value(text)? {
        (_, path) if path.is_empty() => Err("the path is empty".to_owned()),
        (id, path) => Ok((id, path.into())),
    }
}

fn network(text: &str) -> Result<NetworkOverride, String> {
    let (id, parts) =
        text.split_once('=').ok_or("it is not like eth0=tap7, eth0=tap7,mac=06:00:ac:10:00:02 or eth0=mac=…")?;
    let mut network = NetworkOverride { iface_id: id.to_owned(), ..NetworkOverride::default() };
    for part in parts.split(',') {
        match part.strip_prefix("mac=") {
            Some(mac) if network.guest_mac.is_none() => {
                network.guest_mac = Some(parse_mac(mac).ok_or_else(|| format!("`{mac}` is no MAC address"))?);
            }
            None if network.host_dev_name.is_none() && !part.is_empty() => {
                network.host_dev_name = Some(part.to_owned())
            }
            _ => return Err("it has one tap and one mac= at most, and none of them empty".into()),
        }
    }
    Ok(network)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_takes_a_tap_a_mac_or_both() {
        let mac = Some([6, 0, 0xac, 16, 0, 2]);
        for (text, tap, guest_mac) in [
            ("eth0=tap7", Some("tap7"), None),
            ("eth0=tap7,mac=06:00:ac:10:00:02", Some("tap7"), mac),
            ("eth0=mac=06:00:ac:10:00:02", None, mac),
        ] {
            let wanted = NetworkOverride { iface_id: "eth0".into(), host_dev_name: tap.map(str::to_owned), guest_mac };
            assert_eq!(network(text), Ok(wanted), "{text}");
        }
        for text in ["eth0", "eth0=", "eth0=a,b", "eth0=mac=06:00", "eth0=tap,mac=", "eth0=tap,"] {
            assert!(network(text).is_err(), "{text}");
        }
    }
}
