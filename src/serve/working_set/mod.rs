//! Profiles of a snapshot's functions, and the working-set files made from them.

pub(super) mod mincore;
pub(super) mod profile;
pub(super) mod reap;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(super) use self::profile::{Record, record_invocation};
use super::fault::Fault;
use super::snapshots::{CacheState, derived};
use crate::snapshot::{Chain, Image, ImageSpec, Location, ResolvedRun, image_name};
use crate::sys::page_cache::{PageCache, resident_pages};
use crate::tiering::plan_cache::{self, profile_mark};
use crate::tiering::planner::Planner;
use crate::tiering::policy::Policy;
use crate::tiering::profile::{Order, Profile, RecorderKind};

/// FaaSnap's gap, pages: its policy includes smaller ones.
pub(super) const GAP_PAGES: u64 = 32;

/// The profiles that a snapshot can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    /// Recorded for `/snapshots/{id}/profile`.
    Run,
    /// FaaSnap's layers.
    Mincore,
    /// REAP's working set.
    Reap,
}

impl Slot {
    fn file_name(self) -> &'static str {
        match self {
            Slot::Run => "run.profile",
            Slot::Mincore => "mincore.profile",
            Slot::Reap => "reap.profile",
        }
    }

    /// The path of the profile, which may not exist yet.
    pub(super) fn path(self, profiles: &Path) -> PathBuf {
        profiles.join(self.file_name())
    }

    /// The path of the profile if it exists.
    pub(super) fn existing(self, profiles: &Path) -> Option<PathBuf> {
        Some(self.path(profiles)).filter(|path| path.exists())
    }

    /// The slot for this recorder's profiles.
    pub(super) fn of_recorder(name: &str) -> Result<Slot, Fault> {
        match name.parse::<RecorderKind>() {
            Ok(RecorderKind::Mincore) => Ok(Slot::Mincore),
            Ok(_) => Ok(Slot::Run),
            Err(error) => Err(Fault::bad(error.to_string())),
        }
    }

    /// The profile for a policy: its own if there is one, else any other.
    pub(super) fn for_policy(policy: Policy, profiles: &Path) -> Result<PathBuf, Fault> {
        let order = match policy {
            Policy::Reap => [Slot::Reap, Slot::Run, Slot::Mincore],
            Policy::Faasnap => [Slot::Mincore, Slot::Run, Slot::Reap],
            _ => [Slot::Run, Slot::Reap, Slot::Mincore],
        };
        order.into_iter().find_map(|slot| slot.existing(profiles)).ok_or_else(|| {
            Fault::conflict(format!(
                "Policy `{policy}` needs a profile: record one by POST /snapshots/{{id}}/profile, or by an invocation \
                 with `record`."
            ))
        })
    }
}

/// Refuses thresholds other than the policy's.
pub(super) fn check_thresholds(size: Option<u64>, interval: Option<u64>) -> Result<(), Fault> {
    if size.is_some_and(|size| size != 0) {
        return Err(Fault::bad("`size_threshold` can only be 0: no region is too small to be mapped."));
    }
    if interval.is_some_and(|interval| interval != GAP_PAGES) {
        return Err(Fault::bad(format!("`interval_threshold` can only be {GAP_PAGES} pages, FaaSnap's.")));
    }
    Ok(())
}

/// Refuses anything but all layers of a profile, counted from 1.
pub(super) fn check_all_layers(profile: &Path, wanted: &[u64]) -> Result<(), Fault> {
    let profile = Profile::load(profile).map_err(|error| Fault::of(&error))?;
    let count = match &profile.order {
        Order::Layers(layers) => layers.len() as u64,
        Order::Exact(_) | Order::Unknown => 1,
    };
    let mut wanted = wanted.to_vec();
    wanted.sort_unstable();
    if wanted != (1..=count).collect::<Vec<_>>() {
        return Err(Fault::bad(format!("`loadMincore` must have all layers of the snapshot: 1 to {count}.")));
    }
    Ok(())
}

/// An error of the page cache or a file as one of the snapshot room.
fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> crate::snapshot::Error {
    let path = path.to_owned();
    move |source| crate::snapshot::Error::Io { action, path, source }
}

/// A snapshot's own files, and those derived from it.
pub(super) fn files_of(dir: &Path) -> crate::snapshot::Result<Vec<PathBuf>> {
    let mut files = regular_files(dir)?;
    files.extend(regular_files(&derived(dir))?);
    Ok(files)
}

/// The working-set files made from a snapshot.
pub(super) fn images_of(dir: &Path) -> crate::snapshot::Result<Vec<PathBuf>> {
    let mut files = regular_files(&derived(dir))?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "image"));
    Ok(files)
}

fn regular_files(dir: &Path) -> crate::snapshot::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io_error("list", dir))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(io_error("list", dir))?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}

/// Drops files from the page cache. Pages mapped by a VM stay.
pub(super) fn drop_cached(files: &[PathBuf]) -> crate::snapshot::Result<()> {
    for path in files {
        let file = File::open(path).map_err(io_error("open", path))?;
        let dropped = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        dropped.map_err(|errno| io_error("drop from the page cache", path)(errno.into()))?;
    }
    Ok(())
}

/// Brings files into the page cache, in folios of 2 MiB if they are that large and not sparse.
pub(super) fn load_cached(files: &[PathBuf]) -> crate::snapshot::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    for path in files {
        let mut file = File::open(path).map_err(io_error("open", path))?;
        let mut at = 0;
        // The data between the holes; the whole file if holes are not known.
        while let Ok(start) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
            let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start));
            let end = end.map_err(|errno| io_error("look for holes in", path)(errno.into()))?;
            load_huge_blocks(&file, start, end).map_err(io_error("load", path))?;
            let seeked = rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(start));
            seeked.map_err(|errno| io_error("read", path)(errno.into()))?;
            let mut left = end - start;
            while left > 0 {
                let piece = left.min(buffer.len() as u64) as usize;
                match file.read(&mut buffer[..piece]).map_err(io_error("read", path))? {
                    0 => break,
                    count => left -= count as u64,
                }
            }
            at = end.max(at + 1);
        }
    }
    Ok(())
}

fn load_huge_blocks(file: &File, start: u64, end: u64) -> io::Result<()> {
    use crate::snapshot::{HUGE_PAGE_SIZE, LoadHuge};
    let (start, end) = (start.next_multiple_of(HUGE_PAGE_SIZE), end / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE);
    if start < end { PageCache.load_huge(file, start, end - start) } else { Ok(()) }
}

/// The caching of files.
pub(super) fn cache_state(files: &[PathBuf]) -> crate::snapshot::Result<CacheState> {
    let mut state = CacheState { cached_pages: Some(0), disk_bytes: 0 };
    for path in files {
        let file = File::open(path).map_err(io_error("open", path))?;
        state.disk_bytes += file.metadata().map_err(io_error("stat", path))?.blocks() * 512;
        let cached = resident_pages(&file).map_err(io_error("ask for the cached part of", path))?;
        state.cached_pages = state.cached_pages.zip(cached).map(|(sum, pages)| sum + pages);
    }
    Ok(state)
}

/// A snapshot with its profile, opened for a change.
struct Ground {
    chain: Chain,
    resolved: Vec<ResolvedRun>,
}

impl Ground {
    fn open(dir: &Path) -> crate::snapshot::Result<Ground> {
        let chain = Chain::open(&Location::Dir(dir.to_owned()))?;
        let resolved = chain.resolve()?;
        Ok(Ground { chain, resolved })
    }

    /// The working-set files that a policy would use with this profile.
    fn images(&self, policy: Policy, profile: &Profile) -> Result<Vec<ImageSpec>, Fault> {
        let planner = Planner { chain: &self.chain, tiers: &[], cold: None, page_cache: &PageCache };
        planner.images(policy, profile).map_err(|error| Fault::of(&error))
    }

    /// Makes the working-set files that a policy would use with this profile, unless they exist, and opens them.
    fn make_images(&self, policy: Policy, profile: &Profile) -> Result<Vec<PathBuf>, Fault> {
        let specs = self.images(policy, profile)?;
        let open = |spec| Image::open(&self.chain, spec, &PageCache).map(|(image, _)| image.path().to_path_buf());
        specs.iter().map(open).collect::<Result<_, _>>().map_err(|error| Fault::of(&error))
    }
}

/// Serialises changes of layers and records, which are read, changed and written.
static CHANGING: Mutex<()> = Mutex::new(());

/// Locks layers and records for a change. For threads that may block.
fn exclusively() -> MutexGuard<'static, ()> {
    CHANGING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Loads the profile in a slot, if there is one.
fn load(slot: Slot, profiles: &Path) -> Result<Option<Profile>, Fault> {
    slot.existing(profiles).map(|path| Profile::load(&path)).transpose().map_err(|error| Fault::of(&error))
}

/// Stores a profile of the snapshot in `dir`.
fn save(slot: Slot, dir: &Path, profiles: &Path, profile: &Profile) -> Result<(), Fault> {
    fs::create_dir_all(profiles).map_err(|error| Fault::of(&error))?;
    profile.save(&slot.path(profiles)).map(drop).map_err(|error| Fault::of(&error))?;
    remove_unneeded(dir, profiles)
}

/// Removes the plans and working-set files of a snapshot whose profiles are missing or have changed.
fn remove_unneeded(dir: &Path, profiles: &Path) -> Result<(), Fault> {
    if !derived(dir).is_dir() {
        return Ok(());
    }
    let fault = |error: crate::tiering::Error| Fault::of(&error);
    let mut marks = BTreeSet::from([profile_mark(&[])]);
    let mut images = BTreeSet::new();
    for slot in [Slot::Run, Slot::Mincore, Slot::Reap] {
        let Some(path) = slot.existing(profiles) else { continue };
        marks.insert(profile_mark(&Profile::read(&path).map_err(fault)?));
        // The working-set files of these two are also made ahead of any plan.
        let policy = match slot {
            Slot::Run => continue,
            Slot::Mincore => Policy::Faasnap,
            Slot::Reap => Policy::Reap,
        };
        let ground = Ground::open(dir).map_err(|error| Fault::of(&error))?;
        let profile = Profile::load(&path).map_err(fault)?;
        let of_slot = ground.images(policy, &profile)?;
        images.extend(of_slot.iter().map(|spec| image_name(ground.chain.tip().id(), spec)));
    }
    let freed = plan_cache::remove_unneeded(&derived(dir), &marks, &images);
    if freed > 0 {
        tracing::info!(bytes = freed, dir = %dir.display(), "Plans and images of profiles that are gone are removed");
    }
    Ok(())
}
