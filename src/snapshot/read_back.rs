//! Reading a memory file back from the disk, after it was made durable.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use super::memory_check::{MemoryFile, Progress};
use super::page_map::PageMap;
use super::{Error, MemoryLayout, Result, files};

/// Brings a part of a file into the page cache in huge folios. A system call that this room leaves to its caller.
pub trait LoadHuge {
    /// Loads `[offset, offset + len)` in bytes, both multiples of 2 MiB. Does nothing if the file system or the kernel
    /// has no huge folios.
    fn load_huge(&self, file: &File, offset: u64, len: u64) -> io::Result<()>;
}

/// The memory of a sealed snapshot that is not read back yet. The snapshot is durable and valid without it.
#[derive(Debug)]
pub struct ReadBack {
    /// Opened for reading only, before the file got its name: a snapshot that replaces this one has another file.
    file: File,
    /// The name that the file got.
    path: PathBuf,
    layout: MemoryLayout,
    map: PageMap,
}

impl ReadBack {
    /// Opens the file that `memory` is, and that will be at `path`.
    pub(super) fn prepare(memory: MemoryFile<'_>, map: PageMap, path: PathBuf) -> Result<ReadBack> {
        let file = File::open(memory.path).map_err(Error::io("open", memory.path))?;
        Ok(ReadBack { file, path, layout: memory.layout.clone(), map })
    }

    /// Reads the memory from the disk and compares it with the checksums of the written bytes.
    ///
    /// # Errors
    /// [`Error::BadMemory`] if the disk did not keep the written bytes; [`Error::Io`].
    pub fn run(&self, cache: &dyn LoadHuge) -> Result<()> {
        let memory = MemoryFile { file: &self.file, path: &self.path, layout: &self.layout };
        read_back(memory, &self.map, cache)
    }
}

/// Reads durable memory from the disk and not from the page cache that it was just written to, and compares it with the
/// checksums.
///
/// The bytes stay in the page cache, in the largest folios there are: a page fault on a restored guest's memory then
/// maps 2 MiB instead of one page. Pages that a guest has mapped meanwhile stay in the cache as they are.
pub(super) fn read_back(memory: MemoryFile<'_>, map: &PageMap, cache: &dyn LoadHuge) -> Result<()> {
    files::evict(memory.file, memory.path)?;
    for run in memory.dense_blocks(map) {
        let offset = memory.layout.file_offset(run.first).unwrap_or_default();
        cache.load_huge(memory.file, offset, run.bytes()).map_err(Error::io("read back", memory.path))?;
    }
    let mut progress = Progress { done: 0, total: 0, report: &mut |_, _| {} };
    memory.verify(map, &mut progress)?.into_result(&memory.path.display().to_string())?;
    Ok(())
}
