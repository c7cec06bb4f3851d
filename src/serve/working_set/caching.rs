//! The part of a snapshot's files that is in the page cache: measures it, fills it, empties it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use utoipa::ToSchema;

use crate::serve::snapshot_record::derived;
use crate::sys::page_cache::{PageCache, resident_pages};

/// The cached part of a snapshot's files.
#[derive(Debug, Serialize, ToSchema)]
pub struct CacheState {
    /// Pages of 4 KiB; none if the kernel cannot say.
    pub cached_pages: Option<u64>,
    /// Bytes of the files on the disk.
    pub disk_bytes: u64,
}

/// An error of the page cache or a file as one of the snapshot room.
pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> crate::snapshot::Error {
    let path = path.to_owned();
    move |source| crate::snapshot::Error::Io { action, path, source }
}

/// A snapshot's own files, and those derived from it.
pub fn files_of(dir: &Path) -> crate::snapshot::Result<Vec<PathBuf>> {
    let mut files = regular_files(dir)?;
    files.extend(regular_files(&derived(dir))?);
    Ok(files)
}

/// The working-set files made from a snapshot.
pub fn images_of(dir: &Path) -> crate::snapshot::Result<Vec<PathBuf>> {
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
pub fn drop_cached(files: &[PathBuf]) -> crate::snapshot::Result<()> {
    for path in files {
        let file = File::open(path).map_err(io_error("open", path))?;
        let dropped = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        dropped.map_err(|errno| io_error("drop from the page cache", path)(errno.into()))?;
    }
    Ok(())
}

/// Brings files into the page cache, in folios of 2 MiB if they are that large and not sparse.
pub fn load_cached(files: &[PathBuf]) -> crate::snapshot::Result<()> {
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
    let start = start.next_multiple_of(HUGE_PAGE_SIZE);
    let end = end / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE;
    if start < end { PageCache.load_huge(file, start, end - start) } else { Ok(()) }
}

/// The caching of files.
pub fn cache_state(files: &[PathBuf]) -> crate::snapshot::Result<CacheState> {
    let mut state = CacheState { cached_pages: Some(0), disk_bytes: 0 };
    for path in files {
        let file = File::open(path).map_err(io_error("open", path))?;
        state.disk_bytes += file.metadata().map_err(io_error("stat", path))?.blocks() * 512;
        let cached = resident_pages(&file).map_err(io_error("ask for the cached part of", path))?;
        state.cached_pages = state.cached_pages.zip(cached).map(|(sum, pages)| sum + pages);
    }
    Ok(state)
}
