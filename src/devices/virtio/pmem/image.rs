//! The file behind a pmem device.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::params::PmemParams;
use crate::devices::Error;

/// The largest image: far larger than any in use, far smaller than the address space.
const LEN_MAX: u64 = 1 << 40;

/// Facts that tell whether a file has changed: its length, and the time of its last write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    pub len: u64,
    /// Seconds and nanoseconds since the epoch.
    mtime: (i64, i64),
}

impl Facts {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Facts { len: metadata.len(), mtime: (metadata.mtime(), metadata.mtime_nsec()) })
    }
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    file: Arc<File>,
    /// The length when it was opened. The file must not shrink.
    len: u64,
}

impl Image {
    /// Opens and locks (flock(2)) the image of a device.
    pub fn open(params: &PmemParams) -> Result<Self, Error> {
        let PmemParams { id, path, read_only, .. } = params;
        let failed = |doing| move |source| Error::PmemFile { doing, id: id.clone(), path: path.clone(), source };
        // Without the flag, opening a FIFO would wait for its other end.
        let file = OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(failed("open"))?;
        let metadata = file.metadata().map_err(failed("ask about"))?;
        if !metadata.is_file() {
            return Err(unfit(params, "it is no file"));
        }
        let locked = if *read_only { file.try_lock_shared() } else { file.try_lock() };
        locked.map_err(|error| match error {
            TryLockError::WouldBlock if *read_only => unfit(params, "another process has locked it to write to it"),
            TryLockError::WouldBlock => {
                unfit(params, "another process has locked it: stop the other VM, use a copy, or make it read_only")
            }
            TryLockError::Error(source) => failed("lock")(source),
        })?;
        match metadata.len() {
            0 => Err(unfit(params, "it is empty")),
            len if len > LEN_MAX => Err(unfit(params, "it is larger than 1 TiB")),
            len => Ok(Image { file: Arc::new(file), len }),
        }
    }

    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn facts(&self) -> io::Result<Facts> {
        Facts::of(&self.file)
    }

    /// Refuses an image other than the guest of the snapshot knows.
    pub fn check(&self, params: &PmemParams, then: Facts, must_be_unchanged: bool) -> Result<(), Error> {
        let PmemParams { id, path, .. } = params;
        let failed = |source| Error::PmemFile { doing: "ask about", id: id.clone(), path: path.clone(), source };
        let now = self.facts().map_err(failed)?;
        if now.len != then.len {
            let what = format!("it has {} bytes, in the snapshot it had {}", now.len, then.len);
            return Err(unfit(params, what));
        }
        if must_be_unchanged && now.mtime != then.mtime {
            return Err(unfit(
                params,
                "it was written since the snapshot was taken, and the guest would see another content than it \
                 remembers; name it (or a copy of what it was) in drive_overrides to use it nevertheless",
            ));
        }
        Ok(())
    }
}

fn unfit(params: &PmemParams, what: impl Into<String>) -> Error {
    Error::Pmem { id: params.id.clone(), path: params.path.clone(), what: what.into() }
}
