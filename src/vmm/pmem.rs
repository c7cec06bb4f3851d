//! Images that guests see as memory: mapped shared, each in a memslot of its own, above RAM.
//!
//! ```text
//!  RAM … │ 1 GiB aligned: image, 2 MiB aligned size │ 1 GiB aligned: next image …
//!            └ file, shared ┘└ anonymous zeros ┘
//! ```
//!
//! They are no part of guest RAM: not in its layout, its dirty log or its snapshots, and devices do not read or write
//! them. KVM's slots for RAM come first, so a slot's number says which RAM range it is.

use crate::devices::virtio::PmemImage;
use crate::memory;
use crate::snapshot::PAGE_SIZE;
use crate::sys::lost;
use crate::sys::lost::{MappedFile, Mapping, Watched};
use crate::sys::mapping::Reservation;

/// One mapped image.
#[derive(Debug)]
pub struct PmemMemory {
    memory: Reservation,
    /// Names the image if it is cut while it is mapped.
    _watched: Option<Watched>,
    pub gpa: u64,
    pub read_only: bool,
}

impl PmemMemory {
    /// Maps an image. The bytes behind its end are zeros (writes to them are lost with the VM).
    pub fn map(image: &PmemImage) -> Result<Self, memory::Error> {
        let failed = |source| memory::Error::Map { gpa: image.gpa, pages: image.size / PAGE_SIZE, source };
        let too_large = |_| failed(std::io::ErrorKind::OutOfMemory.into());
        let size = usize::try_from(image.size).map_err(too_large)?;
        let file_end = usize::try_from(image.len.next_multiple_of(PAGE_SIZE)).map_err(too_large)?;
        let memory = Reservation::new(size).map_err(failed)?;
        memory.map_file_shared(file_end, &image.file, !image.read_only).map_err(failed)?;
        if file_end < size {
            memory.map_anon(file_end, size - file_end).map_err(failed)?;
        }
        let mapping =
            Mapping { address: memory.base() as usize, len: file_end, file: 0, offset: 0, gpa: Some(image.gpa) };
        let file = MappedFile::unnamed(&image.file).map_err(failed)?;
        let _watched = lost::watch(vec![file], vec![mapping]);
        Ok(PmemMemory { memory, _watched, gpa: image.gpa, read_only: image.read_only })
    }

    pub fn base(&self) -> *mut u8 {
        self.memory.base()
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.memory.len() as u64
    }
}
