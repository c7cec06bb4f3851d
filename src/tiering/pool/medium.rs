//! What a pool is kept on: one stretch of bytes that survives its writers. System calls are made in `vmm`.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

/// What can be done with the bytes of a medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// `dax`, `dir` or `numa`.
    pub kind: &'static str,
    /// What offset, address and length of a mapping are multiples of, bytes.
    pub align: u64,
    /// True if the kernel copies pages of private mappings on write.
    pub copy_on_write: bool,
    /// True if it is made of huge pages.
    pub huge: bool,
    /// True if read(2) works on it.
    pub readable: bool,
    /// True if other hosts may read and write it: locks of this host's kernel do not keep those off.
    pub shared_between_hosts: bool,
}

/// Bytes that processes share. Whoever opens one has its own handle: locks are per handle, and end with it.
pub trait Medium: Send + Sync + fmt::Debug {
    /// What it is called: as the user named it.
    fn path(&self) -> &Path;

    fn facts(&self) -> Facts;

    /// Length in bytes.
    fn size(&self) -> u64;

    /// What is mapped for a guest.
    fn file(&self) -> &File;

    /// Fills `bytes` from `offset` on, with what other hosts have flushed.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes `bytes` at `offset`. Not yet durable.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// All that was written in `[offset, offset + len)` is durable, and seen by other hosts, before this returns.
    fn flush(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Gives the memory behind `[offset, offset + len)` back where the medium can; the bytes are of no use any more.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Takes the lock of one byte (it need not exist). `false`: somebody else of this host has it.
    fn try_lock(&self, byte: u64) -> io::Result<bool>;

    /// True if this handle can change the medium, and so write leases.
    fn is_writable(&self) -> bool;

    /// Takes the lock of one byte together with others that do so. `false`: another handle of this host has it alone.
    fn try_lock_shared(&self, byte: u64) -> io::Result<bool>;

    /// A byte of `bytes` of which another handle of this host has a lock: one of those, not always the first.
    fn locked_in(&self, bytes: &Range<u64>) -> io::Result<Option<u64>>;

    /// Gives a lock back.
    fn unlock(&self, byte: u64) -> io::Result<()>;

    /// True if another handle of this host has the lock of one byte.
    fn is_locked(&self, byte: u64) -> io::Result<bool>;
}
