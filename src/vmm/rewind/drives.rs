//! Fresh copies of a machine's own drives. They are made while the guest may still run on the used ones, so that a
//! failure (a full disk) leaves the machine as it is.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::snapshot::copy_drive;
use crate::vmm::error::Error;
use crate::vmm::origin::Origin;

/// A copy, and its place.
#[derive(Debug)]
struct Fresh {
    copy: PathBuf,
    place: PathBuf,
}

/// The copies that a rewind puts in the places of the used drives. Dropping them removes those that are not placed.
#[derive(Debug)]
pub struct FreshDrives {
    fresh: Vec<Fresh>,
    /// Time for copying.
    pub(super) took: Duration,
}

impl FreshDrives {
    /// Puts the copies in the places of the used drives.
    pub(super) fn place(mut self) -> Result<(), Error> {
        while let Some(Fresh { copy, place }) = self.fresh.last() {
            let failed = |source| Error::File { doing: "replace the drive", path: place.clone(), source };
            std::fs::rename(copy, place).map_err(failed)?;
            self.fresh.pop();
        }
        Ok(())
    }
}

impl Drop for FreshDrives {
    fn drop(&mut self) {
        // Best effort: the error is told that keeps them from their places.
        self.fresh.iter().for_each(|fresh| drop(std::fs::remove_file(&fresh.copy)));
    }
}

impl Origin {
    /// Copies the machine's own drives from its snapshot again.
    pub(super) fn copy_drives(&self) -> Result<FreshDrives, Error> {
        let start = Instant::now();
        let tip = self.files.chain().tip();
        let mut drives = FreshDrives { fresh: Vec::new(), took: Duration::ZERO };
        for drive in &self.placed_drives {
            let Some((image, len)) = tip.open_drive_copy(&drive.id).map_err(Error::RewindDrives)? else { continue };
            let copy = drive.path.with_extension("img.rewound");
            // A copy left by a process that was killed.
            let _ = std::fs::remove_file(&copy);
            copy_drive(&image, len, &copy).map_err(Error::RewindDrives)?;
            drives.fresh.push(Fresh { copy, place: drive.path.clone() });
        }
        drives.took = start.elapsed();
        Ok(drives)
    }
}
