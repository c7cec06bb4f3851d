//! The initial RAM disk: placed as high in low memory as the kernel can reach.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use super::super::error::Error;
use super::image::Image;
use crate::memory::guest_ram::GuestRam;
use crate::snapshot::PAGE_SIZE;
use crate::vmm::boot::BootError;

/// The place of an initrd in guest memory. Address and size fit the 32 bits of the boot protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    pub gpa: u32,
    pub len: u32,
}

impl Initrd {
    /// Reads `path` into memory that `kernel` can reach.
    pub fn load(path: &Path, kernel: &Image, ram: &GuestRam) -> Result<Self, Error> {
        let failed = |source| Error::File { doing: "read the initrd", path: path.to_owned(), source };
        let unusable = |what| BootError::Initrd { path: path.to_owned(), what };
        // A FIFO is refused; the open does not wait for a writer.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let mut file = opened.map_err(failed)?;
        let facts = file.metadata().map_err(failed)?;
        if !facts.is_file() {
            return Err(unusable("it is not a regular file".into()).into());
        }
        let len = facts.len();
        if len == 0 {
            return Err(unusable("it is empty".into()).into());
        }
        let top = ram.low_end().min(kernel.initrd_max + 1);
        let room = top.saturating_sub(kernel.end.next_multiple_of(PAGE_SIZE));
        let gpa = top.saturating_sub(len) / PAGE_SIZE * PAGE_SIZE;
        if len > room || gpa < kernel.end {
            return Err(BootError::InitrdTooLarge { path: path.to_owned(), len, room }.into());
        }
        // Below `low_end`, so it fits a `usize` and the 32 bits of the boot protocols.
        let read = ram.view().read_exact_volatile_from(GuestAddress(gpa), &mut file, len as usize);
        read.map_err(|_| unusable("it changed while it was read".into()))?;
        Ok(Initrd { gpa: gpa as u32, len: len as u32 })
    }
}
