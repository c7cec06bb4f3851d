//! Identifies a file that a command cannot read, and names the command that can.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;

use crate::backends::pool_media::POOL_FILE;
use crate::snapshot::{CONTAINER_MAGIC, Container, DIR_FILES, PAGE_SIZE, SectionKind, is_snapshot_dir};
use crate::tiering::cold::store;
use crate::tiering::pool::format::MAGIC as POOL_MAGIC;

/// A path in a command's arguments, and its use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputPath {
    path: PathBuf,
    role: Role,
}

/// A command's use of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A snapshot's directory.
    Snapshot,
    /// The state file of a snapshot in two files.
    StateFile,
    /// The memory file of a snapshot in two files.
    MemoryFile,
    Profile,
    Plan,
    /// A pool of either kind.
    Pool,
    /// A machine's configuration.
    Config,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Snapshot => "a snapshot's directory",
            Role::StateFile => "the state file of a snapshot in two files",
            Role::MemoryFile => "the memory file of a snapshot in two files",
            Role::Profile => "a profile",
            Role::Plan => "a plan",
            Role::Pool => "a pool",
            Role::Config => "a machine's configuration",
        })
    }
}

impl InputPath {
    pub fn new(path: &Path, role: Role) -> InputPath {
        InputPath { path: path.to_path_buf(), role }
    }

    /// The path or paths of a snapshot: two files if there is a `memory` file.
    pub fn snapshot(path: &Path, memory: Option<&Path>) -> Vec<InputPath> {
        let Some(memory) = memory else { return vec![InputPath::new(path, Role::Snapshot)] };
        vec![InputPath::new(path, Role::StateFile), InputPath::new(memory, Role::MemoryFile)]
    }

    /// Explains the misuse if the path is recognised as something that the command cannot take.
    pub fn misuse(&self) -> Option<String> {
        let found = Kind::of(&self.path)?;
        if found.is_for(self.role) {
            return None;
        }
        let path = self.path.display();
        Some(format!("Cannot take {path} for {}: it is {}. {}", self.role, found.name(), found.advice(&self.path)))
    }
}

/// Kinds of files that a name or the first bytes tell apart.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Snapshot,
    /// A file of the snapshot in this directory.
    PartOfSnapshot(PathBuf),
    StateFile,
    Profile,
    Plan,
    Image,
    Pool,
    ColdPool,
    /// A file of the pool in this directory.
    PartOfPool(PathBuf),
    FirecrackerState,
    Elf,
    BzImage,
    /// A machine's configuration, in JSON.
    Config,
    /// Other JSON.
    Json,
    /// A file without a format, at least as long as the smallest memory.
    Bytes,
}

/// The first 8 bytes of Firecracker's state files, little-endian, without the 16 bits that are zero
/// (`SNAPSHOT_MAGIC_ID`): x86-64, aarch64.
const FIRECRACKER_MAGICS: [u64; 2] = [0x0710_1984_8664_0000, 0x0710_1984_AAAA_0000];
/// Enough bytes to tell the kind of a file.
const HEAD_LEN: usize = 0x210;
/// The smallest memory of a machine.
const LEAST_MEMORY: u64 = 1 << 20;
/// The largest container that is read to identify it.
const CONTAINER_LIMIT: u64 = 512 << 20;

/// The largest JSON file that is read to identify it.
const JSON_LIMIT: u64 = 16 << 20;
/// The keys of which a machine's configuration has one at least.
const CONFIG_KEYS: [&str; 3] = ["boot-source", "machine-config", "snapshot-load"];

/// Returns true for JSON of `len` bytes that has a key of a machine's configuration.
fn is_config(path: &Path, len: u64) -> bool {
    let text = if len <= JSON_LIMIT { std::fs::read(path).unwrap_or_default() } else { Vec::new() };
    let keys: BTreeMap<String, IgnoredAny> = serde_json::from_slice(&text).unwrap_or_default();
    CONFIG_KEYS.iter().any(|key| keys.contains_key(*key))
}

impl Kind {
    /// The kind of the file at `path`; `None` if it is missing or unknown.
    fn of(path: &Path) -> Option<Kind> {
        let metadata = path.metadata().ok()?;
        if metadata.is_dir() {
            return Kind::of_dir(path);
        }
        if !metadata.is_file() {
            return None;
        }
        Kind::by_name(path).or_else(|| {
            let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
            Kind::by_content(path, &file, metadata.len())
        })
    }

    fn of_dir(dir: &Path) -> Option<Kind> {
        if is_snapshot_dir(dir) {
            return Some(Kind::Snapshot);
        }
        if dir.join(store::MANIFEST).is_file() {
            return Some(Kind::ColdPool);
        }
        dir.join(POOL_FILE).is_file().then_some(Kind::Pool)
    }

    /// The kind of a file in a directory that only holds such files.
    fn by_name(path: &Path) -> Option<Kind> {
        let dir = path.parent()?;
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let is_part = path.file_name().is_some_and(|name| DIR_FILES.iter().any(|file| name == *file));
        if is_part && is_snapshot_dir(dir) {
            return Some(Kind::PartOfSnapshot(dir.to_path_buf()));
        }
        if path.extension().is_some_and(|extension| extension == "image") {
            return Some(Kind::Image);
        }
        let pool = match path.file_name() {
            Some(name) if name == store::MANIFEST => dir,
            _ if dir.ends_with(store::OBJECTS) => dir.parent()?,
            _ => return None,
        };
        pool.join(store::MANIFEST).is_file().then(|| Kind::PartOfPool(pool.to_path_buf()))
    }

    fn by_content(path: &Path, file: &File, len: u64) -> Option<Kind> {
        let mut head = [0; HEAD_LEN];
        let have = (len as usize).min(HEAD_LEN);
        file.read_exact_at(&mut head[..have], 0).ok()?;
        let first: [u8; 8] = *head.first_chunk()?;
        if first == CONTAINER_MAGIC {
            return Kind::of_container(path);
        }
        if first == POOL_MAGIC {
            return Some(Kind::PartOfPool(path.parent()?.to_path_buf()));
        }
        if FIRECRACKER_MAGICS.contains(&u64::from_le_bytes(first)) {
            return Some(Kind::FirecrackerState);
        }
        if head.starts_with(b"\x7fELF") {
            return Some(Kind::Elf);
        }
        if head[0x202..0x206] == *b"HdrS" {
            return Some(Kind::BzImage);
        }
        if head[..have].trim_ascii_start().starts_with(b"{") {
            return Some(if is_config(path, len) { Kind::Config } else { Kind::Json });
        }
        let is_blank = head[..have].iter().all(u8::is_ascii_whitespace);
        (!is_blank && len >= LEAST_MEMORY && len.is_multiple_of(PAGE_SIZE)).then_some(Kind::Bytes)
    }

    /// The kind of a container of tvmm by its sections; `None` if it is damaged.
    fn of_container(path: &Path) -> Option<Kind> {
        let container = Container::read(path, CONTAINER_LIMIT).ok()?;
        let has = |kind| container.sections().iter().any(|info| info.kind == kind);
        if has(SectionKind::ProfileHeader) {
            return Some(Kind::Profile);
        }
        if has(SectionKind::Plan) {
            return Some(Kind::Plan);
        }
        has(SectionKind::Manifest).then_some(Kind::StateFile)
    }

    /// Returns true if this kind suits the command, whose failure must have another reason.
    fn is_for(&self, role: Role) -> bool {
        match self {
            Kind::Snapshot => role == Role::Snapshot,
            Kind::StateFile => role == Role::StateFile,
            Kind::PartOfSnapshot(_) => false,
            Kind::Bytes => role == Role::MemoryFile,
            Kind::Config => role == Role::Config,
            Kind::Json => matches!(role, Role::Config | Role::Plan),
            Kind::Profile => role == Role::Profile,
            Kind::Plan => role == Role::Plan,
            Kind::Pool | Kind::ColdPool => role == Role::Pool,
            _ => false,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Kind::Snapshot => "a snapshot's directory",
            Kind::PartOfSnapshot(_) => "a file of a snapshot",
            Kind::StateFile => "the state file of a snapshot in two files",
            Kind::Profile => "a profile",
            Kind::Plan => "a restore plan",
            Kind::Image => "a working-set image, derived from a snapshot",
            Kind::Pool => "a pool",
            Kind::ColdPool => "a pool of compressed chunks",
            Kind::PartOfPool(_) => "a file of a pool",
            Kind::FirecrackerState => "Firecracker's state file of a snapshot",
            Kind::Elf => "an ELF file",
            Kind::BzImage => "a Linux kernel image (bzImage)",
            Kind::Config => "a JSON file with a machine's configuration",
            Kind::Json => "a JSON file",
            Kind::Bytes => "a file without a header, as memory files and disk images are",
        }
    }

    /// Names the command that shows or uses the file at `path`.
    fn advice(&self, path: &Path) -> String {
        let path = path.display();
        match self {
            Kind::Snapshot => format!("`tvmm inspect {path}` shows it"),
            Kind::PartOfSnapshot(dir) => format!("`tvmm inspect {}` shows the snapshot", dir.display()),
            Kind::StateFile => format!("`tvmm inspect {path} --mem-file MEMORY` shows it"),
            Kind::Profile => format!("`tvmm profile show {path}` shows it"),
            Kind::Plan => format!("`tvmm restore --snapshot DIR --plan {path}` carries it out"),
            Kind::Image => "`tvmm inspect DIR` shows the snapshot it was made of".to_string(),
            Kind::Pool | Kind::ColdPool => format!("`tvmm pool show {path}` shows it"),
            Kind::PartOfPool(dir) => format!("`tvmm pool show {}` shows the pool", dir.display()),
            Kind::FirecrackerState => {
                "Only Firecracker restores it: `snapshot-editor info-vmstate version` shows it; for \
                tvmm, snapshot the VM under tvmm"
                    .to_string()
            }
            Kind::Elf | Kind::BzImage => {
                "If it is a kernel, `tvmm --config FILE` boots it (boot-source.kernel_image_path)".to_string()
            }
            Kind::Config => "`tvmm --config FILE` boots it".to_string(),
            Kind::Json => "If it is a machine's configuration, `tvmm --config FILE` boots it".to_string(),
            Kind::Bytes => format!(
                "If it is the memory file of a snapshot in two files, `tvmm inspect STATE --mem-file {path}` shows it"
            ),
        }
    }
}
