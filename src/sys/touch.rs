//! Touching and filling memory of this process, for measurements.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::mapping::Reservation;

/// Reads (or writes) one byte at `offset` and every `step` bytes after it, below `offset + len`. All of it has to be
/// mapped, readable (and writable); nothing else may use the reservation meanwhile.
pub fn each(memory: &mut Reservation, offset: usize, len: usize, step: usize, write: bool) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= memory.len() && step > 0 => {}
        _ => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
    }
    for at in (offset..offset + len).step_by(step) {
        let byte = memory.base().wrapping_add(at);
        // SAFETY: in bounds of the reservation, as checked above, which is borrowed exclusively; volatile, because only
        // the access matters.
        unsafe { if write { byte.write_volatile(1) } else { _ = byte.read_volatile() } }
    }
    Ok(())
}

/// Fills `[offset, offset + len)` of anonymous memory from the start of `file`.
pub fn read_into(memory: &mut Reservation, offset: usize, len: usize, file: &File) -> io::Result<()> {
    // SAFETY: the reservation is borrowed exclusively, so nothing else refers to its bytes.
    let bytes = unsafe { memory.bytes_mut(offset, len) }?;
    file.read_exact_at(bytes, 0)
}
