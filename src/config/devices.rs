//! The sections of the config that describe virtio devices, with Firecracker's keys.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::error::ConfigError;
use super::limits::MAX_DEVICES;

/// `rate_limiter` and similar keys: at most `size` tokens each `refill_time`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketConfig>,
}

/// One token bucket; a size or refill time of 0 means no limit, as in Firecracker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucketConfig {
    /// Tokens the bucket holds.
    pub size: u64,
    /// Tokens available once, before those of the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Time in which an empty bucket fills, ms.
    pub refill_time: u64,
}

/// The effect of a guest's flush.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// Flushes are not offered to the guest.
    #[default]
    Unsafe,
    /// A flush is an fsync.
    Writeback,
}

/// The way in which requests reach the backing file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// One system call for each request.
    #[default]
    Sync,
    /// io_uring.
    Async,
}

/// One of `drives`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveConfig {
    pub drive_id: String,
    /// Puts `root=` on the kernel command line.
    pub is_root_device: bool,
    /// The file or block device.
    pub path_on_host: PathBuf,
    #[serde(default)]
    pub is_read_only: bool,
    /// The partition of the root device to mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    #[serde(default)]
    pub cache_type: CacheType,
    #[serde(default)]
    pub io_engine: IoEngine,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// One of `network-interfaces`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    pub iface_id: String,
    /// The tap device.
    pub host_dev_name: String,
    /// Six bytes in hexadecimal with colons; absent: the guest chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
}

/// `vsock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 or more.
    pub guest_cid: u32,
    /// The Unix socket that the host connects to; connections of the guest go to `<uds_path>_<port>`.
    pub uds_path: PathBuf,
    /// Deprecated in Firecracker: accepted, without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

/// `balloon`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Memory that the guest is asked to give up.
    pub amount_mib: u32,
    /// True if the guest may take pages back rather than run out of memory.
    pub deflate_on_oom: bool,
    /// Interval at which the guest is asked for statistics; 0: never.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    #[serde(default)]
    pub free_page_hinting: bool,
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// `entropy`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyConfig {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// One of `pmem`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    pub id: String,
    /// The image that the guest sees as memory.
    pub path_on_host: PathBuf,
    #[serde(default)]
    pub root_device: bool,
    #[serde(default)]
    pub read_only: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// All virtio devices of a machine, in the order in which they are attached within each kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceConfigs {
    pub drives: Vec<DriveConfig>,
    pub network_interfaces: Vec<NetworkConfig>,
    pub vsock: Option<VsockConfig>,
    pub balloon: Option<BalloonConfig>,
    pub entropy: Option<EntropyConfig>,
    pub pmem: Vec<PmemConfig>,
}

/// One device, as a request puts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceConfig {
    Drive(DriveConfig),
    Network(NetworkConfig),
    Vsock(VsockConfig),
    Balloon(BalloonConfig),
    Entropy(EntropyConfig),
    Pmem(PmemConfig),
}

impl DeviceConfigs {
    /// Adds a device, or replaces the one with its id. The result is validated.
    pub fn put(&mut self, device: DeviceConfig) -> Result<(), ConfigError> {
        let mut changed = self.clone();
        match device {
            DeviceConfig::Drive(drive) => put_by(&mut changed.drives, drive, |drive| &drive.drive_id),
            DeviceConfig::Network(network) => put_by(&mut changed.network_interfaces, network, |n| &n.iface_id),
            DeviceConfig::Vsock(vsock) => changed.vsock = Some(vsock),
            DeviceConfig::Balloon(balloon) => changed.balloon = Some(balloon),
            DeviceConfig::Entropy(entropy) => changed.entropy = Some(entropy),
            DeviceConfig::Pmem(pmem) => put_by(&mut changed.pmem, pmem, |pmem| &pmem.id),
        }
        changed.validate()?;
        *self = changed;
        Ok(())
    }

    /// The number of devices.
    pub fn count(&self) -> usize {
        let single = [self.vsock.is_some(), self.balloon.is_some(), self.entropy.is_some()];
        let single = single.into_iter().filter(|there| *there).count();
        self.drives.len() + self.network_interfaces.len() + self.pmem.len() + single
    }

    /// Refuses values that no machine could have. The existence of files and taps is checked when they are opened.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.count() > MAX_DEVICES {
            return Err(ConfigError::TooManyDevices { count: self.count() });
        }
        let ids = self.drives.iter().map(|drive| ("Drive", &drive.drive_id));
        let ids = ids.chain(self.network_interfaces.iter().map(|network| ("Network interface", &network.iface_id)));
        let ids: Vec<_> = ids.chain(self.pmem.iter().map(|pmem| ("Pmem device", &pmem.id))).collect();
        for (index, (kind, id)) in ids.iter().enumerate() {
            let fits = !id.is_empty() && id.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
            if !fits {
                return Err(device_error(kind, *id, "an id has letters, digits, `_`, `-` and `.`, and at least one"));
            }
            if ids[..index].contains(&(kind, id)) {
                return Err(device_error(kind, *id, "there are two of this id"));
            }
        }
        let roots = self.drives.iter().filter(|drive| drive.is_root_device).count();
        if roots + self.pmem.iter().filter(|pmem| pmem.root_device).count() > 1 {
            return Err(device_error("Device", "root", "there can be only one root device"));
        }
        self.drives.iter().try_for_each(|drive| {
            if drive.path_on_host.as_os_str().is_empty() {
                Err(device_error("Drive", &drive.drive_id, "path_on_host is empty"))
            } else {
                Ok(())
            }
        })?;
        self.network_interfaces.iter().try_for_each(NetworkConfig::validate)?;
        if let Some(vsock) = &self.vsock {
            if vsock.guest_cid < 3 || vsock.guest_cid == u32::MAX {
                return Err(device_error("Vsock", "guest_cid", "it must be from 3 to 4294967294"));
            }
            if vsock.uds_path.as_os_str().is_empty() {
                return Err(device_error("Vsock", "uds_path", "it is empty"));
            }
        }
        Ok(())
    }
}

/// Parses a MAC address in the form of configs.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let byte = |part: &str| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten();
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    bytes?.try_into().ok()
}

/// Formats a MAC address in the form of configs.
pub fn format_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl NetworkConfig {
    /// The six bytes of `guest_mac`.
    pub fn mac(&self) -> Result<Option<[u8; 6]>, ConfigError> {
        let Some(text) = &self.guest_mac else { return Ok(None) };
        let refused = || device_error("Network interface", &self.iface_id, "guest_mac is not like 06:00:ac:10:00:02");
        parse_mac(text).map(Some).ok_or_else(refused)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        self.mac()?;
        let name = self.host_dev_name.as_bytes();
        // IFNAMSIZ with its NUL (netdevice(7)).
        if name.is_empty() || name.len() > 15 || name.iter().any(|byte| !byte.is_ascii_graphic() || *byte == b'/') {
            return Err(device_error("Network interface", &self.iface_id, "host_dev_name is no interface name"));
        }
        // IPv4's minimum (RFC 791), and the maximum of a 16-bit length.
        if self.mtu.is_some_and(|mtu| mtu < 68) {
            return Err(device_error("Network interface", &self.iface_id, "mtu must be at least 68"));
        }
        Ok(())
    }
}

fn put_by<T>(list: &mut Vec<T>, item: T, id: impl Fn(&T) -> &String) {
    match list.iter().position(|other| id(other) == id(&item)) {
        Some(at) => list[at] = item,
        None => list.push(item),
    }
}

fn device_error(kind: &'static str, id: impl Into<String>, what: &'static str) -> ConfigError {
    ConfigError::Device { kind, id: id.into(), what }
}
