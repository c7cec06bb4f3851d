//! Reasons for refusing a config or a part of one.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

use super::limits::{MAX_DEVICES, MAX_FILE_BYTES, MAX_MEM_SIZE_MIB, MAX_VCPU_COUNT};

/// The reason for refusing a config.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("Config file {} cannot be read.", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The file is too large to be a config.
    #[error("Config file {} is larger than {MAX_FILE_BYTES} bytes.", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file was read, and its contents are refused.
    #[error("Config file {} is refused.", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The reason.
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
        /// The parser's message.
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
        /// The number in the config.
        count: usize,
    },
    /// An impossible device.
    #[error("{kind} `{id}` is refused: {what}.")]
    Device {
        /// Its kind.
        kind: &'static str,
        /// Its id.
        id: String,
        /// The reason.
        what: &'static str,
    },
    /// The built-in guest uses no initrd.
    #[error("Boot source's initrd_path needs a kernel_image_path: the built-in guest takes no initrd.")]
    InitrdWithoutKernel,
    /// A machine to boot, and a snapshot to load.
    #[error(
        "Config has both snapshot-load and {key}: the machine is the snapshot's, so leave {key} out. How it is \
         restored is said in snapshot-load.tvmm."
    )]
    BootAndLoad {
        /// The key that shapes a machine.
        key: &'static str,
    },
    /// A path of a snapshot that is the empty string.
    #[error("Snapshot's {key} is empty.")]
    EmptySnapshotPath {
        /// The key.
        key: &'static str,
    },
    /// Six bytes are needed.
    #[error("`{text}` is no MAC address.")]
    Mac {
        /// The text given.
        text: String,
    },
    /// Options of a restore that exclude each other, or miss an option that they need.
    #[error(transparent)]
    Restore(#[from] InvalidRestore),
    /// Both a built-in guest and a kernel image.
    #[error("There is both a kernel_image_path and tvmm.guest, a built-in guest; leave one out.")]
    TwoGuests,
    /// A command line with a NUL, which would end it early.
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
    pub(crate) fn not_supported(subject: impl Into<Cow<'static, str>>) -> Self {
        Self::NotSupported { subject: subject.into() }
    }
}

/// Options that exclude each other, or miss an option that they need. They are named by their JSON keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRestore {
    #[error("Snapshot load has both tvmm.{option} and tvmm.{other}; leave one out.")]
    Both { option: &'static str, other: &'static str },
    #[error("Snapshot load has tvmm.{option}, which needs tvmm.{needed}.")]
    Needs { option: &'static str, needed: &'static str },
    #[error("Snapshot load's tvmm.{option} must be 1 or more.")]
    Zero { option: &'static str },
    #[error("Snapshot load has both a pool and {key}; leave one out.")]
    PoolAndMemoryFile { key: &'static str },
    #[error("Snapshot load has both resume_vm and tvmm.standby; leave one out.")]
    ResumedAndStandby,
    #[error("A page-fault handler serves all memory, and so does a pool, cold or not: give one of them")]
    PoolAndHandler,
    #[error(
        "An encrypted snapshot is decrypted chunk by chunk: a pool is mapped by guests in place, as it is, a handler \
         installs pages itself, and a memory file is mapped. Leave these out, or the key"
    )]
    EncryptedElsewhere,
    #[error(
        "A signature binds a snapshot's own files, and not the pages of a pool, a cold pool, a page-fault handler \
         or an encrypted snapshot: leave these out, or the trusted keys"
    )]
    TrustElsewhere,
}
