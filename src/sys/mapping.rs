//! Address space for guest memory: one reservation per guest RAM range, filled piece by piece.
//!
//! ```text
//!        reservation (PROT_NONE, 2 MiB aligned)
//!  ┌───────────────────────────────────────────────────────────┐
//!  │ anon │ file-private (layer 0)      │ anon │ file-private … │   pieces: mmap(MAP_FIXED) inside it
//!  └───────────────────────────────────────────────────────────┘
//!  gpa 0                                                  gpa len      one KVM memslot over all of it
//! ```
//!
//! Host and guest addresses agree modulo 2 MiB, so that KVM can use huge translations wherever the backing allows.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use crate::snapshot::HUGE_PAGE_SIZE;

const HUGE_PAGE: usize = HUGE_PAGE_SIZE as usize;

/// A stretch of address space that belongs to one guest RAM range. Unmapped on drop.
#[derive(Debug)]
pub struct Reservation {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the reservation is plain address space; the bytes behind it are guest memory, which every user accesses
// through volatile or raw operations because the guest changes it at any time.
unsafe impl Send for Reservation {}
// SAFETY: as above; `&self` methods never hand out Rust references to bytes while vCPUs may run (see `bytes`).
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves `len` bytes (page aligned, not zero) without committing memory to them.
    pub fn new(len: usize) -> io::Result<Self> {
        let padded = len.checked_add(HUGE_PAGE).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: a new private mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                padded,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start as usize;
        let base = start.next_multiple_of(HUGE_PAGE);
        unmap(start, base - start);
        unmap(base + len, start + padded - (base + len));
        let base = NonNull::new(base as *mut u8).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Reservation { base, len })
    }

    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts anonymous zero memory at `[offset, offset + len)`.
    pub fn map_anon(&self, offset: usize, len: usize) -> io::Result<()> {
        self.map_fixed(offset, len, libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0)
    }

    /// Puts a private (copy-on-write) mapping of `file` at `[offset, offset + len)`. The file has to be at least
    /// `file_offset + len` bytes long and must not shrink while it is mapped: a touch past its end is a SIGBUS.
    pub fn map_file_private(&self, offset: usize, len: usize, file: &File, file_offset: u64) -> io::Result<()> {
        let file_offset =
            libc::off_t::try_from(file_offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.map_fixed(offset, len, libc::MAP_NORESERVE, file.as_raw_fd(), file_offset)
    }

    /// Puts a shared mapping of the first `len` bytes of `file` at the start; writable if `writable`. Bytes between the
    /// file's end and the end of its last page are zeros; the file must not shrink while it is mapped.
    pub fn map_file_shared(&self, len: usize, file: &File, writable: bool) -> io::Result<()> {
        let access = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        self.check(0, len)?;
        // SAFETY: `[0, len)` was checked to lie inside this reservation, as in `map_fixed`.
        let address = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            libc::mmap(self.base.as_ptr().cast(), len, access, flags, file.as_raw_fd(), 0)
        };
        if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Puts a shared, read-only mapping of `file` at `[offset, offset + len)`: for files that cannot be mapped private
    /// (device DAX), or that the user wants mapped like those. See [`map_file_private`](Self::map_file_private) for the
    /// file's length.
    pub fn map_file_read_only(&self, offset: usize, len: usize, file: &File, file_offset: u64) -> io::Result<()> {
        let file_offset =
            libc::off_t::try_from(file_offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.check(offset, len)?;
        // SAFETY: as in `map_fixed`.
        let address = unsafe {
            let start = self.base.as_ptr().add(offset).cast();
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            libc::mmap(start, len, libc::PROT_READ, flags, file.as_raw_fd(), file_offset)
        };
        if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Replaces `[offset, offset + len)` (page aligned) by a local copy of itself that can be written. The copy is made
    /// at the same place of `stage`, which is anonymous memory of the same length, and then moved. A thread that reads
    /// the range meanwhile sees the old bytes or the new ones, which are the same, and waits for the move if it must.
    /// `stage` is empty afterwards. Neighbouring copies become one mapping, because the kernel takes them for parts of
    /// the one of `stage`.
    ///
    /// # Safety
    /// No thread writes the range meanwhile.
    pub unsafe fn copy_locally(&self, stage: &Reservation, offset: usize, len: usize) -> io::Result<()> {
        self.check(offset, len)?;
        stage.check(offset, len)?;
        // SAFETY: both ranges were checked to lie in their reservations, which do not overlap; the one that is read is
        // mapped readable and not written (the caller's promise), the other is anonymous memory that only this call
        // uses. mremap(2) then moves pages from one to the other and touches nothing else: with MREMAP_DONTUNMAP the
        // stage stays mapped.
        let moved = unsafe {
            let to = self.base.as_ptr().add(offset);
            let aside = stage.base.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(to.cast_const(), aside, len);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
            libc::mremap(aside.cast(), len, len, flags, to.cast::<libc::c_void>())
        };
        if moved == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn map_fixed(&self, offset: usize, len: usize, flags: i32, fd: i32, file_offset: libc::off_t) -> io::Result<()> {
        self.check(offset, len)?;
        // SAFETY: `[offset, offset + len)` was checked to lie inside this reservation, which this object owns, so
        // MAP_FIXED replaces only memory of the guest's own range.
        let address = unsafe {
            libc::mmap(
                self.base.as_ptr().add(offset).cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | flags,
                fd,
                file_offset,
            )
        };
        if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Asks for huge pages in `[offset, offset + len)`, if the host enables them on request.
    pub fn advise_huge(&self, offset: usize, len: usize) -> io::Result<()> {
        self.check(offset, len)?;
        self.advise(offset, len, libc::MADV_HUGEPAGE)
    }

    /// Forbids huge pages in `[offset, offset + len)`.
    pub fn advise_small(&self, offset: usize, len: usize) -> io::Result<()> {
        self.check(offset, len)?;
        match self.advise(offset, len, libc::MADV_NOHUGEPAGE) {
            // A kernel built without transparent huge pages.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }

    /// Gives the memory of `[offset, offset + len)` back to the host: anonymous memory then reads as zeros, a mapping
    /// of a file as the file.
    pub fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        self.check(offset, len)?;
        self.advise(offset, len, libc::MADV_DONTNEED)
    }

    /// Faults `[offset, offset + len)` in for reading (madvise(2), `MADV_POPULATE_READ`).
    pub fn populate_read(&self, offset: usize, len: usize) -> io::Result<()> {
        self.check(offset, len)?;
        self.advise(offset, len, libc::MADV_POPULATE_READ).map_err(unreadable)
    }

    /// A handle by which another thread can populate `[offset, offset + len)`.
    pub fn populator(&self, offset: usize, len: usize) -> io::Result<Populator> {
        self.check(offset, len)?;
        Ok(Populator { start: self.base.as_ptr() as usize + offset, len })
    }

    fn advise(&self, offset: usize, len: usize, advice: i32) -> io::Result<()> {
        // SAFETY: callers have checked that the range lies inside this reservation, and pass only advice that changes
        // no contents.
        let result = unsafe { libc::madvise(self.base.as_ptr().add(offset).cast(), len, advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// The bytes of `[offset, offset + len)`.
    ///
    /// # Safety
    /// No vCPU runs and nothing else writes this memory while the slice lives. For mapped files see
    /// [`map_file_private`](Self::map_file_private).
    pub unsafe fn bytes(&self, offset: usize, len: usize) -> io::Result<&[u8]> {
        self.check(offset, len)?;
        // SAFETY: in bounds and mapped readable (every part of a reservation is filled before it becomes guest
        // memory); not written for as long as the slice lives, by the caller's promise.
        Ok(unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(offset), len) })
    }

    /// The bytes of `[offset, offset + len)`, to be written.
    ///
    /// # Safety
    /// As [`bytes`](Self::bytes), and nothing else reads them either: only for memory that is being built.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn bytes_mut(&self, offset: usize, len: usize) -> io::Result<&mut [u8]> {
        self.check(offset, len)?;
        // SAFETY: in bounds, mapped writable and private; exclusive by the caller's promise.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(offset), len) })
    }

    fn check(&self, offset: usize, len: usize) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        }
    }
}

/// Memory of this process alone, aligned for reads past the page cache, in huge pages where there are any.
#[derive(Debug)]
pub struct Buffer(Reservation);

impl Buffer {
    /// A buffer of `len` bytes (not 0), all of them 0.
    pub fn new(len: usize) -> io::Result<Self> {
        let memory = Reservation::new(len)?;
        memory.map_anon(0, len)?;
        // Huge pages only make it faster.
        let _ = memory.advise_huge(0, len);
        Ok(Buffer(memory))
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: all of it is mapped readable, and written only through an exclusive borrow of this object.
        unsafe { std::slice::from_raw_parts(self.0.base(), self.0.len()) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: all of it is mapped writable and private, and borrowed exclusively with this object.
        unsafe { std::slice::from_raw_parts_mut(self.0.base(), self.0.len()) }
    }
}

/// A range of a reservation, to be populated and nothing else. Outliving the reservation does no harm: populating
/// changes no contents, and fails where nothing is mapped.
#[derive(Clone, Copy, Debug)]
pub struct Populator {
    start: usize,
    len: usize,
}

impl Populator {
    /// Host address of the first byte.
    pub fn address(self) -> usize {
        self.start
    }

    /// Its part `[offset, offset + len)`, cut at its end.
    pub fn part(self, offset: usize, len: usize) -> Populator {
        let offset = offset.min(self.len);
        Populator { start: self.start + offset, len: len.min(self.len - offset) }
    }

    /// Faults the range in for writing: breaks copy-on-write ahead of the guest (madvise(2), `MADV_POPULATE_WRITE`).
    pub fn populate_write(self) -> io::Result<()> {
        // SAFETY: MADV_POPULATE_WRITE changes no contents of whatever is mapped in the range, and fails on what is not.
        let result = unsafe { libc::madvise(self.start as *mut libc::c_void, self.len, libc::MADV_POPULATE_WRITE) };
        if result == 0 { Ok(()) } else { Err(unreadable(io::Error::last_os_error())) }
    }
}

/// Populating memory fails with EFAULT where a touch would be SIGBUS (madvise(2)): the mapped file was cut, or its disk
/// fails.
fn unreadable(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EFAULT) => io::Error::from_raw_os_error(libc::EIO),
        _ => error,
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        unmap(self.base.as_ptr() as usize, self.len);
    }
}

fn unmap(start: usize, len: usize) {
    if len != 0 {
        // SAFETY: callers pass only ranges of a mapping that this module made and that nothing else refers to any more.
        unsafe { libc::munmap(start as *mut libc::c_void, len) };
    }
}

/// The number of mappings of this process.
pub fn count_mappings() -> io::Result<usize> {
    let maps = io::BufReader::with_capacity(64 << 10, File::open("/proc/self/maps")?);
    io::BufRead::split(maps, b'\n').try_fold(0, |count, line| line.map(|_| count + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservation_is_huge_page_aligned_and_checks_bounds() {
        let reservation = Reservation::new(3 << 20).unwrap();
        assert_eq!(reservation.base() as usize % HUGE_PAGE, 0);
        reservation.map_anon(0, 3 << 20).unwrap();
        assert!(reservation.map_anon(2 << 20, 2 << 20).is_err());
        assert!(reservation.map_anon(usize::MAX, 4096).is_err());
        // SAFETY: no vCPU exists; the reservation is only used here.
        assert!(unsafe { reservation.bytes(0, 3 << 20) }.unwrap().iter().all(|&byte| byte == 0));
    }

    #[test]
    fn private_file_mapping_reads_the_file_and_keeps_writes_to_itself() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        std::os::unix::fs::FileExt::write_at(&file, b"page one", 4096).unwrap();
        let reservation = Reservation::new(8192).unwrap();
        reservation.map_anon(0, 4096).unwrap();
        reservation.map_file_private(4096, 4096, &file, 4096).unwrap();
        // SAFETY: no vCPU exists; the reservation is only used here.
        unsafe {
            assert_eq!(&reservation.bytes(4096, 8).unwrap(), b"page one");
            reservation.bytes_mut(4096, 4).unwrap().copy_from_slice(b"PAGE");
        }
        let mut back = [0; 8];
        std::os::unix::fs::FileExt::read_at(&file, &mut back, 4096).unwrap();
        assert_eq!(&back, b"page one");
    }
}
