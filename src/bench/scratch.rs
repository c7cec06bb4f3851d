//! A directory for the files of a measurement.

use std::path::{Path, PathBuf};

use crate::sys::errors::BoxError;

/// A directory that is removed at the end.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    /// Makes a directory in `parent`, or in the directory for temporary files.
    pub(super) fn new(parent: Option<&Path>) -> Result<Self, BoxError> {
        let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
        Scratch::make(parent.join(format!("tvmm-bench-{}", std::process::id())))
    }

    /// Makes the directory `path`.
    pub(super) fn make(path: PathBuf) -> Result<Self, BoxError> {
        std::fs::create_dir(&path).map_err(|error| format!("Cannot make {}: {error}", path.display()))?;
        Ok(Scratch(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: files left in a temporary directory do no harm.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
