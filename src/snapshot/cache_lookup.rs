//! The facts about the host's page cache that plans depend on.

use std::fs::File;
use std::io;

/// Tells how much of a file the host's page cache holds, and in which form. The system calls are left to `sys`.
pub trait CacheLookup {
    /// Returns the number of cached pages; `None` where the kernel does not count them.
    fn resident_pages(&self, file: &File) -> io::Result<Option<u64>>;

    /// Returns whether the file is cached in folios of 2 MiB; `None` if no block of the file tells.
    fn is_in_huge_folios(&self, file: &File) -> io::Result<Option<bool>>;

    /// Returns the read-ahead window of the file's device, in pages; `None` if the kernel does not tell.
    fn readahead_pages(&self, file: &File) -> Option<u64>;
}
