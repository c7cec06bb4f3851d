//! Finds out without the code under test how the page cache has a file: mincore(2), and what a mapping's smaps say.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const PAGE: usize = 4096;
const BLOCK: usize = 2 << 20;

/// A private read-only mapping of a whole file, at an address that is a multiple of 2 MiB.
struct Mapped {
    reserved: *mut libc::c_void,
    start: *mut u8,
    len: usize,
}

impl Mapped {
    fn of(file: &File) -> Mapped {
        let len = file.metadata().unwrap().len() as usize;
        let (flags, none) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, std::ptr::null_mut());
        // SAFETY: a new mapping, where nothing is.
        let reserved = unsafe { libc::mmap(none, len + BLOCK, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(reserved, libc::MAP_FAILED);
        let start = (reserved as usize).next_multiple_of(BLOCK) as *mut libc::c_void;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
        // SAFETY: it replaces part of the reserved mapping, which nothing uses.
        let mapped = unsafe { libc::mmap(start, len, libc::PROT_READ, flags, file.as_raw_fd(), 0) };
        assert_eq!(mapped, start);
        Mapped { reserved, start: start.cast(), len }
    }

    /// True for each page that is in the page cache.
    fn cached(&self) -> Vec<bool> {
        let mut cached = vec![0_u8; self.len.div_ceil(PAGE)];
        // SAFETY: the kernel writes one byte for each page of the mapping.
        let result = unsafe { libc::mincore(self.start.cast(), self.len, cached.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        cached.into_iter().map(|byte| byte & 1 == 1).collect()
    }

    /// The number of blocks of 2 MiB that are mapped as one.
    fn huge_blocks(&self) -> usize {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let head = format!("{:x}-", self.start as usize);
        let fields = smaps.lines().skip_while(|line| !line.starts_with(&head));
        let huge = fields.take_while(|line| !line.starts_with("VmFlags")).filter(|line| line.contains("PmdMapped:"));
        huge.map(|line| line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024 / BLOCK).sum()
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing points into it any more.
        unsafe { libc::munmap(self.reserved, self.len + BLOCK) };
    }
}

/// `cold` if less than half of what `path` holds is in the page cache; else `huge` if a fault in at least half of the
/// blocks that are wholly cached maps all 2 MiB of a block, and `small` if not.
pub fn cached_as(path: &Path) -> &'static str {
    let file = File::open(path).unwrap();
    let held = file.metadata().unwrap().blocks() as usize * 512 / PAGE;
    let mapped = Mapped::of(&file);
    let cached = mapped.cached();
    if cached.iter().filter(|is_cached| **is_cached).count() * 2 < held {
        return "cold";
    }
    let blocks = cached.chunks_exact(BLOCK / PAGE).enumerate();
    let whole: Vec<usize> =
        blocks.filter(|(_, pages)| pages.iter().all(|page| *page)).map(|(index, _)| index).collect();
    for block in &whole {
        // SAFETY: within the mapping, and within the file.
        unsafe { mapped.start.add(block * BLOCK).read_volatile() };
    }
    if mapped.huge_blocks() * 2 >= whole.len() { "huge" } else { "small" }
}
