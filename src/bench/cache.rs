//! The page cache before a restore: a snapshot's files are dropped from it, read into it in large folios, or written
//! again page by page.

use std::fs::File;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use rustix::fs::SeekFrom;

use crate::snapshot::{HUGE_PAGE_SIZE, LoadHuge, Location, PAGE_SIZE, derived_dir};
use crate::sys::errors::{BoxError, refuse};
use crate::sys::page_cache::{PageCache, resident_pages};

/// The change to the page cache before each restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Cache {
    /// No change: after the first run the snapshot is cached.
    Warm,
    /// The snapshot's files are dropped from it.
    Evicted,
    /// The memory file is cached page by page, as if just written in small pieces: it is evicted, written again over
    /// itself one page a call, and synced.
    AsWritten,
}

impl Cache {
    pub(super) fn name(self) -> &'static str {
        match self {
            Cache::Warm => "warm",
            Cache::Evicted => "evicted",
            Cache::AsWritten => "as written",
        }
    }
}

/// Brings the snapshot into a state of the page cache. Called before the first restore of a series.
pub(super) fn prepare(snapshot: &Path, cache: Cache) -> Result<(), BoxError> {
    evict(snapshot)?;
    let path = snapshot.join("memory");
    let failed = |error: std::io::Error| format!("Cannot prepare {}: {error}", path.display());
    match cache {
        Cache::Evicted => Ok(()),
        Cache::Warm => load(snapshot).map_err(|error| failed(error).into()),
        Cache::AsWritten => rewrite(&path).map_err(|error| failed(error).into()),
    }
}

/// Reads the memory file in folios of 2 MiB, if it has that much data in one place, as sealing leaves it.
fn load(snapshot: &Path) -> std::io::Result<()> {
    let file = File::open(snapshot.join("memory"))?;
    for (start, end) in data(&file)? {
        let start = start.next_multiple_of(HUGE_PAGE_SIZE);
        let end = end / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE;
        if start < end {
            PageCache.load_huge(&file, start, end - start)?;
        }
    }
    Ok(())
}

/// Writes the file over itself, a page a call. Its modification time stays, because plans are bound to it.
fn rewrite(path: &Path) -> std::io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let modified = file.metadata()?.modified()?;
    // No readahead: it would bring the following pages in larger folios.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random)?;
    let mut piece = vec![0; 1 << 20];
    for (start, end) in data(&file)? {
        for at in (start..end).step_by(piece.len()) {
            let bytes = &mut piece[..(end - at).min(1 << 20) as usize];
            file.read_exact_at(bytes, at)?;
            rustix::fs::fadvise(&file, at, NonZero::new(bytes.len() as u64), rustix::fs::Advice::DontNeed)?;
            for (index, page) in bytes.chunks(PAGE_SIZE as usize).enumerate() {
                file.write_all_at(page, at + index as u64 * PAGE_SIZE)?;
            }
        }
    }
    file.sync_all()?;
    file.set_modified(modified)
}

/// The start and end offsets of the file's data, without its holes.
fn data(file: &File) -> std::io::Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(found),
            Err(error) => return Err(error.into()),
        };
        at = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        found.push((start, at));
    }
}

/// Drops the snapshot's files, and those derived from it, from the page cache.
///
/// # Errors
/// A part of them stays: the next measurement would not be of an evicted snapshot.
pub(super) fn evict(snapshot: &Path) -> Result<(), BoxError> {
    let mut paths: Vec<PathBuf> =
        ["memory", "vmstate", "pages", "manifest.json"].map(|name| snapshot.join(name)).to_vec();
    let derived = std::fs::read_dir(derived_dir(&Location::Dir(snapshot.to_path_buf())));
    paths.extend(derived.into_iter().flatten().flatten().map(|entry| entry.path()));
    paths.iter().try_for_each(|path| evict_file(path))
}

/// Number of attempts to drop a file, and the pause between them: pages being written or read at the moment stay.
const EVICTIONS: u32 = 20;
const EVICTION_PAUSE: Duration = Duration::from_millis(5);

fn evict_file(path: &Path) -> Result<(), BoxError> {
    let file = File::open(path).map_err(|error| format!("Cannot open {}: {error}", path.display()))?;
    let mut left = 0;
    for tried in 0..EVICTIONS {
        if tried > 0 {
            file.sync_data()?;
            std::thread::sleep(EVICTION_PAUSE);
        }
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        left = resident_pages(&file)?.unwrap_or_default();
        if left == 0 {
            return Ok(());
        }
    }
    refuse(format!(
        "{left} pages of {} cannot be dropped from the page cache: a VM maps them, or the file system is a tmpfs",
        path.display()
    ))
}
