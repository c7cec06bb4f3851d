//! `manifest.json`: a snapshot's facts in a form that people can read too.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Digest, DriveCopy, Error, FORMAT_MAJOR, MemoryLayout, Result, SnapshotId, files};

/// Everything about a snapshot but its bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The format of the whole artefact; the major version of its containers.
    pub format: u32,
    /// The snapshot's identity, see [`Manifest::compute_id`].
    pub id: SnapshotId,
    /// Full or diff.
    pub kind: SnapshotKind,
    /// The version of the tvmm that wrote it.
    pub tvmm_version: String,
    /// Time of writing, in milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// The snapshot that a diff is relative to.
    pub parent: Option<Parent>,
    /// Guest RAM.
    pub layout: MemoryLayout,
    /// Number of pages in the memory file.
    pub pages_held: u64,
    /// Number of pages a diff knows to be zero; 0 for a full snapshot.
    pub pages_zero: u64,
    /// The size of the machine.
    pub machine: MachineFacts,
    /// The host it was taken on; a restore compares its own host with it.
    pub host: HostFacts,
    /// Digests of everything that is not in the manifest.
    pub digests: Digests,
    /// File sizes.
    pub sizes: FileSizes,
    /// Copies of drives in the snapshot's directory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<DriveCopy>,
    /// The snapshots whose memory and state a merged one has, the last merged first: a diff whose parent is one of them
    /// accepts it in that parent's place. Full snapshots only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stands_for: Vec<SnapshotId>,
}

/// The most snapshots that one can stand for.
pub(crate) const MAX_STANDS_FOR: usize = 64;

/// The two kinds of snapshot: one stands alone, the other needs its parent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotKind {
    /// Every page that is not held is zero.
    #[default]
    Full,
    /// Every page that is neither held nor listed as zero is the parent's.
    Diff,
}

/// The snapshot a diff is relative to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// The id the parent must have.
    pub id: SnapshotId,
    /// Its location. In a manifest: relative to the directory the snapshot is in, where that was possible.
    pub location: Location,
}

/// The location of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Location {
    /// A directory with `manifest.json`, `vmstate`, `memory` and `pages`.
    Dir(PathBuf),
    /// Two files, Firecracker's `snapshot_path` and `mem_file_path`.
    Files {
        /// One container with manifest, state and page sections.
        snapshot: PathBuf,
        /// The memory file.
        memory: PathBuf,
    },
}

/// The size of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineFacts {
    /// Number of vCPUs.
    pub vcpu_count: u32,
    /// Guest memory as configured, MiB.
    pub mem_size_mib: u64,
}

/// The host a snapshot was taken on. Plain data: filled and compared by the vmm room.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostFacts {
    /// CPUID vendor string.
    pub cpu_vendor: String,
    /// CPUID brand string.
    pub cpu_model: String,
    /// Feature words of CPUID that matter to a guest.
    pub features: Vec<FeatureWord>,
    /// The extended state components that were enabled.
    pub xcr0: u64,
    /// `uname -r`.
    pub kernel_release: String,
    /// KVM capabilities and the answers of `KVM_CHECK_EXTENSION`.
    pub kvm_capabilities: Vec<(String, i64)>,
}

/// One register of one CPUID leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureWord {
    /// EAX in.
    pub leaf: u32,
    /// ECX in.
    pub subleaf: u32,
    /// `eax`, `ebx`, `ecx` or `edx`.
    pub register: String,
    /// The register's value.
    pub value: u32,
}

/// BLAKE3 digests of the logical content (not of the files, so that both forms of a snapshot have one identity): for
/// each section in order kind, instance, version (u32 LE each), length (u64 LE) and payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Digests {
    /// Over the state sections.
    pub vmstate: Digest,
    /// Over the page sections, which carry the checksums of the memory.
    pub pages: Digest,
}

/// File lengths in bytes, as they are in the directory form, so that both forms have one identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSizes {
    /// Length of `vmstate`.
    pub vmstate: u64,
    /// Length of `pages`.
    pub pages: u64,
    /// Length of `memory`. The file is sparse and may occupy less.
    pub memory: u64,
}

/// The input of the identity's hash: the manifest's fields in order, with an empty id and without the parent's
/// location, so that directories may be moved together.
#[derive(Serialize)]
struct Identity<'a> {
    format: u32,
    id: &'a str,
    kind: SnapshotKind,
    tvmm_version: &'a str,
    created_unix_ms: u64,
    parent: Option<ParentIdentity>,
    layout: &'a MemoryLayout,
    pages_held: u64,
    pages_zero: u64,
    machine: &'a MachineFacts,
    host: &'a HostFacts,
    digests: &'a Digests,
    sizes: &'a FileSizes,
    // As in the manifest: without copies, the identity is that of versions that could make none.
    #[serde(skip_serializing_if = "<[DriveCopy]>::is_empty")]
    drives: &'a [DriveCopy],
    // As above: a snapshot that was not merged has the identity that earlier versions give it.
    #[serde(skip_serializing_if = "<[SnapshotId]>::is_empty")]
    stands_for: &'a [SnapshotId],
}

#[derive(Serialize)]
struct ParentIdentity {
    id: SnapshotId,
}

/// The fields that every version of the manifest has.
#[derive(Deserialize)]
struct Probe {
    format: u32,
    tvmm_version: String,
}

impl Manifest {
    /// BLAKE3 over the compact JSON of the manifest with `id` empty and without the parent's location.
    ///
    /// # Errors
    /// [`Error::ManifestEncode`]; `object` names the snapshot in it.
    pub fn compute_id(&self, object: &str) -> Result<SnapshotId> {
        // Destructured completely, so that a new field cannot be forgotten here.
        let Manifest {
            format,
            id: _,
            kind,
            tvmm_version,
            created_unix_ms,
            parent,
            layout,
            pages_held,
            pages_zero,
            machine,
            host,
            digests,
            sizes,
            drives,
            stands_for,
        } = self;
        let identity = Identity {
            format: *format,
            id: "",
            kind: *kind,
            tvmm_version,
            created_unix_ms: *created_unix_ms,
            parent: parent.as_ref().map(|parent| ParentIdentity { id: parent.id }),
            layout,
            pages_held: *pages_held,
            pages_zero: *pages_zero,
            machine,
            host,
            digests,
            sizes,
            drives,
            stands_for,
        };
        let json = encode(object, serde_json::to_vec(&identity))?;
        Ok(SnapshotId(*blake3::hash(&json).as_bytes()))
    }

    /// Reads a manifest and checks that it is consistent and that its id is its own.
    ///
    /// # Errors
    /// [`Error::ManifestJson`], [`Error::FutureFormat`], [`Error::IdMismatch`], [`Error::Malformed`],
    /// [`Error::BadParentage`].
    pub(crate) fn parse(object: &str, json: &[u8]) -> Result<Manifest> {
        let json_error = |source| Error::ManifestJson { object: object.to_string(), source };
        let manifest: Manifest = match serde_json::from_slice(json) {
            Ok(manifest) => manifest,
            // Asked only after a failure, because it is rare: does the manifest not fit because it is of another
            // version?
            Err(source) => match serde_json::from_slice::<Probe>(json) {
                Ok(probe) if probe.format != u32::from(FORMAT_MAJOR) => return Err(future(object, &probe)),
                _ => return Err(json_error(source)),
            },
        };
        if manifest.format != u32::from(FORMAT_MAJOR) {
            let probe = Probe { format: manifest.format, tvmm_version: manifest.tvmm_version };
            return Err(future(object, &probe));
        }
        let computed = manifest.compute_id(object)?;
        if computed != manifest.id {
            return Err(Error::IdMismatch { object: object.to_string(), claimed: manifest.id, computed });
        }
        if manifest.parent.is_some() != (manifest.kind == SnapshotKind::Diff) {
            return Err(Error::BadParentage { object: object.to_string() });
        }
        if manifest.sizes.memory != manifest.layout.file_len() {
            return Err(Error::malformed(object, "its memory size is not that of its layout"));
        }
        if !manifest.drives.iter().all(DriveCopy::is_valid) {
            return Err(Error::malformed(object, "it names a copy of a drive that no drive can have"));
        }
        let is_full = manifest.kind == SnapshotKind::Full;
        if manifest.stands_for.len() > if is_full { MAX_STANDS_FOR } else { 0 } {
            return Err(Error::malformed(object, "it claims to stand for snapshots that it cannot stand for"));
        }
        Ok(manifest)
    }

    /// The manifest as JSON for people.
    pub(crate) fn to_json(&self, object: &str) -> Result<Vec<u8>> {
        let mut json = encode(object, serde_json::to_vec_pretty(self))?;
        json.push(b'\n');
        Ok(json)
    }
}

fn encode(object: &str, json: serde_json::Result<Vec<u8>>) -> Result<Vec<u8>> {
    json.map_err(|source| Error::ManifestEncode { object: object.to_string(), source })
}

fn future(object: &str, probe: &Probe) -> Error {
    let writer = probe.tvmm_version.chars().take(16).map(|c| if c.is_ascii_graphic() { c } else { '?' }).collect();
    let format = probe.format.to_string();
    let reads = FORMAT_MAJOR.to_string();
    Error::FutureFormat { object: object.to_string(), writer, format, reads }
}

impl Location {
    /// The location as one word for errors and logs: the directory, or the snapshot file.
    pub fn display(&self) -> String {
        self.anchor().display().to_string()
    }

    /// The path that becomes visible last: the directory, or the snapshot file.
    pub(crate) fn anchor(&self) -> &Path {
        match self {
            Location::Dir(dir) => dir,
            Location::Files { snapshot, .. } => snapshot,
        }
    }

    /// The memory file.
    pub fn memory_path(&self) -> PathBuf {
        match self {
            Location::Dir(dir) => dir.join(MEMORY_FILE),
            Location::Files { memory, .. } => memory.clone(),
        }
    }

    /// The base of relative parent locations: the directory itself, or the one that has the snapshot file.
    pub(crate) fn base_dir(&self) -> PathBuf {
        match self {
            Location::Dir(dir) => dir.clone(),
            Location::Files { snapshot, .. } => files::parent_dir(snapshot),
        }
    }

    fn map(&self, mut f: impl FnMut(&Path) -> PathBuf) -> Location {
        match self {
            Location::Dir(dir) => Location::Dir(f(dir)),
            Location::Files { snapshot, memory } => Location::Files { snapshot: f(snapshot), memory: f(memory) },
        }
    }

    /// A location from a manifest, made usable: relative paths start at `base`.
    pub(crate) fn resolve(&self, base: &Path) -> Location {
        self.map(|path| base.join(path))
    }

    /// The location as seen from `base`, which need not exist yet (its parent directory must).
    pub(crate) fn relative_to(&self, base: &Path) -> Location {
        let base = canonical(base);
        self.map(|path| relative(&canonical(path), &base))
    }
}

/// Names of the files in a snapshot directory.
pub(crate) const MANIFEST_FILE: &str = "manifest.json";
/// See [`MANIFEST_FILE`].
pub(crate) const STATE_FILE: &str = "vmstate";
/// See [`MANIFEST_FILE`].
pub(crate) const PAGES_FILE: &str = "pages";
/// See [`MANIFEST_FILE`].
pub(crate) const MEMORY_FILE: &str = "memory";
/// The cold pool with the memory of an encrypted snapshot, in its directory.
pub const ENCRYPTED_MEMORY: &str = "cold";
/// The files that every snapshot directory has; copies of drives come on top.
pub const DIR_FILES: [&str; 4] = [MANIFEST_FILE, STATE_FILE, PAGES_FILE, MEMORY_FILE];

/// True if `dir` is the directory of a snapshot whose writer finished.
pub fn is_snapshot_dir(dir: &Path) -> bool {
    dir.join(MANIFEST_FILE).is_file()
}

/// The path without links as far as it exists: a snapshot's directory does not exist before it is sealed.
pub(crate) fn canonical(path: &Path) -> PathBuf {
    if let Ok(path) = path.canonicalize() {
        return path;
    }
    match (files::parent_dir(path).canonicalize(), path.file_name()) {
        (Ok(dir), Some(name)) => dir.join(name),
        _ => std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()),
    }
}

/// `path` as seen from directory `base`, both absolute and without links; `path` itself if they share only the root.
fn relative(path: &Path, base: &Path) -> PathBuf {
    let shared = path.components().zip(base.components()).take_while(|(a, b)| a == b).count();
    if shared <= 1 {
        return path.to_path_buf();
    }
    let up = base.components().skip(shared).map(|_| Component::ParentDir);
    let relative: PathBuf = up.chain(path.components().skip(shared)).collect();
    if relative.as_os_str().is_empty() { PathBuf::from(".") } else { relative }
}
