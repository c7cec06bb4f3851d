//! A shared mapping of a whole device or file, for those that do not support read(2) or write(2).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use super::lost::{self, MappedFile, Mapping, Watched};
use super::mapping::Reservation;
use crate::snapshot::HUGE_PAGE_SIZE;

/// Bytes of a cache line.
const LINE: usize = 64;

/// The mapping. Bytes are copied in and out; no reference to them is given out, because other processes change them.
#[derive(Debug)]
pub struct SharedMap {
    base: NonNull<u8>,
    len: usize,
    is_writable: bool,
    /// Names the file in errors if it is cut while it is mapped.
    _watched: Option<Watched>,
}

// SAFETY: the mapping is plain memory that other processes change as well; it is only copied from and to.
unsafe impl Send for SharedMap {}
// SAFETY: as above; concurrent copies may tear, which every format in it is checked for by its checksums.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps the first `len` bytes of `file`, which must not shrink while it is mapped; only to be read, unless
    /// `is_writable`.
    pub fn new(file: &File, len: u64, is_writable: bool) -> io::Result<SharedMap> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let access = if is_writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let mapping = Mapping { address: base.as_ptr() as usize, len, file: 0, offset: 0, gpa: None };
        let mut map = SharedMap { base, len, is_writable, _watched: None };
        map._watched = lost::watch(vec![MappedFile::unnamed(file)?], vec![mapping]);
        Ok(map)
    }

    fn at(&self, offset: u64, len: usize) -> io::Result<*mut u8> {
        let end = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(len));
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: the offset was just checked to lie within the mapping.
        Ok(unsafe { self.base.as_ptr().add(offset as usize) })
    }

    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let from = self.at(offset, bytes.len())?;
        // SAFETY: `from` and as many bytes after it lie within the mapping; `bytes` is this process's own memory.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.is_writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let to = self.at(offset, bytes.len())?;
        // SAFETY: as for reading.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Writes the cache lines of `[offset, offset + len)` back to memory and drops them: every host then sees the
    /// written bytes, and the next read gets its bytes from memory.
    pub fn flush_lines(&self, offset: u64, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        let first = self.at(offset, len)? as usize / LINE * LINE;
        let end = self.base.as_ptr() as usize + offset as usize + len;
        for line in (first..end).step_by(LINE) {
            // SAFETY: the line holds at least one byte of the mapping; CLFLUSH changes no bytes, and every x86-64 CPU
            // has it.
            unsafe { std::arch::x86_64::_mm_clflush(line as *const u8) };
        }
        // SAFETY: orders the flushes before later instructions; every x86-64 CPU has it.
        unsafe { std::arch::x86_64::_mm_mfence() };
        Ok(())
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's own and nothing refers to its bytes.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// `MADV_COLLAPSE` of Linux `include/uapi/asm-generic/mman-common.h` (6.1).
const MADV_COLLAPSE: i32 = 25;
const HUGE: usize = HUGE_PAGE_SIZE as usize;

/// Moves the pages of `[offset, offset + len)` of `file` (a tmpfs; multiples of 2 MiB) into huge pages, unless they are
/// in some: the host may have had none when they were written. Returns the number of blocks that failed.
pub fn make_huge(file: &File, offset: u64, len: u64) -> io::Result<u64> {
    let room = Reservation::new(HUGE)?;
    let mut failed = 0;
    for at in (offset..offset.saturating_add(len)).step_by(HUGE) {
        let at = libc::off_t::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: the reservation is 2 MiB of address space that only this function uses.
        let base = unsafe { libc::mmap(room.base().cast(), HUGE, libc::PROT_READ, flags, file.as_raw_fd(), at) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the advice changes which pages hold the bytes, not the bytes.
        let result = unsafe { libc::madvise(base, HUGE, MADV_COLLAPSE) };
        failed += u64::from(result != 0);
    }
    Ok(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_bytes_are_read_back_and_none_behind_the_end() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let map = SharedMap::new(&file, 8192, true).unwrap();
        map.write(4090, &[7; 10]).unwrap();
        map.flush_lines(4090, 10).unwrap();
        let mut bytes = [0; 12];
        map.read(4089, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
        assert!(map.read(8181, &mut bytes).is_err() && map.write(u64::MAX, &[1]).is_err());
        assert!(map.flush_lines(8190, 3).is_err());
        let reader = SharedMap::new(&file, 8192, false).unwrap();
        reader.read(4090, &mut bytes[..2]).unwrap();
        assert_eq!(bytes[..2], [7, 7]);
        assert!(reader.write(4090, &[1]).is_err(), "what is mapped to be read is not written");
    }
}
