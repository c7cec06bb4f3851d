//! Images that one VM alone writes to: copies of its function's image if it is booted, of those that its snapshot has if it
//! is restored. They go with the VM; what a daemon that was killed has left goes with `run/` at the next start.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SeekFrom};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::snapshot::{self, Location, Snapshot, copy_drive};

/// The drive that a function's image is.
pub(super) const ROOT_DRIVE: &str = "root";

/// A VM's own image of a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(super) struct OwnDrive {
    pub(super) drive_id: String,
    #[schema(value_type = String)]
    pub(super) path_on_host: PathBuf,
    /// Its length, bytes.
    pub(super) len: u64,
    /// How it was copied: `reflink` (blocks are shared until they are written), `copy_file_range`, or `read_write`.
    pub(super) method: String,
}

/// What a VM's images are copied from.
#[derive(Clone, Debug)]
pub(super) enum DriveSource {
    /// A function's image.
    Image(PathBuf),
    /// A snapshot's directory, which has copies.
    Snapshot(PathBuf),
}

/// A VM's own images. They are removed when this is dropped.
#[derive(Debug, Default)]
pub(super) struct OwnDrives {
    dir: Option<PathBuf>,
    drives: Vec<OwnDrive>,
}

impl OwnDrives {
    /// Copies what `source` has into a new directory. Blocks for the disk.
    pub(super) fn make(source: &DriveSource, dir: PathBuf) -> snapshot::Result<OwnDrives> {
        fs::create_dir(&dir).map_err(io_error("make", &dir))?;
        let mut own = OwnDrives { dir: Some(dir.clone()), drives: Vec::new() };
        match source {
            DriveSource::Image(path) => {
                let (image, len) = open_image(path).map_err(io_error("open image", path))?;
                own.copy(&dir, ROOT_DRIVE, &image, len)?;
            }
            DriveSource::Snapshot(path) => {
                let snapshot = Snapshot::open_without_memory(&Location::Dir(path.clone()))?;
                for copy in &snapshot.manifest().drives {
                    let Some((image, len)) = snapshot.open_drive_copy(&copy.drive_id)? else { continue };
                    own.copy(&dir, &copy.drive_id, &image, len)?;
                }
            }
        }
        Ok(own)
    }

    fn copy(&mut self, dir: &Path, id: &str, image: &File, len: u64) -> snapshot::Result<()> {
        let path = dir.join(format!("{id}.img"));
        let (_, method) = copy_drive(image, len, &path)?;
        let (drive_id, method) = (id.to_string(), method.name().to_string());
        self.drives.push(OwnDrive { drive_id, path_on_host: path, len, method });
        Ok(())
    }

    pub(super) fn all(&self) -> &[OwnDrive] {
        &self.drives
    }

    /// Where a VM's image of a drive is.
    pub(super) fn path(&self, id: &str) -> Option<&Path> {
        self.drives.iter().find(|drive| drive.drive_id == id).map(|drive| drive.path_on_host.as_path())
    }
}

impl Drop for OwnDrives {
    fn drop(&mut self) {
        let Some(dir) = self.dir.take() else { return };
        let remove = move || {
            if let Err(error) = fs::remove_dir_all(&dir) {
                tracing::warn!(%error, path = %dir.display(), "The images of a VM that is over cannot be removed");
            }
        };
        // Removing a large image takes its time; requests are not to wait for it.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> snapshot::Error {
    let path = path.to_owned();
    move |source| snapshot::Error::Io { action, path, source }
}

/// Opens an image, a file or a block device, and tells its length.
fn open_image(path: &Path) -> io::Result<(File, u64)> {
    // A FIFO would wait for a writer otherwise.
    let flags = OFlags::NONBLOCK.bits() as i32;
    let image = File::options().read(true).custom_flags(flags).open(path)?;
    let kind = image.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a file nor a block device"));
    }
    let len = rustix::fs::seek(&image, SeekFrom::End(0))?;
    Ok((image, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_copied_and_go_with_their_owner() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::write(&image, [7; 5000]).unwrap();
        let own = OwnDrives::make(&DriveSource::Image(image.clone()), dir.path().join("own")).unwrap();
        let path = own.path(ROOT_DRIVE).unwrap().to_owned();
        assert_eq!((fs::read(&path).unwrap(), own.all()[0].len), (vec![7; 5000], 5000));
        fs::write(&path, "x").unwrap();
        drop(own);
        assert!(!dir.path().join("own").exists());
        assert_eq!(fs::read(&image).unwrap(), [7; 5000]);
    }

    #[test]
    fn what_is_no_image_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        for bad in [fifo, dir.path().join("missing"), dir.path().to_owned()] {
            let own = dir.path().join("own");
            assert!(OwnDrives::make(&DriveSource::Image(bad.clone()), own.clone()).is_err(), "{}", bad.display());
            assert!(!own.exists());
        }
    }
}
