//! The sections of the config: their values, and the checks on them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::limits::{MAX_MEM_SIZE_MIB, MAX_VCPU_COUNT};

/// The vCPUs of a machine whose config has no `machine-config`.
pub const DEFAULT_VCPU_COUNT: u8 = 1;
/// The guest memory of a machine whose config has no `machine-config`.
pub const DEFAULT_MEM_SIZE_MIB: u64 = 128;
/// The kernel command line when `boot_args` is absent: no probing for absent hardware.
pub const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 pci=off nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux \
                                     i8042.dumbkbd";

/// `boot-source`: the guest's kernel, initrd and command line. All absent means the built-in guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel image; absent means the built-in guest.
    pub kernel_image_path: Option<PathBuf>,
    /// The initial RAM disk.
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line; absent means [`DEFAULT_BOOT_ARGS`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

impl BootSource {
    /// The kernel command line to boot with.
    pub fn boot_args_or_default(&self) -> &str {
        self.boot_args.as_deref().unwrap_or(DEFAULT_BOOT_ARGS)
    }

    /// This source with `args` added at the end of its command line.
    pub fn with_args(&self, args: &str) -> BootSource {
        let mut source = self.clone();
        if !args.is_empty() {
            source.boot_args = Some(format!("{} {args}", self.boot_args_or_default()).trim_start().to_owned());
        }
        source
    }

    /// Refuses values that no machine could boot. The existence of the paths is checked when the machine opens them.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (key, path) in [("kernel_image_path", &self.kernel_image_path), ("initrd_path", &self.initrd_path)] {
            if path.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
                return Err(ConfigError::EmptyPath { key });
            }
        }
        if self.initrd_path.is_some() && self.kernel_image_path.is_none() {
            return Err(ConfigError::InitrdWithoutKernel);
        }
        if self.boot_args.as_ref().is_some_and(|args| args.contains('\0')) {
            return Err(ConfigError::NulInBootArgs);
        }
        Ok(())
    }
}

/// `machine-config.huge_pages`: the pages behind guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// 4 KiB pages.
    #[default]
    None,
    /// 2 MiB pages of hugetlbfs (not supported yet).
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// `machine-config.cpu_template`: Firecracker's names; only `None` is supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
    None,
}

/// `machine-config`: the shape of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// The number of vCPUs, 1 to [`MAX_VCPU_COUNT`].
    pub vcpu_count: u8,
    /// Guest memory in MiB, 1 to [`MAX_MEM_SIZE_MIB`].
    pub mem_size_mib: u64,
    /// True if vCPUs are shown to the guest as hyper-threads (not supported yet).
    #[serde(default)]
    pub smt: bool,
    /// The CPU template; `None` and absent mean the same.
    #[serde(default, skip_serializing_if = "is_no_template")]
    pub cpu_template: Option<CpuTemplate>,
    /// True if KVM logs the pages that the guest writes; diff snapshots need this.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// The pages behind guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
}

fn is_no_template(template: &Option<CpuTemplate>) -> bool {
    matches!(template, None | Some(CpuTemplate::None))
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: DEFAULT_VCPU_COUNT,
            mem_size_mib: DEFAULT_MEM_SIZE_MIB,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

impl MachineConfig {
    /// Guest memory in bytes. Cannot overflow on a validated config.
    pub fn mem_size_bytes(&self) -> u64 {
        self.mem_size_mib.saturating_mul(1 << 20)
    }

    /// Refuses shapes that cannot be built.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_VCPU_COUNT).contains(&self.vcpu_count) {
            return Err(ConfigError::VcpuCount { vcpu_count: self.vcpu_count });
        }
        if !(1..=MAX_MEM_SIZE_MIB).contains(&self.mem_size_mib) {
            return Err(ConfigError::MemSize { mem_size_mib: self.mem_size_mib });
        }
        if self.smt {
            return Err(ConfigError::not_supported("Hyper-threads (smt) are"));
        }
        if let Some(template) = self.cpu_template.filter(|template| *template != CpuTemplate::None) {
            return Err(ConfigError::not_supported(format!("CPU template {template:?} (cpu_template) is")));
        }
        match self.huge_pages {
            HugePages::None => Ok(()),
            HugePages::Hugetlbfs2M => Err(ConfigError::not_supported("Memory on 2M pages (huge_pages) is")),
        }
    }

    /// Returns this config with the fields in the patch replaced; an error if the result is refused.
    pub fn patched(&self, patch: &MachineConfigPatch) -> Result<MachineConfig, ConfigError> {
        let patched = MachineConfig {
            vcpu_count: patch.vcpu_count.unwrap_or(self.vcpu_count),
            mem_size_mib: patch.mem_size_mib.unwrap_or(self.mem_size_mib),
            smt: patch.smt.unwrap_or(self.smt),
            cpu_template: patch.cpu_template.or(self.cpu_template),
            track_dirty_pages: patch.track_dirty_pages.unwrap_or(self.track_dirty_pages),
            huge_pages: patch.huge_pages.unwrap_or(self.huge_pages),
        };
        patched.validate()?;
        Ok(patched)
    }
}

/// The fields of `machine-config` to change; absent fields stay.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct MachineConfigPatch {
    pub vcpu_count: Option<u8>,
    pub mem_size_mib: Option<u64>,
    pub smt: Option<bool>,
    pub cpu_template: Option<CpuTemplate>,
    pub track_dirty_pages: Option<bool>,
    pub huge_pages: Option<HugePages>,
}

impl MachineConfigPatch {
    /// Returns whether the patch changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The least severe message that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum LogLevel {
    #[serde(alias = "OFF", alias = "off")]
    Off,
    #[serde(alias = "ERROR", alias = "error")]
    Error,
    #[serde(alias = "Warn", alias = "WARN", alias = "warn", alias = "WARNING", alias = "warning")]
    Warning,
    #[serde(alias = "INFO", alias = "info")]
    Info,
    #[serde(alias = "DEBUG", alias = "debug")]
    Debug,
    #[serde(alias = "TRACE", alias = "trace")]
    Trace,
}

/// `logger`: the destination and form of messages; absent fields stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoggerConfig {
    /// The file or named pipe to write to; absent means stderr.
    pub log_path: Option<PathBuf>,
    /// The least severe message that is logged.
    pub level: Option<LogLevel>,
    /// True if each line has its level.
    pub show_level: Option<bool>,
    /// True if each line has its source file and line.
    pub show_log_origin: Option<bool>,
    /// Log only messages of modules whose path starts so.
    pub module: Option<String>,
}

/// `metrics`: the destination of metrics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfig {
    /// The file or named pipe to write to.
    pub metrics_path: PathBuf,
}

/// A guest that is built in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Guest {
    /// The kernel for tests.
    #[default]
    Tiny,
    /// The same with the functions of `docs/functions.md`.
    Functions,
}

/// The entry protocol of the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// PVH if the kernel image has a PVH note, else the 64-bit Linux boot protocol.
    #[default]
    Auto,
    /// The 64-bit Linux boot protocol.
    Linux64,
    /// The PVH entry point.
    Pvh,
}

/// `tvmm`: settings that Firecracker has no key for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TvmmConfig {
    /// The built-in guest to boot without a kernel image; absent means [`Guest::Tiny`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest: Option<Guest>,
    /// The entry protocol of the kernel.
    pub boot_protocol: BootProtocol,
    /// True if ACPI tables describe the machine. Without them the kernel finds processors and interrupts by the MP
    /// table and virtio devices by `virtio_mmio.device=` on its command line; it has no VM generation id and cannot
    /// turn the machine off, only reset it.
    pub acpi: bool,
    /// Metadata for the guest: keys and values.
    pub metadata: BTreeMap<String, String>,
}

impl Default for TvmmConfig {
    fn default() -> Self {
        Self { guest: None, boot_protocol: BootProtocol::default(), acpi: true, metadata: BTreeMap::new() }
    }
}
