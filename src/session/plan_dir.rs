//! The directory of a snapshot's plans and working-set images: beside the snapshot, or, if this user may not write
//! there, in a cache directory of the user's own.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD};

use crate::session::Error;
use crate::snapshot::{Chain, Trust, create_private_dir};
use crate::sys::own_dir::check_owner;
use crate::tiering::costs::cache_home;

/// Root's directory for data that can be made again (Filesystem Hierarchy Standard 3.0, `/var/cache`).
const OF_ROOT: &str = "/var/cache/tvmm";

/// The directory for files derived from `chain`, unless it is the one beside the snapshot: a folder of `given`, or of
/// the cache directory if the one beside the snapshot cannot be written, or is not trusted. The folder is named after
/// the snapshot's id.
///
/// # Errors
/// A `given` directory that cannot be made, or that other users may write. The same of the cache directory, or none, if
/// the one beside the snapshot is not trusted.
pub fn choose(given: Option<&Path>, chain: &Chain) -> Result<Option<PathBuf>, Error> {
    let id = chain.tip().id().to_string();
    if let Some(dir) = given {
        return prepare(dir, &id).map(Some).map_err(|source| Error::PlanDir { path: dir.to_owned(), source });
    }
    if chain.trust() == Trust::Signatures {
        let dir = default_dir().ok_or(Error::NoPlanDir)?;
        return prepare(&dir, &id).map(Some).map_err(|source| Error::PlanDir { path: dir, source });
    }
    if is_writable(&chain.derived_dir()) {
        return Ok(None);
    }
    let Some(dir) = default_dir() else { return Ok(None) };
    // A plan need not be kept; an image must be made, and its error then names this place.
    let prepared = prepare(&dir, &id).inspect_err(
        |error| tracing::warn!(%error, dir = %dir.display(), "Plans cannot be kept in the cache directory"),
    );
    Ok(prepared.ok())
}

fn default_dir() -> Option<PathBuf> {
    let is_root = rustix::process::geteuid().is_root() && std::env::var_os("XDG_CACHE_HOME").is_none();
    if is_root { Some(PathBuf::from(OF_ROOT)) } else { cache_home() }.map(|dir| dir.join("plans"))
}

fn prepare(dir: &Path, id: &str) -> std::io::Result<PathBuf> {
    let folder = dir.join(id);
    create_private_dir(&folder)?;
    check_owner(dir)?;
    check_owner(&folder)?;
    Ok(folder)
}

/// Returns whether this process may make files in `dir`, or make `dir` itself.
fn is_writable(dir: &Path) -> bool {
    let may = |path: &Path| {
        let wanted = Access::WRITE_OK | Access::EXEC_OK;
        rustix::fs::accessat(CWD, path, wanted, AtFlags::EACCESS)
    };
    match may(dir) {
        Err(rustix::io::Errno::NOENT) => dir.parent().is_some_and(|parent| {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            may(parent).is_ok()
        }),
        result => result.is_ok(),
    }
}
