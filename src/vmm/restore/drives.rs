//! A clone's own copies of the drives that its snapshot has taken along.

use std::path::PathBuf;

use crate::config::overrides::Overrides;
use crate::snapshot::{Snapshot, copy_drive};
use crate::vmm::error::Error;
use crate::vmm::restore::StateError;

/// Copies that were made for a clone; removed again unless the restore succeeds.
#[derive(Default)]
pub struct PlacedDrives {
    made: Vec<PathBuf>,
}

impl PlacedDrives {
    /// Makes a copy (a reflink where the file system has them) of each drive that `tip` has a copy of and `overrides`
    /// names no image for. Returns the overrides that lead to them.
    ///
    /// # Errors
    /// If the snapshot has copies and nobody said where the clone's are to be, or the other way round; if one cannot
    /// be made, for example because there is a file of its name.
    pub fn make(tip: &Snapshot, overrides: &Overrides) -> Result<(Self, Overrides), Error> {
        let (mut placed, mut overrides) = (PlacedDrives::default(), overrides.clone());
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

    /// The clone has them now.
    pub fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for PlacedDrives {
    fn drop(&mut self) {
        for path in &self.made {
            // Best effort: what went wrong before is what is told.
            let _ = std::fs::remove_file(path);
        }
    }
}
