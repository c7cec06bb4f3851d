//! Copies of drives that a snapshot has taken along: `drive-<id>` in its directory. Plain images, without checksums.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};

use super::{Error, Result, files};

/// Bytes copied at once.
const PIECE: usize = 1 << 20;

/// A copy, as the manifest names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveCopy {
    /// The drive's id.
    pub drive_id: String,
    /// Its length in bytes.
    pub len: u64,
}

impl DriveCopy {
    /// The name of the file. The id must be one that a drive can have.
    pub(crate) fn file_name(&self) -> String {
        format!("drive-{}", self.drive_id)
    }

    /// True if the id can be part of a file name.
    pub(crate) fn is_valid(&self) -> bool {
        let id = &self.drive_id;
        !id.is_empty() && id.len() <= 128 && id.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
    }
}

/// The method by which a copy was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMethod {
    /// Both files share their blocks until one of them is written (FICLONE).
    Reflink,
    /// The kernel copied (copy_file_range).
    InKernel,
    /// Read and written.
    ReadWrite,
}

impl CopyMethod {
    /// All methods.
    pub const ALL: [CopyMethod; 3] = [CopyMethod::Reflink, CopyMethod::InKernel, CopyMethod::ReadWrite];

    /// The method's name in messages and counters.
    pub fn name(self) -> &'static str {
        match self {
            CopyMethod::Reflink => "reflink",
            CopyMethod::InKernel => "copy_file_range",
            CopyMethod::ReadWrite => "read_write",
        }
    }
}

/// Copies the first `len` bytes of a file or block device to a new file: as a reflink where the file system has them,
/// else holes stay holes. Not synced.
///
/// # Errors
/// [`Error::Io`], also if `to` exists; an unfinished copy is removed.
pub fn copy_drive(from: &File, len: u64, to: &Path) -> Result<(File, CopyMethod)> {
    copy_drive_while(from, len, to, &|| true)
}

/// As [`copy_drive`], but stops when `is_wanted` says false; it is asked before each MiB.
///
/// # Errors
/// As [`copy_drive`]; also when the copy is not wanted any more.
pub fn copy_drive_while(from: &File, len: u64, to: &Path, is_wanted: &dyn Fn() -> bool) -> Result<(File, CopyMethod)> {
    let target = files::create_new(to)?;
    let copied = match rustix::fs::ioctl_ficlone(&target, from) {
        Ok(()) => Ok(CopyMethod::Reflink),
        // Another file system, or one that has no reflinks.
        Err(_) => copy_data(from, len, &target, is_wanted),
    };
    match copied.and_then(|method| target.set_len(len).map(|()| method)) {
        Ok(method) => Ok((target, method)),
        Err(error) => {
            // Best effort: only the first error matters.
            let _ = std::fs::remove_file(to);
            Err(Error::io("copy a drive to", to)(error))
        }
    }
}

fn copy_data(from: &File, len: u64, to: &File, is_wanted: &dyn Fn() -> bool) -> io::Result<CopyMethod> {
    let mut buffer = Vec::new();
    let mut at = 0;
    let mut method = CopyMethod::InKernel;
    while at < len {
        // Without knowledge of holes (block devices, some file systems), everything is data.
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Err(rustix::io::Errno::NXIO) => return Ok(method),
            data => data.unwrap_or(at),
        };
        let hole = rustix::fs::seek(from, SeekFrom::Hole(data)).unwrap_or(len).min(len);
        at = data;
        while at < hole {
            if !is_wanted() {
                return Err(io::Error::other("it was given up"));
            }
            let len = usize::try_from(hole - at).unwrap_or(PIECE).min(PIECE);
            if method == CopyMethod::InKernel {
                match copy_in_kernel(from, to, at, len)? {
                    0 => method = CopyMethod::ReadWrite,
                    copied => at += copied as u64,
                }
                continue;
            }
            buffer.resize(PIECE, 0);
            from.read_exact_at(&mut buffer[..len], at)?;
            to.write_all_at(&buffer[..len], at)?;
            at += len as u64;
        }
        // A concurrent writer of the file could make both answers the same.
        at = at.max(hole);
    }
    Ok(method)
}

/// The number of bytes the kernel has copied; none if it cannot between these files (two file systems, a block device).
fn copy_in_kernel(from: &File, to: &File, at: u64, len: usize) -> io::Result<usize> {
    use rustix::io::Errno;
    let mut read_at = at;
    let mut write_at = at;
    match rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), len) {
        Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(0),
        copied => Ok(copied?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_drive_keeps_bytes_holes_and_length() {
        let dir = tempfile::tempdir().unwrap();
        let from = files::create_new(&dir.path().join("from")).unwrap();
        from.write_all_at(&[7; 5000], 0).unwrap();
        from.write_all_at(&[9; 3], (5 << 20) + 1).unwrap();
        from.set_len(8 << 20).unwrap();
        let to = dir.path().join("to");
        let (_, method) = copy_drive(&from, 8 << 20, &to).unwrap();
        assert!(CopyMethod::ALL.contains(&method));
        assert_eq!(std::fs::read(&to).unwrap(), std::fs::read(dir.path().join("from")).unwrap());
        use std::os::unix::fs::MetadataExt;
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20, "holes stay holes");
        assert!(copy_drive(&from, 1, &to).is_err(), "never over something");
        assert_eq!(std::fs::metadata(&to).unwrap().len(), 8 << 20);
    }

    #[test]
    fn copy_drive_that_fails_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let from = files::create_new(&dir.path().join("from")).unwrap();
        from.write_all_at(&[7; 5000], 0).unwrap();
        let write_only = std::fs::OpenOptions::new().write(true).open(dir.path().join("from")).unwrap();
        assert!(copy_data(&write_only, 5000, &from, &|| true).is_err());
        let missing = dir.path().join("missing/to");
        assert!(copy_drive(&from, 5000, &missing).is_err() && !missing.exists());
    }

    #[test]
    fn cancelled_copy_stops_at_the_next_piece() {
        let dir = tempfile::tempdir().unwrap();
        let from = files::create_new(&dir.path().join("from")).unwrap();
        from.write_all_at(&vec![7; 4 * PIECE], 0).unwrap();
        let to = files::create_new(&dir.path().join("to")).unwrap();
        let asked = std::cell::Cell::new(0);
        let is_wanted = || asked.replace(asked.get() + 1) < 2;
        let error = copy_data(&from, 4 * PIECE as u64, &to, &is_wanted).unwrap_err();
        assert_eq!((error.to_string().as_str(), asked.get()), ("it was given up", 3));
        assert!(to.metadata().unwrap().len() <= 2 * PIECE as u64);
    }

    #[test]
    fn ids_that_are_no_file_names_are_not_valid() {
        let valid = |id: &str| DriveCopy { drive_id: id.into(), len: 1 }.is_valid();
        assert!(valid("rootfs") && valid("a.b_c-1"));
        assert!(!valid("") && !valid("a/b") && !valid("../x") && !valid("a\0") && !valid(&"x".repeat(129)));
    }
}
