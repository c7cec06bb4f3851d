//! Finds the pages of a file that are in the host's page cache (mincore(2)).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use crate::snapshot::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;
/// Bytes asked about at once: bounds the vector, not the file.
const WINDOW: usize = 1 << 30;

/// A mapping of a whole file that cannot be touched, so that it brings nothing into the page cache itself.
#[derive(Debug)]
pub struct CacheView {
    base: NonNull<u8>,
    len: usize,
    vector: Vec<u8>,
}

// SAFETY: the mapping is PROT_NONE and only its addresses are used, as arguments of mincore.
unsafe impl Send for CacheView {}

impl CacheView {
    /// Maps `len` bytes (whole pages, not zero) of `file`. This process must own the file or be able to write it:
    /// otherwise the kernel says that everything is resident.
    pub fn new(file: &File, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(CacheView { base, len, vector: vec![0; len.min(WINDOW) / PAGE] })
    }

    /// Calls `found(first, pages)` for each run of pages of the file that are in the page cache, ascending.
    pub fn resident_runs(&mut self, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut done = 0;
        while done < self.len {
            let window = WINDOW.min(self.len - done);
            let vector = &mut self.vector[..window / PAGE];
            // SAFETY: the range lies within this object's mapping, and the vector has a byte for each of its pages.
            let result = unsafe { libc::mincore(self.base.as_ptr().add(done).cast(), window, vector.as_mut_ptr()) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
            let first = (done / PAGE) as u64;
            let mut page = 0;
            for run in vector.chunk_by(|a, b| a & 1 == b & 1) {
                if run[0] & 1 == 1 {
                    found(first + page, run.len() as u64);
                }
                page += run.len() as u64;
            }
            done += window;
        }
        Ok(())
    }
}

impl Drop for CacheView {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's own and nothing refers to its bytes.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn resident_runs_are_those_that_were_read() {
        // Not in /tmp: a tmpfs cannot be evicted.
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all_at(&vec![7; 1024 * PAGE], 0).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
        let mut view = CacheView::new(&file, 1024 * PAGE as u64).unwrap();
        let mut runs = Vec::new();
        view.resident_runs(|first, pages| runs.push((first, pages))).unwrap();
        assert_eq!(runs, []);
        for page in [3, 4, 900] {
            file.read_exact_at(&mut [0], page * PAGE as u64).unwrap();
        }
        view.resident_runs(|first, pages| runs.push((first, pages))).unwrap();
        assert_eq!(runs, [(3, 2), (900, 1)]);
    }
}
