//! A clone's own copies of the drives that its snapshot contains.

use std::path::PathBuf;

use crate::config::overrides::Overrides;
use crate::snapshot::{Snapshot, copy_drive};
use crate::vmm::error::Error;
use crate::vmm::restore::StateError;

/// Copies made for a clone; removed again unless the restore succeeds.
#[derive(Default)]
pub struct PlacedDrives {
    made: Vec<PathBuf>,
}

impl PlacedDrives {
    /// Copies (by reflink where the file system has it) each drive that `tip` contains and for which `overrides` names
    /// no image. Returns overrides that name the copies.
    ///
    /// # Errors
    /// If the snapshot contains drives and the caller gave no directory for the clone's, or the other way round; if a
    /// copy cannot be made, for example because a file of its name exists.
    pub fn make(tip: &Snapshot, overrides: &Overrides) -> Result<(Self, Overrides), Error> {
        let mut placed = PlacedDrives::default();
        let mut overrides = overrides.clone();
        let named = |id: &String| overrides.drives.iter().any(|(named, _)| named == id);
        let copies = tip.manifest().drives.iter().map(|copy| &copy.drive_id);
        let wanted: Vec<String> = copies.filter(|id| !named(id)).cloned().collect();
        let dir = match (&overrides.drive_dir, wanted.is_empty()) {
            (None, true) => return Ok((placed, overrides)),
            (None, false) => return Err(StateError::DriveDirNeeded { ids: wanted.join(", ") }.into()),
            (Some(_), true) => return Err(StateError::DriveDirUseless.into()),
            (Some(dir), false) => dir.clone(),
        };
        for id in wanted {
            let Some((image, len)) = tip.open_drive_copy(&id)? else { continue };
            let path = dir.join(format!("{id}.img"));
            copy_drive(&image, len, &path)?;
            placed.made.push(path.clone());
            overrides.drives.push((id, path));
        }
        Ok((placed, overrides))
    }

    /// Called when the restore has succeeded: the copies stay.
    pub fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for PlacedDrives {
    fn drop(&mut self) {
        for path in &self.made {
            // Best effort: the earlier error is the one to report.
            let _ = std::fs::remove_file(path);
        }
    }
}
