//! A cold pool in a directory: its manifest, and per snapshot a data object and an index. Objects are immutable. The
//! index gets its name last, so an object exists once its index does.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::ChunkError;
use super::index::{CHUNK_PAGES_RANGE, Index, MAX_INDEX_LEN};
use super::pack::{PackSpec, Packed, pack};
use crate::snapshot::{
    Chain, Digest, PAGE_SIZE, PageSet, PartialFile, SecretKey, SnapshotId, is_partial, read_limited, replace_file,
    sweep, write_limited,
};

/// The format of the manifest that this build writes and reads.
pub const FORMAT: u32 = 1;
/// The file that makes a directory a cold pool.
pub const MANIFEST: &str = "cold-pool.json";
/// The folder of the objects.
pub const OBJECTS: &str = "objects";
const MANIFEST_LIMIT: u64 = 64 << 10;

/// The parameters of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Guest memory under one chunk, KiB.
    pub chunk_kib: u64,
    /// The expected bandwidth of the link to the pool, MB/s.
    pub bandwidth_mbps: u64,
}

impl Manifest {
    /// Checks the parameters of a new pool.
    ///
    /// # Errors
    /// [`ChunkError::ChunkSize`].
    pub fn new(chunk_kib: u64, bandwidth_mbps: u64) -> Result<Manifest, ChunkError> {
        if !chunk_kib.is_power_of_two() || !CHUNK_PAGES_RANGE.contains(&(chunk_kib.saturating_mul(1024) / PAGE_SIZE)) {
            return Err(ChunkError::ChunkSize { kib: chunk_kib });
        }
        Ok(Manifest { format: FORMAT, chunk_kib, bandwidth_mbps })
    }

    /// Reads the bytes of a manifest; `path` names it in errors.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Manifest, ChunkError> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let not = |error: serde_json::Error| ChunkError::NotAPool {
            path: path.to_path_buf(),
            problem: format!("its {MANIFEST} cannot be read: {error}"),
        };
        let Format { format } = serde_json::from_slice(bytes).map_err(not)?;
        if format != FORMAT {
            return Err(ChunkError::FutureFormat { path: path.to_path_buf(), format, reads: FORMAT });
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(not)?;
        Manifest::new(manifest.chunk_kib, manifest.bandwidth_mbps)?;
        Ok(manifest)
    }

    pub fn to_bytes(self) -> Vec<u8> {
        serde_json::json!(self).to_string().into_bytes()
    }

    fn chunk_pages(&self) -> u64 {
        self.chunk_kib.saturating_mul(1024) / PAGE_SIZE
    }

    /// The parameters for packing a snapshot into this pool; `hot` pages come first, chunks are encrypted with `key`.
    pub fn pack_spec(&self, hot: Option<PageSet>, key: Option<SecretKey>) -> PackSpec {
        PackSpec { chunk_pages: self.chunk_pages(), bandwidth_mbps: self.bandwidth_mbps, hot, key }
    }
}

/// The names of an object's two parts, relative to the pool.
pub fn object_names(snapshot: SnapshotId) -> (String, String) {
    (format!("{OBJECTS}/{snapshot}.index"), format!("{OBJECTS}/{snapshot}.chunks"))
}

/// A pool in a directory.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    manifest: Manifest,
}

/// The result of checking an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    pub chunks: u64,
    /// Numbers of the first chunks whose bytes are wrong.
    pub bad: Vec<u32>,
    pub bad_chunks: u64,
}

/// The most bad chunks that are named.
const MAX_NAMED: usize = 16;

impl Checked {
    /// Takes note of a chunk.
    pub fn note(&mut self, number: u32, is_good: bool) {
        self.chunks += 1;
        if !is_good {
            self.bad_chunks += 1;
            if self.bad.len() < MAX_NAMED {
                self.bad.push(number);
            }
        }
    }
}

impl Store {
    /// Makes a pool of an empty or missing directory.
    pub fn create(dir: &Path, manifest: Manifest) -> Result<Store, ChunkError> {
        fs::create_dir_all(dir).map_err(ChunkError::file("make", dir))?;
        let mut entries = fs::read_dir(dir).map_err(ChunkError::file("read", dir))?;
        if entries.next().is_some() {
            return Err(ChunkError::CannotMake { path: dir.to_path_buf(), problem: "the directory is not empty" });
        }
        let objects = dir.join(OBJECTS);
        fs::create_dir(&objects).map_err(ChunkError::file("make", &objects))?;
        replace_file(&dir.join(MANIFEST), &manifest.to_bytes())?;
        Ok(Store { dir: dir.to_path_buf(), manifest })
    }

    /// Opens the pool in `dir`.
    ///
    /// # Errors
    /// [`ChunkError::NotAPool`] and [`ChunkError::FutureFormat`].
    pub fn open(dir: &Path) -> Result<Store, ChunkError> {
        let path = dir.join(MANIFEST);
        let bytes = read_limited(&path, MANIFEST_LIMIT).map_err(|error| match error {
            crate::snapshot::Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                let problem = format!("it has no {MANIFEST}; make one with `tvmm pool create --tier remote --at`");
                ChunkError::NotAPool { path: dir.to_path_buf(), problem }
            }
            other => other.into(),
        })?;
        Ok(Store { dir: dir.to_path_buf(), manifest: Manifest::parse(dir, &bytes)? })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn manifest(&self) -> Manifest {
        self.manifest
    }

    fn index_path(&self, snapshot: SnapshotId) -> PathBuf {
        self.dir.join(object_names(snapshot).0)
    }

    pub fn data_path(&self, snapshot: SnapshotId) -> PathBuf {
        self.dir.join(object_names(snapshot).1)
    }

    /// Keeps other processes from writing as long as the result lives.
    fn lock(&self) -> Result<File, ChunkError> {
        let path = self.dir.join(MANIFEST);
        let file = File::open(&path).map_err(ChunkError::file("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(fs::TryLockError::WouldBlock) => Err(ChunkError::Busy { path: self.dir.clone() }),
            Err(fs::TryLockError::Error(error)) => Err(ChunkError::file("lock", &path)(error)),
        }
    }

    /// Packs the tip of `chain`, `hot` pages first, encrypted with `key`. The object gets its name when it is complete
    /// and on disk.
    ///
    /// # Errors
    /// [`ChunkError::AlreadyHeld`], [`ChunkError::Busy`], and those of [`pack`]; then nothing was added.
    pub fn add(
        &self,
        chain: &Chain,
        hot: Option<PageSet>,
        key: Option<SecretKey>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Packed, ChunkError> {
        let _lock = self.lock()?;
        let snapshot = chain.tip().id();
        let index_path = self.index_path(snapshot);
        let data_path = self.data_path(snapshot);
        if index_path.exists() {
            return Err(ChunkError::AlreadyHeld { path: self.dir.clone(), snapshot });
        }
        let objects = self.dir.join(OBJECTS);
        sweep(&objects);
        let partial = PartialFile::create(&objects)?;
        let packed = self.write_data(chain, self.manifest.pack_spec(hot, key), &partial, progress)?;
        partial.publish_durably(&data_path)?;
        write_limited(&index_path, &packed.index.to_bytes()?, MAX_INDEX_LEN)?;
        Ok(packed)
    }

    fn write_data(
        &self,
        chain: &Chain,
        spec: PackSpec,
        partial: &PartialFile,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Packed, ChunkError> {
        let mut out = BufWriter::with_capacity(1 << 20, partial.file());
        let packed = pack(chain, &spec, &mut out, progress)?;
        out.flush().map_err(ChunkError::file("write", partial.path()))?;
        Ok(packed)
    }

    /// The snapshots in the pool, in the order of their ids.
    pub fn list(&self) -> Result<Vec<SnapshotId>, ChunkError> {
        let objects = self.dir.join(OBJECTS);
        let entries = fs::read_dir(&objects).map_err(ChunkError::file("read", &objects))?;
        let named = |entry: fs::DirEntry| entry.file_name().to_str()?.strip_suffix(".index")?.parse().ok();
        let mut held: Vec<SnapshotId> = entries.flatten().filter_map(named).collect();
        held.sort_unstable();
        Ok(held)
    }

    /// The bytes of a snapshot's index.
    ///
    /// # Errors
    /// [`ChunkError::NotHeld`].
    pub fn index_bytes(&self, snapshot: SnapshotId) -> Result<Vec<u8>, ChunkError> {
        let path = self.index_path(snapshot);
        if !path.exists() {
            return Err(ChunkError::NotHeld { path: self.dir.clone(), snapshot });
        }
        Ok(read_limited(&path, MAX_INDEX_LEN)?)
    }

    /// A snapshot's index, checked.
    pub fn index(&self, snapshot: SnapshotId) -> Result<Index, ChunkError> {
        Index::parse(&self.index_path(snapshot).display().to_string(), self.index_bytes(snapshot)?, snapshot)
    }

    /// The data object of `index`, which must have the length that the index says.
    pub fn open_data(&self, index: &Index) -> Result<File, ChunkError> {
        let path = self.data_path(index.snapshot());
        let file = File::open(&path).map_err(ChunkError::file("open", &path))?;
        let len = file.metadata().map_err(ChunkError::file("inspect", &path))?.len();
        if len == index.data_len() {
            return Ok(file);
        }
        let problem = format!("its data has {len} bytes, not {}", index.data_len());
        Err(ChunkError::Index { object: path.display().to_string(), problem })
    }

    /// Removes a snapshot. A reader of it goes on: an open file lives until it is closed.
    pub fn remove(&self, snapshot: SnapshotId) -> Result<(), ChunkError> {
        let _lock = self.lock()?;
        let index = self.index_path(snapshot);
        let data = self.data_path(snapshot);
        if !index.exists() {
            return Err(ChunkError::NotHeld { path: self.dir.clone(), snapshot });
        }
        // The index first: without its index the object does not exist.
        fs::remove_file(&index).map_err(ChunkError::file("remove", &index))?;
        fs::remove_file(&data).map_err(ChunkError::file("remove", &data))
    }

    /// Removes files that belong to no object, left by an interrupted `add` or `remove`. Returns the bytes freed.
    pub fn collect(&self) -> Result<u64, ChunkError> {
        let _lock = self.lock()?;
        let objects = self.dir.join(OBJECTS);
        let held = self.list()?;
        let mut freed = sweep(&objects);
        for entry in fs::read_dir(&objects).map_err(ChunkError::file("read", &objects))?.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let of_held = |suffix: &str| {
                name.strip_suffix(suffix).and_then(|id| id.parse().ok()).is_some_and(|id| held.contains(&id))
            };
            // A temporary that is still there is being written; versions before 0.2 wrote to `*.partial`.
            let is_ours =
                !is_partial(&entry.file_name()) && [".chunks", ".partial"].iter().any(|end| name.ends_with(end));
            if of_held(".index") || of_held(".chunks") || !is_ours {
                continue;
            }
            freed += entry.metadata().map_or(0, |metadata| metadata.len());
            fs::remove_file(entry.path()).map_err(ChunkError::file("remove", &entry.path()))?;
        }
        Ok(freed)
    }

    /// Compares every chunk of a snapshot with its checksum, and all of them with the object's digest.
    ///
    /// # Errors
    /// Those of the index. Wrong bytes are no error but part of the result.
    pub fn check(&self, snapshot: SnapshotId) -> Result<Checked, ChunkError> {
        let index = self.index(snapshot)?;
        let path = self.data_path(snapshot);
        let mut data = std::io::BufReader::with_capacity(1 << 20, self.open_data(&index)?);
        let mut checked = Checked::default();
        let mut hasher = blake3::Hasher::new();
        let mut bytes = Vec::new();
        for (number, chunk) in index.chunks().iter().enumerate() {
            bytes.resize(chunk.stored_len as usize, 0);
            data.read_exact(&mut bytes).map_err(ChunkError::file("read", &path))?;
            hasher.update(&bytes);
            checked.note(number as u32, crc32c::crc32c(&bytes) == chunk.checksum);
        }
        if checked.bad_chunks == 0 && Digest(*hasher.finalize().as_bytes()) != index.data_digest() {
            let problem = "its data does not have the digest that its index says".to_string();
            return Err(ChunkError::Index { object: path.display().to_string(), problem });
        }
        Ok(checked)
    }
}
