//! The config of a machine: the schema of Firecracker's `--config-file`, plus one key, `tvmm`.
//!
//! Unknown keys are errors everywhere: a misspelt key must not silently give another machine than the one asked for.

mod cpu;
mod devices;
mod place;
mod sections;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::{DeserializeOwned, Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

pub use cpu::{CpuConfig, CpuidModifier, CpuidRegister, MsrModifier};
pub use devices::{
    BalloonConfig, CacheType, DeviceConfig, DeviceConfigs, DriveConfig, EntropyConfig, IoEngine, MAX_DEVICES,
    NetworkConfig, PmemConfig, RateLimiterConfig, TokenBucketConfig, VsockConfig, format_mac, parse_mac,
};
pub use sections::{
    BootProtocol, BootSource, CpuTemplate, DEFAULT_BOOT_ARGS, DEFAULT_MEM_SIZE_MIB, DEFAULT_VCPU_COUNT, Guest,
    HugePages, LogLevel, LoggerConfig, MAX_MEM_SIZE_MIB, MAX_VCPU_COUNT, MachineConfig, MachineConfigPatch,
    MetricsConfig, TvmmConfig,
};

/// A config file larger than this is not a config file.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A section of Firecracker's schema that tvmm cannot build yet. It may be absent, `null` or `[]`.
struct UnbuiltSection {
    key: &'static str,
    /// What stands before "not supported yet." in the error.
    subject: &'static str,
    /// Whether Firecracker prints it as `[]` (else `null`) when the machine has none.
    is_list: bool,
}

/// Building a device removes its row here and gives it a field in [`VmConfig`].
const UNBUILT_SECTIONS: &[UnbuiltSection] = &[
    UnbuiltSection { key: "memory-hotplug", subject: "Memory hotplug is", is_list: false },
    UnbuiltSection { key: "mmds-config", subject: "MMDS is", is_list: false },
];

/// Every key a config may have at its top, for the error about one it may not have.
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
    "tvmm",
    "vsock",
];

/// Why a config was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("Config file {} cannot be read.", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is too large to be a config.
    #[error("Config file {} is larger than {MAX_FILE_BYTES} bytes.", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file was read but what it says is refused.
    #[error("Config file {} is refused.", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<ConfigError>,
    },
    /// Not JSON, or not of the schema.
    #[error("Config is not valid at {key}, line {line}, column {column}: {reason}.")]
    Json {
        /// The key the parser was at, dotted; `the top level` when at none.
        key: String,
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
        /// The parser's own words.
        reason: String,
    },
    /// vcpu_count out of range.
    #[error("Machine config's vcpu_count is {vcpu_count}, but must be from 1 to {MAX_VCPU_COUNT}.")]
    VcpuCount {
        /// The value given.
        vcpu_count: u8,
    },
    /// mem_size_mib out of range.
    #[error("Machine config's mem_size_mib is {mem_size_mib}, but must be from 1 to {MAX_MEM_SIZE_MIB} (1 TiB).")]
    MemSize {
        /// The value given.
        mem_size_mib: u64,
    },
    /// A path that is the empty string.
    #[error("Boot source's {key} is empty; leave it out if there is none.")]
    EmptyPath {
        /// The key.
        key: &'static str,
    },
    /// More devices than there are interrupt lines.
    #[error("There are {count} devices, but at most {MAX_DEVICES} can be attached.")]
    TooManyDevices {
        /// How many are asked for.
        count: usize,
    },
    /// A device that cannot be.
    #[error("{kind} `{id}` is refused: {what}.")]
    Device {
        /// Its kind.
        kind: &'static str,
        /// Its id.
        id: String,
        /// Why.
        what: &'static str,
    },
    /// The built-in guest has no use for it.
    #[error("Boot source's initrd_path needs a kernel_image_path: the built-in guest takes no initrd.")]
    InitrdWithoutKernel,
    /// Two guests at once.
    #[error("There is both a kernel_image_path and tvmm.guest, a built-in guest; leave one out.")]
    TwoGuests,
    /// A command line that would end early.
    #[error("Boot source's boot_args contain a NUL byte.")]
    NulInBootArgs,
    /// Firecracker has it, tvmm does not.
    #[error("{subject} not supported yet.")]
    NotSupported {
        /// The thing and its verb.
        subject: Cow<'static, str>,
    },
}

impl ConfigError {
    fn not_supported(subject: impl Into<Cow<'static, str>>) -> Self {
        Self::NotSupported { subject: subject.into() }
    }
}

/// The error for a section of Firecracker's schema that tvmm cannot build yet; none if `key` is not such a section.
pub fn unbuilt_section_error(key: &str) -> Option<ConfigError> {
    let section = UNBUILT_SECTIONS.iter().find(|section| section.key == key)?;
    Some(ConfigError::not_supported(section.subject))
}

/// A validated config: what it holds can be built, as far as can be said without looking at the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmConfig {
    /// What the guest boots.
    pub boot_source: BootSource,
    /// The shape of the machine.
    pub machine: MachineConfig,
    /// How its CPUs differ from the host's.
    pub cpu: Option<CpuConfig>,
    /// Where messages go.
    pub logger: Option<LoggerConfig>,
    /// Where metrics go.
    pub metrics: Option<MetricsConfig>,
    /// Virtio devices.
    pub devices: DeviceConfigs,
    /// What Firecracker has no key for.
    pub tvmm: TvmmConfig,
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
    // Bounded: the path may name a device without end.
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

/// Parses JSON, and on failure says at which key.
fn parse<T: DeserializeOwned>(text: &str) -> Result<T, ConfigError> {
    serde_json::from_str(text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        let reason = error.to_string();
        let reason = reason.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&reason).to_owned();
        ConfigError::Json { key: place::key_at(text, line, column), line, column, reason }
    })
}

/// What the text says, before it is checked.
#[derive(Default)]
struct Parsed {
    config: VmConfig,
    /// Where the CPU template is, if the config names a file (as Firecracker's does).
    cpu_config_path: Option<PathBuf>,
    /// The first section that asks for something tvmm cannot build.
    unbuilt: Option<&'static UnbuiltSection>,
}

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ConfigVisitor)
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
            let config = &mut parsed.config;
            match key {
                "boot-source" => config.boot_source = value_or_default(&mut map)?,
                "machine-config" => config.machine = value_or_default(&mut map)?,
                "cpu-config" => match map.next_value::<Option<CpuConfigSource>>()? {
                    Some(CpuConfigSource::File(path)) => parsed.cpu_config_path = Some(path),
                    Some(CpuConfigSource::Here(template)) => config.cpu = Some(template),
                    None => {}
                },
                "logger" => config.logger = map.next_value()?,
                "metrics" => config.metrics = map.next_value()?,
                "tvmm" => config.tvmm = value_or_default(&mut map)?,
                "drives" => config.devices.drives = value_or_default(&mut map)?,
                "network-interfaces" => config.devices.network_interfaces = value_or_default(&mut map)?,
                "pmem" => config.devices.pmem = value_or_default(&mut map)?,
                "vsock" => config.devices.vsock = map.next_value()?,
                "balloon" => config.devices.balloon = map.next_value()?,
                "entropy" => config.devices.entropy = map.next_value()?,
                _ => {
                    let value: Value = map.next_value()?;
                    let is_empty = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
                    if !is_empty && parsed.unbuilt.is_none() {
                        parsed.unbuilt = UNBUILT_SECTIONS.iter().find(|section| section.key == key);
                    }
                }
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

/// By hand, because serde's untagged enums do not say what is wrong with the template.
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

/// `null` is as good as absent, because `GET /vm/config` prints absent sections so.
fn value_or_default<'de, T: Deserialize<'de> + Default, A: MapAccess<'de>>(map: &mut A) -> Result<T, A::Error> {
    Ok(map.next_value::<Option<T>>()?.unwrap_or_default())
}

/// Firecracker's `GET /vm/config`: every section, those without a device as `null` or `[]`. `tvmm` is printed only
/// when it says something, so that a machine without extensions prints exactly what Firecracker would.
impl Serialize for VmConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let has_extension = self.tvmm != TvmmConfig::default();
        let mut map = serializer.serialize_map(Some(KEYS.len() - usize::from(!has_extension)))?;
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
