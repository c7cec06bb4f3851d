//! Drive images that only one VM writes: copies of its function's image if it is booted, or of the images in its
//! snapshot if it is restored. They are removed with the VM; images left by a killed daemon are removed with `run/` at
//! the next start.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::http::StatusCode;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, SeekFrom};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use utoipa::ToSchema;

use super::blocking::blocking;
use super::fault::Fault;
use super::store::gone_is_fine;
use crate::snapshot::{self, Location, Snapshot, copy_drive_while};

/// Starts whose images are copied at once. Fewer than the threads for disks, so that other work gets a thread.
const MAX_COPYING: usize = 4;

/// The drive id of a function's image.
pub(super) const ROOT_DRIVE: &str = "root";

/// A VM's own image of a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(super) struct OwnDrive {
    pub(super) drive_id: String,
    #[schema(value_type = String)]
    pub(super) path_on_host: PathBuf,
    /// Its length, bytes.
    pub(super) len: u64,
    /// The way it was copied: `reflink` (blocks are shared until they are written), `copy_file_range`, or `read_write`.
    pub(super) method: String,
}

/// The source of a VM's images.
#[derive(Clone, Debug)]
pub(super) enum DriveSource {
    /// A function's image.
    Image(PathBuf),
    /// A snapshot's directory, which contains copies.
    Snapshot(PathBuf),
}

/// A VM's own images. They are removed when this is dropped.
#[derive(Debug, Default)]
pub(super) struct OwnDrives {
    dir: Option<PathBuf>,
    drives: Vec<OwnDrive>,
}

/// Bounds the number of concurrent copies, and refuses those for a start that was given up.
#[derive(Debug)]
pub(super) struct Copies {
    /// Held by the thread that copies, for as long as it does, so that a slow disk gets no more work meanwhile.
    turns: Arc<Semaphore>,
    is_over: Arc<AtomicBool>,
}

impl Copies {
    pub(super) fn new() -> Copies {
        Copies { turns: Arc::new(Semaphore::new(MAX_COPYING)), is_over: Arc::default() }
    }

    /// Copies the images of `source` into a new directory. If this is dropped before it is done, the copy ends too.
    pub(super) async fn make(&self, source: DriveSource, dir: PathBuf) -> Result<snapshot::Result<OwnDrives>, Fault> {
        let stopping = |_| Fault::new(StatusCode::SERVICE_UNAVAILABLE, "The service is stopping.");
        let turn = self.turns.clone().acquire_owned().await.map_err(stopping)?;
        let wanted = Arc::new(());
        let waiting = Arc::downgrade(&wanted);
        let is_over = self.is_over.clone();
        let made = blocking(move || {
            let _turn = turn;
            OwnDrives::make(&source, dir, &|| waiting.strong_count() > 0 && !is_over.load(Ordering::Relaxed))
        });
        let made = made.await;
        drop(wanted);
        made
    }

    /// Ends all copies, and lets no new one begin.
    pub(super) fn stop(&self) {
        self.turns.close();
        self.is_over.store(true, Ordering::Relaxed);
    }
}

impl OwnDrives {
    /// Copies the images of `source` into a new directory while they are wanted. Blocks for the disk.
    fn make(source: &DriveSource, dir: PathBuf, is_wanted: &dyn Fn() -> bool) -> snapshot::Result<OwnDrives> {
        if !is_wanted() {
            return Err(io_error("make", &dir)(io::Error::other("it was given up")));
        }
        fs::create_dir(&dir).map_err(io_error("make", &dir))?;
        let mut own = OwnDrives { dir: Some(dir.clone()), drives: Vec::new() };
        match source {
            DriveSource::Image(path) => {
                let (image, len) = open_image(path).map_err(io_error("open image", path))?;
                own.copy(ROOT_DRIVE, &dir, &image, len, is_wanted)?;
            }
            DriveSource::Snapshot(path) => {
                let snapshot = Snapshot::open_without_memory(&Location::Dir(path.clone()))?;
                for copy in &snapshot.manifest().drives {
                    let Some((image, len)) = snapshot.open_drive_copy(&copy.drive_id)? else { continue };
                    own.copy(&copy.drive_id, &dir, &image, len, is_wanted)?;
                }
            }
        }
        Ok(own)
    }

    fn copy(
        &mut self,
        id: &str,
        dir: &Path,
        image: &File,
        len: u64,
        is_wanted: &dyn Fn() -> bool,
    ) -> snapshot::Result<()> {
        let path = dir.join(format!("{id}.img"));
        let (_, method) = copy_drive_while(image, len, &path, is_wanted)?;
        let drive_id = id.to_string();
        let method = method.name().to_string();
        self.drives.push(OwnDrive { drive_id, path_on_host: path, len, method });
        Ok(())
    }

    pub(super) fn all(&self) -> &[OwnDrive] {
        &self.drives
    }

    /// The path of a VM's image of a drive.
    pub(super) fn path(&self, id: &str) -> Option<&Path> {
        self.drives.iter().find(|drive| drive.drive_id == id).map(|drive| drive.path_on_host.as_path())
    }
}

impl Drop for OwnDrives {
    fn drop(&mut self) {
        if let Some(dir) = self.dir.take() {
            remove_images(dir);
        }
    }
}

/// Removes a directory of images that are no longer needed. A missing directory is no error: all of `run/` is removed
/// when the daemon ends.
pub(super) fn remove_images(dir: PathBuf) {
    let remove = move || {
        if let Err(error) = gone_is_fine(fs::remove_dir_all(&dir)) {
            tracing::warn!(%error, path = %dir.display(), "Cannot remove the images of a VM that has ended");
        }
    };
    // Removing a large image takes time, and requests must not wait for it.
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(remove)),
        Err(_) => remove(),
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> snapshot::Error {
    let path = path.to_owned();
    move |source| snapshot::Error::Io { action, path, source }
}

/// Opens an image, a file or a block device, and returns its length. The path is free of symbolic links: a link put
/// there since the path was checked is refused.
fn open_image(path: &Path) -> io::Result<(File, u64)> {
    // Without O_NONBLOCK the open of a FIFO would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let image = rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    let image = File::from(image);
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

    fn make(image: &Path, dir: PathBuf) -> snapshot::Result<OwnDrives> {
        OwnDrives::make(&DriveSource::Image(image.to_owned()), dir, &|| true)
    }

    #[test]
    fn copies_of_starts_that_were_given_up_are_not_made() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().max_blocking_threads(1).build();
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let own = dir.path().join("own");
        fs::write(&image, [7; 5000]).unwrap();
        let source = DriveSource::Image(image);
        runtime.unwrap().block_on(async {
            let copies = Copies::new();
            // The only thread for disks is busy, and the start does not wait for it.
            let (go_on, told) = std::sync::mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || told.recv());
            let making = copies.make(source.clone(), own.clone());
            assert!(tokio::time::timeout(std::time::Duration::from_millis(5), making).await.is_err());
            assert_eq!(copies.turns.available_permits(), MAX_COPYING - 1, "its turn ends with its thread's work");
            drop(go_on);
            busy.await.unwrap().unwrap_err();
            blocking(|| ()).await.unwrap();
            assert_eq!((own.exists(), copies.turns.available_permits()), (false, MAX_COPYING));

            let made = copies.make(source.clone(), own.clone()).await.unwrap().unwrap();
            assert!(made.path(ROOT_DRIVE).unwrap().exists());
            copies.stop();
            let fault = copies.make(source, dir.path().join("other")).await.unwrap_err();
            assert_eq!(fault.status, StatusCode::SERVICE_UNAVAILABLE);
        });
    }

    #[test]
    fn images_are_copied_and_go_with_their_owner() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::write(&image, [7; 5000]).unwrap();
        let own = make(&image, dir.path().join("own")).unwrap();
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
        let link = dir.path().join("link");
        fs::write(dir.path().join("image"), "x").unwrap();
        std::os::unix::fs::symlink(dir.path().join("image"), &link).unwrap();
        for bad in [fifo, link, dir.path().join("missing"), dir.path().to_owned()] {
            let own = dir.path().join("own");
            assert!(make(&bad, own.clone()).is_err(), "{}", bad.display());
            assert!(!own.exists());
        }
    }
}
