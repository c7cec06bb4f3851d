//! The medium of a pool: one stretch of bytes that survives its writers. `backends` makes the system calls.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

/// The properties of a medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// `dax`, `dir` or `numa`.
    pub kind: &'static str,
    /// Offset, address and length of a mapping are multiples of this, bytes.
    pub align: u64,
    /// True if the kernel copies pages of private mappings on write.
    pub copy_on_write: bool,
    /// True if its memory is in huge pages.
    pub huge: bool,
    /// True if read(2) works on its file.
    pub readable: bool,
    /// True if other hosts may read and write it: locks of this host's kernel do not keep them off.
    pub shared_between_hosts: bool,
}

/// Bytes that processes share. Each opener has its own handle: locks are per handle, and end with it.
pub trait Medium: Send + Sync + fmt::Debug {
    /// Its name in messages: the one the user gave.
    fn path(&self) -> &Path;

    fn facts(&self) -> Facts;

    /// Length in bytes.
    fn size(&self) -> u64;

    /// The file that is mapped for a guest.
    fn file(&self) -> &File;

    /// Fills `bytes` from `offset` on, including bytes that other hosts have flushed.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes `bytes` at `offset`. Need not be durable on return.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes all that was written in `[offset, offset + len)` durable and visible to other hosts before it returns.
    fn flush(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Gives the memory behind `[offset, offset + len)` back where the medium can. The caller no longer needs the
    /// bytes.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Takes the exclusive lock of one byte, which may lie past the end. `false`: another handle of this host has it.
    fn try_lock(&self, byte: u64) -> io::Result<bool>;

    /// True if this handle can change the medium, and so write leases.
    fn is_writable(&self) -> bool;

    /// Takes the shared lock of one byte. `false`: another handle of this host has it exclusively.
    fn try_lock_shared(&self, byte: u64) -> io::Result<bool>;

    /// A byte of `bytes` of which another handle of this host has a lock: any of those, not always the first.
    fn locked_in(&self, bytes: &Range<u64>) -> io::Result<Option<u64>>;

    /// Gives a lock back.
    fn unlock(&self, byte: u64) -> io::Result<()>;

    /// True if another handle of this host has the lock of one byte.
    fn is_locked(&self, byte: u64) -> io::Result<bool>;
}
