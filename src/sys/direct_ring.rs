//! Reads past the page cache, many at once: O_DIRECT through an io_uring with registered buffers (io_uring(7)).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};

use super::mapping::Buffer;

/// Offset, length and address of a direct read are multiples of this: enough for devices with blocks of up to 4 KiB.
const ALIGN: u64 = 4096;

/// A ring for one file.
pub struct DirectRing {
    /// Declared before the memory it reads into: dropped first.
    ring: IoUring,
    memory: Buffer,
    file: File,
    /// Bytes of one buffer.
    slot: usize,
    depth: usize,
    in_flight: usize,
}

impl DirectRing {
    /// A ring for reads of up to `longest` bytes from `file`, which was opened with O_DIRECT, `depth` of them at once.
    ///
    /// # Errors
    /// The host does not permit io_uring, or so much locked memory (ENOMEM).
    pub fn new(file: File, longest: usize, depth: usize) -> io::Result<Self> {
        let depth = depth.clamp(1, 256);
        // A read may begin and end within a block.
        let slot = (longest as u64 + ALIGN).next_multiple_of(ALIGN) as usize;
        let ring = IoUring::new(depth as u32)?;
        let mut memory = Buffer::new(slot * depth)?;
        let base = memory.bytes_mut().as_mut_ptr();
        let iovecs: Vec<libc::iovec> = (0..depth)
            .map(|number| libc::iovec { iov_base: base.wrapping_add(number * slot).cast(), iov_len: slot })
            .collect();
        // SAFETY: the buffers lie within `memory`, which lives as long as the ring; the kernel keeps their pages.
        unsafe { ring.submitter().register_buffers(&iovecs) }?;
        Ok(DirectRing { ring, memory, file, slot, depth, in_flight: 0 })
    }

    /// The number of reads it makes at once.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Reads the ranges `wanted` and gives them to `each` in their order, while the next are being read. Returns early
    /// when `each` returns `false`.
    ///
    /// # Errors
    /// A range longer than the ring was made for; errors of the kernel; [`io::ErrorKind::UnexpectedEof`] behind the
    /// file's end.
    pub fn read(&mut self, wanted: &[Range<u64>], each: &mut dyn FnMut(usize, &[u8]) -> bool) -> io::Result<()> {
        let result = self.read_in_order(wanted, each);
        // No read may be under way when the buffers are used again.
        let mut drained = Ok(());
        while self.in_flight > 0 && drained.is_ok() {
            drained = self.wait(&mut |_, _| {});
        }
        result.and(drained)
    }

    fn read_in_order(&mut self, wanted: &[Range<u64>], each: &mut dyn FnMut(usize, &[u8]) -> bool) -> io::Result<()> {
        let mut results: Vec<Option<i32>> = vec![None; self.depth];
        let mut sent = 0;
        let depth = self.depth;
        for (at, range) in wanted.iter().enumerate() {
            while sent < wanted.len() && sent < at + depth {
                self.start(sent % depth, &wanted[sent])?;
                sent += 1;
            }
            while results[at % depth].is_none() {
                self.wait(&mut |slot, result| results[slot] = Some(result))?;
            }
            let read = match results[at % depth].take() {
                Some(error) if error < 0 => return Err(io::Error::from_raw_os_error(-error)),
                read => read.unwrap_or(0) as u64,
            };
            let skipped = range.start % ALIGN;
            let len = range.end - range.start;
            if read < skipped + len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let start = (at % depth) * self.slot + skipped as usize;
            if !each(at, &self.memory.bytes()[start..start + len as usize]) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn start(&mut self, slot: usize, range: &Range<u64>) -> io::Result<()> {
        let offset = range.start / ALIGN * ALIGN;
        let len = (range.end - offset).next_multiple_of(ALIGN);
        if len > self.slot as u64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let address = self.memory.bytes_mut()[slot * self.slot..].as_mut_ptr();
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = opcode::ReadFixed::new(fd, address, len as u32, slot as u16).offset(offset).build();
        // SAFETY: the kernel writes to this slot of the registered buffers. This process reads the slot only after the
        // kernel has reported the end of the read, and the slot outlives the read (`read` waits for all of them, and so
        // does dropping the ring).
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(slot as u64)) };
        pushed.map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
        self.in_flight += 1;
        Ok(())
    }

    /// Submits the started reads, waits until one is done, and gives slots and results to `done`.
    fn wait(&mut self, done: &mut dyn FnMut(usize, i32)) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result?,
        };
        for entry in self.ring.completion() {
            self.in_flight -= 1;
            done(entry.user_data() as usize, entry.result());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    /// A file of 3 MiB and some bytes, opened past the page cache; `None` if its file system cannot do that.
    fn direct() -> Option<(Vec<u8>, File, tempfile::NamedTempFile)> {
        let bytes: Vec<u8> = (0..3_150_001_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&bytes).unwrap();
        file.as_file().sync_all().unwrap();
        match File::options().read(true).custom_flags(libc::O_DIRECT).open(file.path()) {
            Ok(direct) => Some((bytes, direct, file)),
            Err(error) => {
                crate::skip::skip!("direct-io", "the file system cannot be read past the page cache: {error}");
                None
            }
        }
    }

    #[test]
    fn ranges_of_any_alignment_come_in_order() {
        let Some((bytes, file, _path)) = direct() else { return };
        let ranges: Vec<Range<u64>> = (0..40_u64).map(|n| n * 78_001..n * 78_001 + 1 + n * 1_700).collect();
        for depth in [1, 3, 64] {
            let mut ring = DirectRing::new(file.try_clone().unwrap(), 70_000, depth).unwrap();
            let mut seen = 0;
            let each = &mut |at: usize, got: &[u8]| {
                assert_eq!(at, seen);
                assert!(got == &bytes[ranges[at].start as usize..ranges[at].end as usize], "range {at}");
                seen += 1;
                true
            };
            ring.read(&ranges, each).unwrap();
            assert_eq!(seen, ranges.len());
            // Ending early leaves nothing behind.
            ring.read(&ranges, &mut |at, _| at < 4).unwrap();
            ring.read(&ranges[9..10], &mut |_, got| got[0] == bytes[ranges[9].start as usize]).unwrap();
        }
    }

    #[test]
    fn ranges_behind_the_end_and_too_long_ones_are_errors() {
        let Some((bytes, file, _path)) = direct() else { return };
        let len = bytes.len() as u64;
        let mut ring = DirectRing::new(file, 10_000, 2).unwrap();
        let mut read = |range: Range<u64>| ring.read(&[range], &mut |_, _| true).map_err(|error| error.kind());
        assert_eq!(read(len - 10..len), Ok(()));
        assert_eq!(read(len - 10..len + 1), Err(io::ErrorKind::UnexpectedEof));
        assert_eq!(read(0..20_000), Err(io::ErrorKind::InvalidInput));
        assert_eq!(read(5..6), Ok(()));
    }
}
