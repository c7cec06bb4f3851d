//! Writes the files of an encrypted snapshot, but for its memory, which is an object of a cold pool.

use std::path::Path;

use super::manifest::{MANIFEST_FILE, PAGES_FILE, STATE_FILE};
use super::reader::{PAGES_LIMIT, STATE_LIMIT};
use super::sealing::{SecretKey, seal_file};
use super::{Durability, Error, Location, Result, Snapshot, SnapshotKind, files};

/// Writes manifest, state and page map of `snapshot` into `dir`, the latter two encrypted with `key`. The manifest
/// stays readable: it has facts about the machine and the host, and no byte of the guest.
///
/// # Errors
/// [`Error::CannotEncrypt`] for a diff, the two-file form, and copies of drives; [`Error::Io`].
pub fn encrypt_files(snapshot: &Snapshot, key: &SecretKey, dir: &Path) -> Result<()> {
    let object = || snapshot.object().to_string();
    let cannot = |problem| Err(Error::CannotEncrypt { object: object(), problem });
    let Location::Dir(from) = snapshot.location() else {
        return cannot("it is of two files. Take it into a directory (`tvmm snapshot --out`)");
    };
    if snapshot.manifest().kind == SnapshotKind::Diff {
        return cannot("it is a diff. Merge it with its parents first (`tvmm snapshot merge`)");
    }
    if !snapshot.manifest().drives.is_empty() {
        return cannot("it has copies of drives, which are plain images. Take it without --copy-drives");
    }
    files::write_new(&dir.join(MANIFEST_FILE), &snapshot.manifest().to_json(snapshot.object())?, Durability::Synced)?;
    for (name, limit) in [(STATE_FILE, STATE_LIMIT), (PAGES_FILE, PAGES_LIMIT)] {
        let bytes = files::read_limited(&from.join(name), limit)?;
        let sealed = seal_file(key, snapshot.id(), name, bytes)?;
        files::write_new(&dir.join(name), &sealed, Durability::Synced)?;
    }
    Ok(())
}
