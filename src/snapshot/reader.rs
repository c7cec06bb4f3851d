//! Opens a snapshot.
//!
//! Restore latency is spent here: `open` reads manifest and state, verifies both, opens the memory file and stops. The
//! page map is read, and the memory verified, only on request.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::container::{Section, SectionInfo, SectionKind, container_len_of};
use super::manifest::{MANIFEST_FILE, PAGES_FILE, STATE_FILE};
use super::memory_check::{MemoryFile, Progress, ReadAt, VerifyReport};
use super::sealing::{self, SEAL_LEN, SecretKey};
use super::signed::{SNAPSHOT_FILE, Statement, TrustedKeys};
use super::{
    Container, Digest, Error, Extent, Location, Manifest, MemoryLayout, PageMap, PageSet, Result, SnapshotId, files,
};

/// The largest manifest, in bytes.
const MANIFEST_LIMIT: u64 = 4 << 20;
/// The largest state, in bytes.
pub(crate) const STATE_LIMIT: u64 = 64 << 20;
/// The largest page map, in bytes: enough for 2 TiB of guest memory in the worst case of fragmentation.
pub(crate) const PAGES_LIMIT: u64 = 256 << 20;
/// The largest snapshot file of the two-file form, in bytes.
pub(crate) const SNAPSHOT_FILE_LIMIT: u64 = MANIFEST_LIMIT + STATE_LIMIT + PAGES_LIMIT;

const PAGE_KINDS: [SectionKind; 3] = [SectionKind::PagesHeld, SectionKind::PagesZero, SectionKind::ChunkChecksums];

/// An open snapshot: manifest and state verified, memory file open and of the right length.
#[derive(Debug)]
pub struct Snapshot {
    location: Location,
    object: String,
    manifest: Manifest,
    container: Container,
    /// The state sections of the container; in the two-file form it has others too.
    state: Vec<SectionInfo>,
    memory: File,
    /// 0 if the memory file was never looked at, and something else stands in for it.
    memory_len: u64,
    memory_path: PathBuf,
    /// True if the memory file was not opened: another file stands in for it and is never read.
    is_elsewhere: bool,
    page_map: OnceLock<PageMap>,
    /// The statement of a trusted key about the snapshot, if it was opened for such a key.
    signed: Option<Statement>,
    /// The key of its files, if they are encrypted.
    key: Option<SecretKey>,
}

impl Snapshot {
    /// Opens the snapshot at a location.
    ///
    /// # Errors
    /// [`Error::NotSealed`] for a directory without a manifest; any of the errors of [`Container::parse`],
    /// [`Error::ManifestJson`], [`Error::IdMismatch`], [`Error::DigestMismatch`], [`Error::Malformed`] for files that
    /// are not what was written; [`Error::Io`].
    pub fn open(location: &Location) -> Result<Snapshot> {
        Snapshot::open_state(location)?.with_whole_memory()
    }

    /// As [`open`](Snapshot::open) for a snapshot that one of `keys` must have signed. No byte of it is parsed before
    /// it was compared with the signed statement; its memory is compared by [`check_signed`](Self::check_signed).
    ///
    /// # Errors
    /// As for [`open`](Snapshot::open), and [`Error::Unsigned`], [`Error::BadSignature`], [`Error::NotTheSigned`].
    pub fn open_signed(location: &Location, keys: &TrustedKeys) -> Result<Snapshot> {
        let statement = Statement::read_trusted(location, keys)?;
        Snapshot::open_with(location, &location.memory_path(), Some(statement), None)?.with_whole_memory()
    }

    /// Refuses a memory file of another length than the manifest says.
    fn with_whole_memory(self) -> Result<Snapshot> {
        let snapshot = self;
        let have = snapshot.memory_len;
        let need = snapshot.manifest.layout.file_len();
        let object = || snapshot.memory_path.display().to_string();
        if have < need {
            return Err(Error::Truncated { object: object(), have, need });
        }
        if have > need {
            return Err(Error::malformed(&object(), format!("it has {have} bytes, its manifest says {need}")));
        }
        Ok(snapshot)
    }

    /// As [`open`](Snapshot::open), but does not look at the memory file: another process serves guest memory.
    ///
    /// # Errors
    /// As for [`open`](Snapshot::open).
    pub(crate) fn open_state(location: &Location) -> Result<Snapshot> {
        Snapshot::open_with(location, &location.memory_path(), None, None)
    }

    /// As [`open`](Snapshot::open) for a snapshot whose memory comes from a pool: the memory file need not even exist.
    ///
    /// # Errors
    /// As for [`open`](Snapshot::open).
    pub fn open_without_memory(location: &Location) -> Result<Snapshot> {
        Snapshot::open_without_memory_by(location, None)
    }

    fn open_without_memory_by(location: &Location, key: Option<&SecretKey>) -> Result<Snapshot> {
        let stand_in = match location {
            Location::Dir(dir) => dir.join(STATE_FILE),
            Location::Files { snapshot, .. } => snapshot.clone(),
        };
        Ok(Snapshot { memory_len: 0, ..Snapshot::open_with(location, &stand_in, None, key)? })
    }

    /// As [`open`](Snapshot::open) for a snapshot whose memory file is in another place. The file need not be here; the
    /// snapshot still has the pages that the manifest says. With a `key`, its files must be encrypted with it.
    ///
    /// # Errors
    /// As for [`open`](Snapshot::open).
    pub(crate) fn open_elsewhere(location: &Location, key: Option<&SecretKey>) -> Result<Snapshot> {
        let snapshot = Snapshot::open_without_memory_by(location, key)?;
        let memory_len = snapshot.layout().file_len();
        let memory_path = location.memory_path();
        Ok(Snapshot { memory_len, memory_path, is_elsewhere: true, ..snapshot })
    }

    fn open_with(
        location: &Location,
        memory_path: &Path,
        signed: Option<Statement>,
        key: Option<&SecretKey>,
    ) -> Result<Snapshot> {
        let object = location.display();
        let (manifest, container) = match location {
            Location::Dir(dir) => open_dir(dir, &object, signed.as_ref(), key)?,
            Location::Files { .. } if key.is_some() => return Err(Error::NotEncrypted { object }),
            Location::Files { snapshot, .. } => open_file(snapshot, &object, signed.as_ref())?,
        };
        if let Some(statement) = &signed {
            statement.check_id(&object, manifest.id)?;
        }
        let state: Vec<_> = container.sections().iter().filter(|info| !info.kind.is_reserved()).cloned().collect();
        if state_len(&state) != manifest.sizes.vmstate {
            return Err(Error::malformed(&object, "its state has another size than its manifest says"));
        }
        if digest_of(&container, &state)? != manifest.digests.vmstate {
            return Err(Error::DigestMismatch { object, part: "state" });
        }
        let memory_path = memory_path.to_path_buf();
        let (memory, memory_len) = files::open_regular(&memory_path)?;
        let location = location.clone();
        let page_map = OnceLock::new();
        Ok(Snapshot {
            location,
            object,
            manifest,
            container,
            state,
            memory,
            memory_len,
            memory_path,
            is_elsewhere: false,
            page_map,
            signed,
            key: key.cloned(),
        })
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The snapshot's identity.
    pub fn id(&self) -> SnapshotId {
        self.manifest.id
    }

    /// True if a diff whose parent is `id` may have this snapshot as its parent: it is that snapshot, or was merged
    /// from it.
    pub fn stands_for(&self, id: SnapshotId) -> bool {
        self.id() == id || self.manifest.stands_for.contains(&id)
    }

    /// Guest RAM.
    pub fn layout(&self) -> &MemoryLayout {
        &self.manifest.layout
    }

    /// The location the snapshot was opened at.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// The location of a diff's parent: the one in the manifest, seen from the directory this snapshot is in now.
    pub fn parent_location(&self) -> Option<Location> {
        let parent = self.manifest.parent.as_ref()?;
        Some(parent.location.resolve(&self.location.base_dir()))
    }

    /// The snapshot's name in errors.
    pub fn object(&self) -> &str {
        &self.object
    }

    /// The payload of a state section.
    ///
    /// # Errors
    /// [`Error::MissingSection`], [`Error::Checksum`].
    pub fn section(&self, kind: SectionKind, instance: u32) -> Result<&[u8]> {
        self.container.payload(self.section_info(kind, instance)?)
    }

    /// Kind, instance, version and length of a state section.
    ///
    /// # Errors
    /// [`Error::MissingSection`].
    pub fn section_info(&self, kind: SectionKind, instance: u32) -> Result<&SectionInfo> {
        let number = kind.number();
        let found = self.state.iter().find(|info| info.kind.number() == number && info.instance == instance);
        found.ok_or_else(|| Error::MissingSection { object: self.object.clone(), kind: number, instance })
    }

    /// All state sections in file order. The consumer refuses those it does not know.
    pub fn sections(&self) -> &[SectionInfo] {
        &self.state
    }

    /// Copies of all state sections, as another snapshot's writer takes them.
    ///
    /// # Errors
    /// [`Error::Checksum`].
    pub fn copy_state(&self) -> Result<Vec<Section>> {
        self.container.copy_sections(|kind| !kind.is_reserved())
    }

    /// The snapshot's copy of a drive, open for reading; none if it has none.
    ///
    /// # Errors
    /// [`Error::Truncated`] for a copy of another length than the manifest says; [`Error::Malformed`] for a copy that
    /// cannot be there; [`Error::Io`].
    pub fn open_drive_copy(&self, drive_id: &str) -> Result<Option<(File, u64)>> {
        let Some(copy) = self.manifest.drives.iter().find(|copy| copy.drive_id == drive_id) else { return Ok(None) };
        let Location::Dir(dir) = &self.location else {
            return Err(Error::malformed(&self.object, "two files cannot have copies of drives"));
        };
        let path = dir.join(copy.file_name());
        let (file, have) = files::open_regular(&path)?;
        if have != copy.len {
            return Err(Error::Truncated { object: path.display().to_string(), have, need: copy.len });
        }
        if let Some(statement) = &self.signed {
            statement.check_file(&self.object, &copy.file_name(), &file, copy.len)?;
        }
        Ok(Some((file, copy.len)))
    }

    /// The memory file, open for reading.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// True if guest memory is in another place, so that [`memory`](Snapshot::memory) is not it.
    pub fn is_elsewhere(&self) -> bool {
        self.is_elsewhere
    }

    /// The number of bytes of the memory file that pages can come from: 0 if the snapshot was opened without it.
    pub fn memory_len(&self) -> u64 {
        self.memory_len
    }

    /// The path of the memory file.
    pub fn memory_path(&self) -> &Path {
        &self.memory_path
    }

    /// The page map; read and verified at the first call.
    ///
    /// # Errors
    /// As for [`Snapshot::open`], and [`Error::PageSet`].
    pub fn page_map(&self) -> Result<&PageMap> {
        if let Some(map) = self.page_map.get() {
            return Ok(map);
        }
        let map = self.fresh_page_map()?;
        Ok(self.page_map.get_or_init(|| map))
    }

    /// The page map for a reader that does not need it for long: read and verified, and kept only if it was already.
    ///
    /// # Errors
    /// As for [`page_map`](Self::page_map).
    pub fn borrow_page_map(&self) -> Result<Cow<'_, PageMap>> {
        match self.page_map.get() {
            Some(map) => Ok(Cow::Borrowed(map)),
            None => self.fresh_page_map().map(Cow::Owned),
        }
    }

    fn fresh_page_map(&self) -> Result<PageMap> {
        match &self.location {
            Location::Dir(dir) => {
                let file = DirFile { dir, name: PAGES_FILE, limit: PAGES_LIMIT };
                let checks = Checks { signed: self.signed.as_ref(), key: self.key.as_ref() };
                self.read_page_map(&file.container(&self.object, self.id(), checks)?)
            }
            Location::Files { .. } => self.read_page_map(&self.container),
        }
    }

    fn read_page_map(&self, container: &Container) -> Result<PageMap> {
        let manifest = &self.manifest;
        let object = || container.object().to_string();
        let of_pages = |info: &&SectionInfo| PAGE_KINDS.contains(&info.kind);
        let infos: Vec<_> = container.sections().iter().filter(of_pages).cloned().collect();
        let alone = matches!(self.location, Location::Dir(_));
        if infos.len() != PAGE_KINDS.len() || (alone && container.sections().len() != infos.len()) {
            return Err(Error::malformed(container.object(), "it does not have exactly the three page sections"));
        }
        if state_len(&infos) != manifest.sizes.pages {
            return Err(Error::malformed(container.object(), "its page map has another size than its manifest says"));
        }
        if digest_of(container, &infos)? != manifest.digests.pages {
            return Err(Error::DigestMismatch { object: object(), part: "page map" });
        }
        let map = PageMap::from_container(container, &manifest.layout, manifest.kind)?;
        if (map.held().len(), map.zero().len()) != (manifest.pages_held, manifest.pages_zero) {
            return Err(Error::malformed(container.object(), "it has another number of pages than its manifest says"));
        }
        Ok(map)
    }

    /// Verifies the parts that `open` did not: the page map, every held page against its checksum, and that the memory
    /// file has nothing where no page is held. `progress` gets bytes done and bytes to do.
    ///
    /// # Errors
    /// As for [`Snapshot::page_map`]. Damaged memory is no error here but part of the report.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport> {
        let total = self.page_map()?.held().len() * super::PAGE_SIZE;
        self.verify_with(&mut Progress { done: 0, total, report: progress })
    }

    /// Compares one chunk of the memory file with its checksum in `map`, reading by `read` into the start of `buffer`,
    /// which has room for a chunk. Returns how many pages the chunk holds.
    ///
    /// # Errors
    /// [`Error::OtherMemory`], [`Error::Io`].
    pub fn check_chunk(&self, map: &PageMap, chunk: u64, buffer: &mut [u8], read: ReadAt<'_>) -> Result<u64> {
        self.memory_file().check_chunk(map, chunk, buffer, read)
    }

    /// The pages that this layer does not hold and that are no hole of its memory file either. They are zeros, if the
    /// file is intact: a policy that maps the file shows them to the guest.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn unheld_data(&self, map: &PageMap) -> Result<PageSet> {
        self.memory_file().unheld_data(map.held())
    }

    /// Compares pages of [`unheld_data`](Self::unheld_data), of one range of the layout, with zeros, reading by `read`
    /// into the start of `buffer`.
    ///
    /// # Errors
    /// [`Error::StrayPages`], [`Error::Io`].
    pub fn check_zeros(&self, pages: Extent, buffer: &mut [u8], read: ReadAt<'_>) -> Result<()> {
        match self.memory_file().first_nonzero(pages, buffer, read)? {
            None => Ok(()),
            Some(first) => Err(Error::StrayPages { object: self.object().to_string(), pages: first.pages, first }),
        }
    }

    pub(crate) fn verify_with(&self, progress: &mut Progress<'_>) -> Result<VerifyReport> {
        let mut report = self.memory_file().verify(self.page_map()?, progress)?;
        self.memory_file().find_strays(self.page_map()?.held(), &mut report)?;
        Ok(report)
    }

    /// BLAKE3 of the held pages, ascending, joined without gaps. Reads all of them.
    ///
    /// # Errors
    /// As for [`page_map`](Self::page_map).
    pub(crate) fn memory_digest(&self) -> Result<Digest> {
        self.memory_file().digest(self.page_map()?.held())
    }

    /// Compares the memory of a snapshot that was [opened for trusted keys](Self::open_signed) with what was signed:
    /// the held pages by their digest, all others with zeros. Reads all of it.
    ///
    /// # Errors
    /// [`Error::NotTheSigned`]; [`Error::StrayPages`]; as for [`page_map`](Self::page_map).
    pub fn check_signed(&self) -> Result<()> {
        let Some(statement) = &self.signed else { return Ok(()) };
        statement.check_memory(&self.object, self.memory_digest()?)?;
        let mut report = VerifyReport::default();
        self.memory_file().find_strays(self.page_map()?.held(), &mut report)?;
        report.into_result(&self.object).map(drop)
    }

    pub(crate) fn memory_file(&self) -> MemoryFile<'_> {
        MemoryFile { file: &self.memory, path: &self.memory_path, layout: &self.manifest.layout }
    }
}

fn open_dir(
    dir: &Path,
    object: &str,
    signed: Option<&Statement>,
    key: Option<&SecretKey>,
) -> Result<(Manifest, Container)> {
    let json = match files::read_limited(&dir.join(MANIFEST_FILE), MANIFEST_LIMIT) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound && dir.is_dir() => {
            return Err(Error::NotSealed { path: dir.to_path_buf() });
        }
        other => other?,
    };
    if let Some(statement) = signed {
        statement.check_bytes(object, MANIFEST_FILE, &json)?;
    }
    let manifest = Manifest::parse(object, &json)?;
    let file = DirFile { dir, name: STATE_FILE, limit: STATE_LIMIT };
    let container = file.container(object, manifest.id, Checks { signed, key })?;
    if container.sections().iter().any(|info| info.kind.is_reserved()) {
        return Err(Error::malformed(container.object(), "it has sections that do not belong into a state"));
    }
    Ok((manifest, container))
}

/// A container of a snapshot's directory.
struct DirFile<'a> {
    dir: &'a Path,
    name: &'a str,
    limit: u64,
}

/// The checks that the bytes of a file pass before they are parsed.
#[derive(Clone, Copy)]
struct Checks<'a> {
    signed: Option<&'a Statement>,
    key: Option<&'a SecretKey>,
}

impl DirFile<'_> {
    /// Reads the container of snapshot `id`. Its bytes are compared with those that were signed, and decrypted, before
    /// they are parsed.
    fn container(&self, object: &str, id: SnapshotId, checks: Checks<'_>) -> Result<Container> {
        let path = self.dir.join(self.name);
        let name = path.display().to_string();
        let seal_len = if checks.key.is_some() { SEAL_LEN } else { 0 };
        let bytes = files::read_limited(&path, self.limit + seal_len)?;
        if let Some(statement) = checks.signed {
            statement.check_bytes(object, self.name, &bytes)?;
        }
        let bytes = match (checks.key, sealing::is_sealed(&bytes)) {
            (Some(key), true) => sealing::open_file(key, id, &name, self.name, &bytes)?,
            (None, true) => return Err(Error::Encrypted { object: name }),
            (Some(_), false) => return Err(Error::NotEncrypted { object: name }),
            (None, false) => bytes,
        };
        Container::parse_named(name, bytes)
    }
}

fn open_file(snapshot: &Path, object: &str, signed: Option<&Statement>) -> Result<(Manifest, Container)> {
    let bytes = files::read_limited(snapshot, SNAPSHOT_FILE_LIMIT)?;
    if let Some(statement) = signed {
        statement.check_bytes(object, SNAPSHOT_FILE, &bytes)?;
    }
    let container = Container::parse_named(snapshot.display().to_string(), bytes)?;
    let manifest = Manifest::parse(object, container.section(SectionKind::Manifest, 0)?)?;
    let known = |info: &SectionInfo| {
        !info.kind.is_reserved()
            || (info.instance == 0 && (info.kind == SectionKind::Manifest || PAGE_KINDS.contains(&info.kind)))
    };
    if !container.sections().iter().all(known) {
        return Err(Error::malformed(object, "it has a section of a reserved kind that this build does not know"));
    }
    Ok((manifest, container))
}

/// The length of a container with just these sections.
fn state_len(infos: &[SectionInfo]) -> u64 {
    container_len_of(infos.iter().map(SectionInfo::len))
}

/// The digest of sections about to be written, see [`super::Digests`].
pub(crate) fn section_digest(sections: &[Section]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for section in sections {
        hash_section(&mut hasher, [section.kind.number(), section.instance, section.version], &section.payload);
    }
    Digest(*hasher.finalize().as_bytes())
}

/// The digest of sections that a container has.
fn digest_of(container: &Container, infos: &[SectionInfo]) -> Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    for info in infos {
        hash_section(&mut hasher, [info.kind.number(), info.instance, info.version], container.payload(info)?);
    }
    Ok(Digest(*hasher.finalize().as_bytes()))
}

fn hash_section(hasher: &mut blake3::Hasher, head: [u32; 3], payload: &[u8]) {
    head.iter().for_each(|field| {
        hasher.update(&field.to_le_bytes());
    });
    hasher.update(&(payload.len() as u64).to_le_bytes());
    hasher.update(payload);
}
