//! The requests of users: parsed once, checked once.
//!
//! Owns: `vm.json` (Firecracker's `--config-file` plus one key, `tvmm`), the configs of devices, the commands and
//! answers of a VM's control channel, restore requests, overrides, patches, and refusals. Unknown keys are errors
//! everywhere: a misspelt key must not silently give another machine than the one asked for.
//! Must not know: how anything is done. It imports only `snapshot` and `sys`.
//! Start reading: `mod.rs`, `request.rs` (commands), `restore.rs` (restore requests), `control.rs` (their way to the
//! main loop).

pub mod bodies;
pub mod control;
mod cpu;
mod devices;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod doors;
mod error;
pub mod fork;
mod fork_children;
pub mod guest;
mod limits;
mod load;
pub(crate) mod overrides;
pub(crate) mod patch;
mod place;
pub(crate) mod refusal;
pub(crate) mod request;
pub mod restore;
mod sections;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::{DeserializeOwned, Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::config::limits::MAX_FILE_BYTES;
use crate::config::restore::RestoreRequest;

pub use cpu::{CpuConfig, CpuidModifier, CpuidRegister, MsrModifier};
pub use devices::{
    BalloonConfig, CacheType, DeviceConfig, DeviceConfigs, DriveConfig, EntropyConfig, IoEngine, NetworkConfig,
    PmemConfig, RateLimiterConfig, TokenBucketConfig, VsockConfig, format_mac, parse_mac,
};
pub use error::{ConfigError, InvalidRestore};
pub use fork_children::ChildSpec;
pub use limits::{MAX_DEVICES, MAX_MEM_SIZE_MIB, MAX_VCPU_COUNT};
pub use load::{LoadBody, LoadFields, MemBackend, MemBackendType, RepurposeBody, RepurposeFields, snapshot_paths};
pub use overrides::{NetworkOverrideBody, VsockOverrideBody};
pub use sections::{
    BootProtocol, BootSource, CpuTemplate, DEFAULT_BOOT_ARGS, DEFAULT_MEM_SIZE_MIB, DEFAULT_VCPU_COUNT, Guest,
    HugePages, LogLevel, LoggerConfig, MachineConfig, MachineConfigPatch, MetricsConfig, TvmmConfig,
};

/// A section of Firecracker's schema that tvmm does not support. It may be absent, `null` or `[]`.
struct UnbuiltSection {
    key: &'static str,
    /// The subject of "not supported yet." in the error.
    subject: &'static str,
    /// True if Firecracker prints it as `[]`, false if as `null`, when the machine has none.
    is_list: bool,
}

/// A change that adds a device removes its row here and gives it a field in [`VmConfig`].
const UNBUILT_SECTIONS: &[UnbuiltSection] = &[
    UnbuiltSection { key: "memory-hotplug", subject: "Memory hotplug is", is_list: false },
    UnbuiltSection { key: "mmds-config", subject: "MMDS is", is_list: false },
];

/// Every key that a config may have at its top, for the error about an unknown one.
const KEYS: &[&str] = &[
    "balloon",
    "boot-source",
    "cpu-config",
    "drives",
    "entropy",
    "logger",
    "machine-config",
    "memory-hotplug",
    "metrics",
    "mmds-config",
    "network-interfaces",
    "pmem",
    "snapshot-load",
    "tvmm",
    "vsock",
];

/// Keys allowed in a config that loads a snapshot: all others shape the machine, and the snapshot does that.
const KEYS_BESIDE_LOAD: &[&str] = &["logger", "metrics", "snapshot-load"];

/// The error for a section of Firecracker's schema that tvmm does not support; `None` for other keys.
pub fn unbuilt_section_error(key: &str) -> Option<ConfigError> {
    let section = UNBUILT_SECTIONS.iter().find(|section| section.key == key)?;
    Some(ConfigError::not_supported(section.subject))
}

/// A validated config: it can be built, as far as can be checked without looking at the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmConfig {
    /// The guest's kernel, initrd and command line.
    pub boot_source: BootSource,
    /// The shape of the machine.
    pub machine: MachineConfig,
    /// The differences of its CPUs from the host's.
    pub cpu: Option<CpuConfig>,
    /// The destination of messages.
    pub logger: Option<LoggerConfig>,
    /// The destination of metrics.
    pub metrics: Option<MetricsConfig>,
    /// Virtio devices.
    pub devices: DeviceConfigs,
    /// Settings that Firecracker has no key for.
    pub tvmm: TvmmConfig,
    /// The snapshot to restore instead of booting.
    pub snapshot_load: Option<Box<RestoreRequest>>,
}

impl VmConfig {
    /// Reads and checks a config file.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        Self::from_json(&read(path)?).map_err(|error| in_file(path, error))
    }

    /// Checks a config.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let parsed: Parsed = parse(text)?;
        if let Some(section) = parsed.unbuilt {
            return Err(ConfigError::not_supported(section.subject));
        }
        let mut config = parsed.config;
        if let Some(load) = parsed.load {
            if let Some(key) = parsed.shapes_machine {
                return Err(ConfigError::BootAndLoad { key });
            }
            config.snapshot_load = Some(Box::new(load.check()?));
        }
        if let Some(path) = &parsed.cpu_config_path {
            config.cpu = Some(parse(&read(path)?).map_err(|error| in_file(path, error))?);
        }
        config.boot_source.validate()?;
        if config.tvmm.guest.is_some() && config.boot_source.kernel_image_path.is_some() {
            return Err(ConfigError::TwoGuests);
        }
        config.machine.validate()?;
        config.devices.validate()?;
        Ok(config)
    }
}

/// The text of a config file.
fn read(path: &Path) -> Result<String, ConfigError> {
    let read_error = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    // Bounded, because the path may name a device without end.
    let file = File::open(path).map_err(read_error)?;
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(read_error)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    Ok(text)
}

fn in_file(path: &Path, error: ConfigError) -> ConfigError {
    ConfigError::File { path: path.to_owned(), source: Box::new(error) }
}

/// Parses JSON. An error names the key at which it occurred.
fn parse<T: DeserializeOwned>(text: &str) -> Result<T, ConfigError> {
    serde_json::from_str(text).map_err(|error| {
        let line = error.line();
        let column = error.column();
        let reason = error.to_string();
        let reason = reason.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&reason).to_owned();
        ConfigError::Json { key: place::key_at(text, line, column), line, column, reason }
    })
}

/// The config as parsed, before it is checked.
#[derive(Default)]
struct Parsed {
    config: VmConfig,
    /// File of the CPU template, if the config names one (as Firecracker's does).
    cpu_config_path: Option<PathBuf>,
    /// The first section with values that tvmm does not support.
    unbuilt: Option<&'static UnbuiltSection>,
    load: Option<LoadBody>,
    /// The first section that is not empty and shapes the machine.
    shapes_machine: Option<&'static str>,
}

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ConfigVisitor)
    }
}

impl Parsed {
    /// Reads the value of a key. Returns whether it is other than empty.
    fn take_section<'de, A: MapAccess<'de>>(&mut self, key: &'static str, map: &mut A) -> Result<bool, A::Error> {
        let config = &mut self.config;
        let devices = &mut config.devices;
        Ok(match key {
            "boot-source" => set(&mut config.boot_source, map)?,
            "machine-config" => set(&mut config.machine, map)?,
            "cpu-config" => {
                let source = map.next_value::<Option<CpuConfigSource>>()?;
                let is_there = source.is_some();
                match source {
                    Some(CpuConfigSource::File(path)) => self.cpu_config_path = Some(path),
                    Some(CpuConfigSource::Here(template)) => config.cpu = Some(template),
                    None => {}
                }
                is_there
            }
            "logger" => set_some(&mut config.logger, map)?,
            "metrics" => set_some(&mut config.metrics, map)?,
            "tvmm" => set(&mut config.tvmm, map)?,
            "drives" => set(&mut devices.drives, map)? && !devices.drives.is_empty(),
            "network-interfaces" => {
                set(&mut devices.network_interfaces, map)? && !devices.network_interfaces.is_empty()
            }
            "pmem" => set(&mut devices.pmem, map)? && !devices.pmem.is_empty(),
            "vsock" => set_some(&mut devices.vsock, map)?,
            "balloon" => set_some(&mut devices.balloon, map)?,
            "entropy" => set_some(&mut devices.entropy, map)?,
            "snapshot-load" => set_some(&mut self.load, map)?,
            _ => {
                let value: Value = map.next_value()?;
                let is_empty = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
                if !is_empty && self.unbuilt.is_none() {
                    self.unbuilt = UNBUILT_SECTIONS.iter().find(|section| section.key == key);
                }
                !is_empty
            }
        })
    }
}

/// Written by hand because serde's `flatten` gives up both `deny_unknown_fields` and the line of an error.
struct ConfigVisitor;

impl<'de> Visitor<'de> for ConfigVisitor {
    type Value = Parsed;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a config (a JSON object)")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parsed, A::Error> {
        let mut parsed = Parsed::default();
        let mut seen: Vec<&'static str> = Vec::new();
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            let Some(&key) = KEYS.iter().find(|known| **known == key) else {
                return Err(A::Error::unknown_field(&key, KEYS));
            };
            if seen.contains(&key) {
                return Err(A::Error::duplicate_field(key));
            }
            seen.push(key);
            let says_something = parsed.take_section(key, &mut map)?;
            if says_something && !KEYS_BESIDE_LOAD.contains(&key) {
                parsed.shapes_machine.get_or_insert(key);
            }
        }
        Ok(parsed)
    }
}

/// A CPU template, or the file it is in.
enum CpuConfigSource {
    Here(CpuConfig),
    File(PathBuf),
}

impl<'de> Deserialize<'de> for CpuConfigSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CpuConfigVisitor)
    }
}

/// Written by hand because serde's untagged enums do not name the defect of the template.
struct CpuConfigVisitor;

impl<'de> Visitor<'de> for CpuConfigVisitor {
    type Value = CpuConfigSource;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a CPU template or the path of one")
    }

    fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<CpuConfigSource, E> {
        Ok(CpuConfigSource::File(path.into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CpuConfigSource, A::Error> {
        CpuConfig::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(CpuConfigSource::Here)
    }
}

/// Reads a section. Returns whether it is there: `null` counts as absent, because `GET /vm/config` prints absent
/// sections so.
fn set<'de, T: Deserialize<'de>, A: MapAccess<'de>>(section: &mut T, map: &mut A) -> Result<bool, A::Error> {
    let Some(value) = map.next_value()? else { return Ok(false) };
    *section = value;
    Ok(true)
}

/// As [`set`], for a section that a machine may lack.
fn set_some<'de, T: Deserialize<'de>, A: MapAccess<'de>>(
    section: &mut Option<T>,
    map: &mut A,
) -> Result<bool, A::Error> {
    *section = map.next_value()?;
    Ok(section.is_some())
}

/// Firecracker's `GET /vm/config`: every section, those without a device as `null` or `[]`. `tvmm` is printed only if
/// it is not empty, so that a machine without extensions prints exactly what Firecracker would. `snapshot-load` is
/// never printed: it tells how a machine was made, not its shape.
impl Serialize for VmConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let has_extension = self.tvmm != TvmmConfig::default();
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("boot-source", &self.boot_source)?;
        map.serialize_entry("machine-config", &self.machine)?;
        map.serialize_entry("cpu-config", &self.cpu)?;
        map.serialize_entry("logger", &self.logger)?;
        map.serialize_entry("metrics", &self.metrics)?;
        let devices = &self.devices;
        map.serialize_entry("drives", &devices.drives)?;
        map.serialize_entry("network-interfaces", &devices.network_interfaces)?;
        map.serialize_entry("pmem", &devices.pmem)?;
        map.serialize_entry("vsock", &devices.vsock)?;
        map.serialize_entry("balloon", &devices.balloon)?;
        map.serialize_entry("entropy", &devices.entropy)?;
        for section in UNBUILT_SECTIONS {
            let value = if section.is_list { Value::Array(Vec::new()) } else { Value::Null };
            map.serialize_entry(section.key, &value)?;
        }
        if has_extension {
            map.serialize_entry("tvmm", &self.tvmm)?;
        }
        map.end()
    }
}
