//! Finds the pages of a diff that are unchanged since its parent.
//!
//! KVM's dirty log holds a page that the guest has only read if the host had made the page writable before (pages that
//! were preloaded or fetched). Such pages are told from written ones by their bytes.

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::memory_check::{MemoryFile, READ_PAGES};
use super::{Chain, Content, Error, Extent, Gfn, PAGE_SIZE, PageSet, Result};

/// Pages of a diff that may be unchanged, and the parent they are compared with.
#[derive(Clone, Copy)]
pub struct Doubtful<'a> {
    /// The diff's parent, with everything that is relative to.
    pub parent: &'a Chain,
    pub pages: &'a PageSet,
}

/// Pages of a diff that are the same in its parent.
#[derive(Debug, Default)]
pub(super) struct Unchanged {
    /// Unchanged pages among those that the diff holds.
    pub(super) held: PageSet,
    /// Unchanged pages among those that it says are zero.
    pub(super) zero: PageSet,
}

impl Doubtful<'_> {
    /// Finds the pages of `held` (in `memory`) and `zero` that the parent has with the same bytes.
    ///
    /// # Errors
    /// As for [`Chain::resolve`]; [`Error::Io`] if a file cannot be read.
    pub(super) fn unchanged(&self, memory: MemoryFile<'_>, held: &PageSet, zero: &PageSet) -> Result<Unchanged> {
        let mut found = Unchanged::default();
        let held = held.intersection(self.pages);
        let zero = zero.intersection(self.pages);
        if held.is_empty() && zero.is_empty() {
            return Ok(found);
        }
        let mut buffers = [vec![0; (READ_PAGES * PAGE_SIZE) as usize], vec![0; (READ_PAGES * PAGE_SIZE) as usize]];
        for run in self.parent.resolve()? {
            match run.content {
                // A held page has a byte that is not zero.
                Content::Zero => zero.runs_in(run.extent).for_each(|same| found.zero.insert_run(same)),
                Content::Bytes(_) => {
                    let Some(layer) = self.parent.layer_of(run.content) else { continue };
                    let has_memory = !layer.is_elsewhere() && layer.memory_len() >= layer.layout().file_len();
                    if !has_memory {
                        continue;
                    }
                    for part in held.runs_in(run.extent).flat_map(|run| run.chunks(READ_PAGES)) {
                        compare(part, [memory, layer.memory_file()], &mut buffers, &mut found.held)?;
                    }
                }
            }
        }
        Ok(found)
    }
}

/// Adds the pages of `part` to `same` that are the same in both files.
fn compare(part: Extent, files: [MemoryFile<'_>; 2], buffers: &mut [Vec<u8>; 2], same: &mut PageSet) -> Result<()> {
    let len = part.bytes() as usize;
    for (file, buffer) in files.iter().zip(buffers.iter_mut()) {
        file.read(part.first, &mut buffer[..len])?;
    }
    let page = PAGE_SIZE as usize;
    let pages = buffers[0][..len].chunks_exact(page).zip(buffers[1][..len].chunks_exact(page));
    for (gfn, (now, before)) in (part.first.0..).zip(pages) {
        if now == before {
            same.insert_run(Extent { first: Gfn(gfn), pages: 1 });
        }
    }
    Ok(())
}

/// Makes holes of `pages` in a memory file. Returns whether the file system can do that.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn punch(memory: MemoryFile<'_>, pages: &PageSet) -> Result<bool> {
    for extent in pages.runs().flat_map(|run| memory.layout.split(run).collect::<Vec<_>>()) {
        let offset = memory.layout.file_offset(extent.first).unwrap_or_default();
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(memory.file, mode, offset, extent.bytes()) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(false),
            Err(errno) => return Err(Error::io("make holes in", memory.path)(errno.into())),
        }
    }
    Ok(true)
}
