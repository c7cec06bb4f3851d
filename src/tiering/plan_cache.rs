//! The folder beside a snapshot that caches files made for its restores: plans, and the images that plans read.
//!
//! `<policy>-<mark of the profile>-<key>.plan` is a plan, and the key covers everything else that it depends on.
//! `<digest>.image` is an image. Each may be deleted at any time and is made again when a restore needs it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use super::plan_file::PlanFile;
use super::policy::Policy;
use crate::snapshot::{SnapshotId, image_name};

/// Hexadecimal digits of a mark and of a key.
const DIGITS: usize = 16;

/// The part that the names of all plans made from a profile share; for plans made from none, the mark of no bytes.
pub fn profile_mark(profile: &[u8]) -> String {
    blake3::hash(profile).to_hex()[..DIGITS].to_string()
}

/// The name of the plan of `policy` for a snapshot. `others` lists all its inputs besides the snapshot and the profile.
pub fn plan_name(snapshot: SnapshotId, policy: Policy, profile: &[u8], others: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&snapshot.0);
    hasher.update(profile);
    hasher.update(format!("{others} {}", env!("CARGO_PKG_VERSION")).as_bytes());
    let key = &hasher.finalize().to_hex()[..DIGITS];
    format!("{policy}-{}-{key}.plan", profile_mark(profile))
}

/// Removes the plans in `dir` that were made from no profile of `marks`, and the images that neither a remaining plan
/// nor `images` names. Returns the bytes freed.
pub fn remove_unneeded(dir: &Path, marks: &BTreeSet<String>, images: &BTreeSet<String>) -> u64 {
    let mut freed = 0;
    let mut needed = images.clone();
    let plans = files_of(dir, "plan");
    for path in plans {
        let file = is_marked(&path, marks).then(|| PlanFile::load(&path).ok()).flatten();
        match file {
            Some(file) => needed.extend(file.plan.images.iter().map(|spec| image_name(file.plan.snapshot, spec))),
            None => freed += remove(&path),
        }
    }
    let is_needed = |path: &PathBuf| path.file_name().and_then(OsStr::to_str).is_some_and(|name| needed.contains(name));
    let unneeded = files_of(dir, "image").into_iter().filter(|path| !is_needed(path));
    unneeded.fold(freed, |freed, path| freed + remove(&path))
}

/// True if the name of a plan has one of the marks. Names of versions before 0.2 have none.
fn is_marked(path: &Path, marks: &BTreeSet<String>) -> bool {
    let stem = path.file_stem().and_then(OsStr::to_str).unwrap_or_default();
    stem.rsplit('-').nth(1).is_some_and(|mark| marks.contains(mark))
}

fn files_of(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let paths = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
}

/// Returns the bytes freed. A file that cannot be removed stays until the next call: it is only a cache.
fn remove(path: &Path) -> u64 {
    let len = fs::symlink_metadata(path).map_or(0, |metadata| metadata.len());
    fs::remove_file(path).map_or(0, |()| len)
}
