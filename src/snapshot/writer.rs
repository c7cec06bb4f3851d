//! Writes a snapshot beside its final name and moves it into place when it is complete, durable and (unless the caller
//! does that afterwards) compared with its checksums.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::chain::check_parent;
use super::container::{self, Section, SectionKind, write_container};
use super::files::Durability;
use super::manifest::{DIR_FILES, MANIFEST_FILE, MAX_STANDS_FOR, MEMORY_FILE, PAGES_FILE, STATE_FILE, canonical};
use super::memory_check::MemoryFile;
use super::page_map::PageMap;
use super::partial::{self, PartialDir};
use super::read_back::{LoadHuge, ReadBack, read_back};
use super::reader::{PAGES_LIMIT, SNAPSHOT_FILE_LIMIT, STATE_LIMIT, section_digest};
use super::unchanged::{Doubtful, punch};
use super::{
    Digests, DriveCopy, Error, Extent, FORMAT_MAJOR, FileSizes, Gfn, HostFacts, Location, MachineFacts, Manifest,
    MemoryLayout, PAGE_SIZE, PageSet, Parent, Result, Snapshot, SnapshotId, SnapshotKind, copy_drive, files,
};

/// Bytes per write: large against the cost of a system call. File systems make folios as large as a write, and a kernel
/// that must first make room for one of 2 MiB keeps the guest waiting.
const WRITE_PIECE: usize = 512 << 10;

/// A snapshot being written. Dropping it without [`seal`](SnapshotWriter::seal) leaves nothing behind.
#[derive(Debug)]
pub struct SnapshotWriter {
    target: Location,
    layout: MemoryLayout,
    kind: SnapshotKind,
    parent: Option<Parent>,
    work: Work,
    memory: File,
    /// The first page that may still be written in this pass.
    next: Gfn,
    /// Pages written before may be written again.
    is_later_pass: bool,
    held: PageSet,
    zero: PageSet,
    drives: Vec<(DriveCopy, File)>,
    stands_for: Vec<SnapshotId>,
    durability: Durability,
}

/// The work directories: one for the directory form, one beside each file for the two-file form.
#[derive(Debug)]
struct Work {
    memory_dir: PartialDir,
    snapshot_dir: Option<PartialDir>,
}

impl Work {
    fn memory_path(&self) -> PathBuf {
        self.memory_dir.path().join(MEMORY_FILE)
    }
}

/// The parts of a snapshot besides guest memory.
#[derive(Clone)]
pub struct SealInput<'a> {
    /// The sections of the VM's state, in the order in which they are to be stored.
    pub state: Vec<Section>,
    /// The host the VM ran on.
    pub host: HostFacts,
    /// The size of the machine.
    pub machine: MachineFacts,
    /// Brings the finished memory file into the page cache.
    pub cache: &'a dyn LoadHuge,
}

/// The time at which the memory is read back from the disk.
#[derive(Clone, Copy)]
enum Proof<'a> {
    /// Before the snapshot has its name.
    First(&'a dyn LoadHuge),
    /// The caller does it.
    Later,
}

/// A finished snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Its id.
    pub id: SnapshotId,
    /// Its location.
    pub location: Location,
    /// Pages in the memory file.
    pub pages_held: u64,
    /// Pages a diff knows to be zero; 0 for a full snapshot.
    pub pages_zero: u64,
    /// Bytes that all its files occupy on disk.
    pub bytes_on_disk: u64,
}

impl SnapshotWriter {
    /// Prepares to write a snapshot to `target`. A directory must not exist yet; the two files of the other form may,
    /// and are replaced when the snapshot is sealed.
    ///
    /// Also removes the temporaries of dead writers beside the target.
    ///
    /// # Errors
    /// [`Error::TargetExists`], [`Error::BadTarget`], [`Error::BadParentage`] (a diff needs a parent, a full snapshot
    /// has none), [`Error::NoParent`] and [`Error::ChainFull`] (no reader could open the diff), [`Error::Io`].
    pub fn create(
        target: Location,
        layout: MemoryLayout,
        kind: SnapshotKind,
        parent: Option<Parent>,
    ) -> Result<SnapshotWriter> {
        if parent.is_some() != (kind == SnapshotKind::Diff) {
            return Err(Error::BadParentage { object: target.display() });
        }
        check_target(&target, parent.as_ref())?;
        if let Some(parent) = &parent {
            check_parent(&target.display(), parent, &layout)?;
        }
        let work = match &target {
            Location::Dir(dir) => Work { memory_dir: work_dir_beside(dir)?, snapshot_dir: None },
            Location::Files { snapshot, memory } => {
                Work { memory_dir: work_dir_beside(memory)?, snapshot_dir: Some(work_dir_beside(snapshot)?) }
            }
        };
        let path = work.memory_path();
        let memory = files::create_new(&path)?;
        memory.set_len(layout.file_len()).map_err(Error::io("set the length of", &path))?;
        Ok(SnapshotWriter {
            target,
            layout,
            kind,
            parent,
            work,
            memory,
            next: Gfn(0),
            is_later_pass: false,
            held: PageSet::new(),
            zero: PageSet::new(),
            drives: Vec::new(),
            stands_for: Vec::new(),
            durability: Durability::Synced,
        })
    }

    /// Records that the snapshot has the memory and the state of `snapshots`: their children may become its own. The
    /// last merged come first; those merged longest ago are left out if a manifest cannot hold all.
    pub(crate) fn stand_for(&mut self, snapshots: impl Iterator<Item = SnapshotId>) {
        self.stands_for = snapshots.take(MAX_STANDS_FOR).collect();
    }

    /// Leaves it to the kernel when the snapshot's files reach the disk: for a snapshot that need not survive a crash
    /// of the host.
    pub fn leave_unsynced(&mut self) {
        self.durability = Durability::Unsynced;
    }

    /// Copies the first `len` bytes of a drive's image. The caller keeps the image unwritten meanwhile.
    ///
    /// # Errors
    /// [`Error::BadTarget`] for the two-file form, which has no place for it, and for an id that is no file name;
    /// [`Error::Io`].
    pub fn copy_drive(&mut self, drive_id: &str, image: &File, len: u64) -> Result<()> {
        let bad = |problem| Err(Error::BadTarget { path: self.target.anchor().to_path_buf(), problem });
        if matches!(self.target, Location::Files { .. }) {
            return bad("copies of drives need a snapshot directory, Firecracker's two files have no place for them");
        }
        let copy = DriveCopy { drive_id: drive_id.to_owned(), len };
        if !copy.is_valid() {
            return bad("a drive's id cannot be part of a file name");
        }
        let (file, _) = copy_drive(image, len, &self.work.memory_dir.path().join(copy.file_name()))?;
        self.drives.push((copy, file));
        Ok(())
    }

    /// Writes the bytes of the pages from `first` on; the layer then holds these pages. Meant to be called while the
    /// VM is paused, with runs as long as possible: it costs the copy into the page cache, no more.
    ///
    /// # Errors
    /// [`Error::BadRun`] if the bytes are not whole pages, cross the end of a range, come before a page that was
    /// already written in this pass, or were marked zero in it. [`Error::Io`] from the write, for example when the disk
    /// is full.
    pub fn write_run(&mut self, first: Gfn, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        let run = Extent { first, pages: len / PAGE_SIZE };
        let bad = |problem| Err(Error::BadRun { extent: run, problem });
        if !len.is_multiple_of(PAGE_SIZE) || !self.layout.contains(run) {
            return bad("they are not whole pages of one range of guest memory");
        }
        if first < self.next {
            return bad("pages must be written in ascending order, each once");
        }
        if self.is_later_pass {
            self.zero.remove_run(run);
        } else if self.zero.len_in(run) > 0 {
            return bad("some of them were marked zero");
        }
        // Proven by `contains`: every page of the layout has an offset.
        let mut offset = self.layout.file_offset(first).unwrap_or_default();
        for piece in bytes.chunks(WRITE_PIECE) {
            if let Err(source) = self.memory.write_all_at(piece, offset) {
                return Err(Error::Io { action: "write", path: self.work.memory_path(), source });
            }
            offset += piece.len() as u64;
        }
        self.held.insert_run(run);
        self.next = run.end();
        Ok(())
    }

    /// Begins another pass over the memory of a VM that runs: pages that it has changed may be written again.
    pub fn next_pass(&mut self) {
        self.next = Gfn(0);
        self.is_later_pass = true;
    }

    /// Records that pages are zero: in a full snapshot pages not written, in a diff pages marked as zero. Pages written
    /// in an earlier pass become zero in the memory file.
    ///
    /// # Errors
    /// [`Error::BadRun`] for pages outside guest memory and, in the first pass, for pages that were written;
    /// [`Error::Io`].
    pub fn set_zero(&mut self, extent: Extent) -> Result<()> {
        if self.is_later_pass && self.held.len_in(extent) > 0 {
            let held: PageSet = self.held.runs_in(extent).collect();
            let memory = MemoryFile { file: &self.memory, path: &self.work.memory_path(), layout: &self.layout };
            if punch(memory, &held)? {
                self.held.subtract(&held);
            } else {
                // The file system makes no holes: these pages are held, and their bytes are zeros.
                let zeros = vec![0; WRITE_PIECE];
                let pieces = held.runs().flat_map(|run| run.chunks(WRITE_PIECE as u64 / PAGE_SIZE));
                for piece in pieces.collect::<Vec<_>>() {
                    let offset = self.layout.file_offset(piece.first).unwrap_or_default();
                    let written = self.memory.write_all_at(&zeros[..piece.bytes() as usize], offset);
                    written.map_err(Error::io("write", &self.work.memory_path()))?;
                }
            }
        }
        if self.kind == SnapshotKind::Full {
            return Ok(());
        }
        let not_held: PageSet = PageSet::from_iter([extent]).difference(&self.held);
        let runs: Vec<_> = not_held.runs().collect();
        runs.into_iter().try_for_each(|run| self.mark_zero(run))
    }

    /// Records that pages are zero (and not the parent's). For diffs only; a full snapshot's other pages are zero
    /// anyway.
    ///
    /// # Errors
    /// [`Error::BadRun`] for a full snapshot, for pages outside guest memory and for pages that were written.
    pub fn mark_zero(&mut self, extent: Extent) -> Result<()> {
        let bad = |problem| Err(Error::BadRun { extent, problem });
        if self.kind == SnapshotKind::Full {
            return bad("a full snapshot does not list zero pages");
        }
        if !self.layout.contains(extent) {
            return bad("they are not within one range of guest memory");
        }
        if self.held.len_in(extent) > 0 {
            return bad("some of them were written");
        }
        self.zero.insert_run(extent);
        Ok(())
    }

    /// Completes the snapshot: checksums the memory (from the page cache, before the disk has a part in it: see
    /// [`MemoryFile::checksums`]), writes state, page map and manifest, makes everything durable, reads the memory back
    /// from the disk and compares it (which also leaves it in the page cache in large folios), and moves the snapshot
    /// to its name. The VM need not be paused for any of it.
    ///
    /// # Errors
    /// [`Error::BadSection`], [`Error::TooLarge`], [`Error::BadMemory`] (the disk did not keep what was written),
    /// [`Error::NoParent`] (the parent was deleted meanwhile), [`Error::Unreadable`], [`Error::TargetExists`],
    /// [`Error::Io`]. Nothing is left under the final name then.
    pub fn seal(self, input: SealInput<'_>) -> Result<Sealed> {
        let proof = Proof::First(input.cache);
        Ok(self.complete(input, proof)?.0)
    }

    /// As [`seal`](Self::seal), but leaves reading the memory back to the caller, after the snapshot has its name and
    /// is durable.
    ///
    /// # Errors
    /// As for [`seal`](Self::seal), without [`Error::BadMemory`].
    pub fn seal_unproven(self, input: SealInput<'_>) -> Result<(Sealed, ReadBack)> {
        self.complete(input, Proof::Later)
    }

    fn complete(self, input: SealInput<'_>, proof: Proof<'_>) -> Result<(Sealed, ReadBack)> {
        container::check_sections(&input.state)?;
        let object = self.target.display();
        let SnapshotWriter {
            target,
            layout,
            kind,
            parent,
            work,
            memory,
            held,
            zero,
            drives,
            stands_for,
            durability,
            ..
        } = self;
        let path = work.memory_path();
        let checksums =
            MemoryFile { file: &memory, path: &path, layout: &layout }.sync_and_checksum(&held, durability)?;
        let map = PageMap::new(&layout, held, zero, checksums).map_err(|p| Error::malformed(&object, p))?;
        let pages = map.to_sections();
        let sizes = FileSizes {
            vmstate: container::container_len(&input.state),
            pages: container::container_len(&pages),
            memory: layout.file_len(),
        };
        check_size(&object, sizes.vmstate, STATE_LIMIT)?;
        check_size(&object, sizes.pages, PAGES_LIMIT)?;
        let base = target.base_dir();
        let needed = parent.clone();
        let parent = parent.map(|p| Parent { id: p.id, location: p.location.relative_to(&base) });
        let mut manifest = Manifest {
            format: u32::from(FORMAT_MAJOR),
            id: SnapshotId::default(),
            kind,
            tvmm_version: env!("CARGO_PKG_VERSION").to_string(),
            created_unix_ms: now_unix_ms(),
            parent,
            pages_held: map.held().len(),
            pages_zero: map.zero().len(),
            machine: input.machine,
            host: input.host,
            digests: Digests { vmstate: section_digest(&input.state), pages: section_digest(&pages) },
            sizes,
            layout,
            drives: drives.iter().map(|(copy, _)| copy.clone()).collect(),
            stands_for,
        };
        manifest.id = manifest.compute_id(&object)?;
        let memory = MemoryFile { file: &memory, path: &path, layout: &manifest.layout };
        for (copy, file) in &drives {
            let path = work.memory_dir.path().join(copy.file_name());
            durability.sync(file, &path)?;
        }
        if let Proof::First(cache) = proof {
            read_back(memory, &map, cache)?;
        }
        let to_read = ReadBack::prepare(memory, map, target.memory_path())?;
        let bytes_on_disk = match &target {
            Location::Dir(_) => seal_dir(&target, work, &manifest, needed, [&input.state, &pages], durability)?,
            Location::Files { .. } => seal_files(&target, work, &manifest, needed, [input.state, pages])?,
        };
        let Manifest { id, pages_held, pages_zero, .. } = manifest;
        Ok((Sealed { id, location: target, pages_held, pages_zero, bytes_on_disk }, to_read))
    }

    /// Takes pages out of a diff that are the same in its parent. Pages stay where the parent cannot be read: a diff
    /// with more pages restores the same memory.
    ///
    /// # Errors
    /// [`Error::Io`] for the diff's own file.
    pub fn drop_unchanged(&mut self, doubtful: Doubtful<'_>) -> Result<()> {
        let memory = MemoryFile { file: &self.memory, path: &self.work.memory_path(), layout: &self.layout };
        let unchanged = match doubtful.unchanged(memory, &self.held, &self.zero) {
            Ok(unchanged) => unchanged,
            Err(error) => {
                tracing::warn!(%error, "A diff holds pages that may be as they were: its parent cannot be read");
                return Ok(());
            }
        };
        self.zero.subtract(&unchanged.zero);
        if punch(memory, &unchanged.held)? {
            self.held.subtract(&unchanged.held);
        }
        Ok(())
    }
}

/// A work directory beside `target`; first, those that dead writers left there are removed.
fn work_dir_beside(target: &Path) -> Result<PartialDir> {
    if target.file_name().is_none() {
        return Err(Error::BadTarget { path: target.to_path_buf(), problem: "it has no final name" });
    }
    let dir = files::parent_dir(target);
    partial::sweep(&dir);
    PartialDir::create(&dir)
}

/// Refuses targets that would overwrite a snapshot, or one half of themselves.
fn check_target(target: &Location, parent: Option<&Parent>) -> Result<()> {
    let bad = |path: &Path, problem| Err(Error::BadTarget { path: path.to_path_buf(), problem });
    match target {
        Location::Dir(dir) if dir.symlink_metadata().is_ok() => Err(Error::TargetExists { path: dir.clone() }),
        Location::Dir(_) => Ok(()),
        Location::Files { snapshot, memory } => {
            if canonical(snapshot) == canonical(memory) {
                return bad(snapshot, "it is given for both the snapshot and the memory");
            }
            for path in [snapshot, memory] {
                if path.is_dir() {
                    return bad(path, "it is a directory");
                }
                if parent.is_some_and(|parent| uses_file(&parent.location, path)) {
                    return bad(path, "it is a file of the snapshot's own parent");
                }
            }
            Ok(())
        }
    }
}

/// True if a snapshot at `location` has `path` as one of its files.
pub(crate) fn uses_file(location: &Location, path: &Path) -> bool {
    let path = canonical(path);
    match location {
        Location::Dir(dir) => path.parent().is_some_and(|parent| parent == canonical(dir)),
        Location::Files { snapshot, memory } => path == canonical(snapshot) || path == canonical(memory),
    }
}

fn check_size(object: &str, len: u64, limit: u64) -> Result<()> {
    if len > limit {
        return Err(Error::TooLarge { object: object.to_string(), len, limit });
    }
    Ok(())
}

fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Opens the written snapshot as every reader does, and the parent that a diff needs. So the writer's limits are the
/// reader's, and a parent that was deleted since the capture is noticed before the diff is acknowledged.
fn prove_readable(target: &Location, written: &Location, manifest: &Manifest, needed: Option<&Parent>) -> Result<()> {
    let object = target.display();
    let opened = Snapshot::open(written).and_then(|snapshot| snapshot.page_map().map(drop).map(|()| snapshot.id()));
    match opened {
        Ok(id) if id == manifest.id => {}
        Ok(found) => return Err(Error::IdMismatch { object, claimed: manifest.id, computed: found }),
        Err(error) => return Err(Error::Unreadable { object, source: Box::new(error) }),
    }
    needed.map_or(Ok(()), |parent| check_parent(&object, parent, &manifest.layout))
}

fn seal_dir(
    target: &Location,
    work: Work,
    manifest: &Manifest,
    needed: Option<Parent>,
    sections: [&[Section]; 2],
    durability: Durability,
) -> Result<u64> {
    let Location::Dir(dir) = target else { return Ok(0) };
    let from = work.memory_dir.path().to_path_buf();
    let [state, pages] = sections;
    files::write_new(&from.join(STATE_FILE), &write_container(state), durability)?;
    files::write_new(&from.join(PAGES_FILE), &write_container(pages), durability)?;
    files::write_new(&from.join(MANIFEST_FILE), &manifest.to_json(&dir.display().to_string())?, durability)?;
    let drives = manifest.drives.iter().map(DriveCopy::file_name);
    let names = DIR_FILES.map(str::to_owned).into_iter().chain(drives);
    let bytes_on_disk = names.map(|name| occupied(&from.join(name))).sum::<Result<u64>>()?;
    prove_readable(target, &Location::Dir(from), manifest, needed.as_ref())?;
    work.memory_dir.publish(dir, durability)?;
    Ok(bytes_on_disk)
}

/// The snapshot file is the commit point. An old one is removed before its memory is replaced: a crash in between
/// leaves no snapshot, never one with another's memory.
fn seal_files(
    target: &Location,
    work: Work,
    manifest: &Manifest,
    needed: Option<Parent>,
    sections: [Vec<Section>; 2],
) -> Result<u64> {
    let Location::Files { snapshot: snapshot_to, memory: memory_to } = target else { return Ok(0) };
    let Some(snapshot_dir) = &work.snapshot_dir else { return Ok(0) };
    let json = manifest.to_json(&snapshot_to.display().to_string())?;
    let mut all = vec![Section { kind: SectionKind::Manifest, instance: 0, version: 1, payload: json }];
    all.extend(sections.into_iter().flatten());
    check_size(&snapshot_to.display().to_string(), container::container_len(&all), SNAPSHOT_FILE_LIMIT)?;
    let snapshot_from = snapshot_dir.path().join("snapshot");
    files::write_new(&snapshot_from, &write_container(&all), Durability::Synced)?;
    let memory_from = work.memory_path();
    let bytes_on_disk = occupied(&snapshot_from)? + occupied(&memory_from)?;
    let written = Location::Files { snapshot: snapshot_from.clone(), memory: memory_from.clone() };
    prove_readable(target, &written, manifest, needed.as_ref())?;
    match fs::remove_file(snapshot_to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", snapshot_to)(error))?,
        Ok(()) => files::sync_dir(&files::parent_dir(snapshot_to))?,
        Err(_) => {}
    }
    for (from, to) in [(memory_from.as_path(), memory_to), (snapshot_from.as_path(), snapshot_to)] {
        fs::rename(from, to).map_err(Error::io("rename a finished file to", to))?;
        files::sync_dir(&files::parent_dir(to))?;
    }
    Ok(bytes_on_disk)
}

/// Bytes a file occupies, holes not counted.
fn occupied(path: &Path) -> Result<u64> {
    let metadata = fs::metadata(path).map_err(Error::io("stat", path))?;
    // st_blocks counts 512 bytes whatever the file system's block size.
    Ok(metadata.blocks() * 512)
}
