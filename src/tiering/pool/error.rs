//! The errors of a pool.

use std::io;
use std::path::{Path, PathBuf};

use crate::snapshot::PAGE_SIZE;

/// Each names the pool, and the remedy if there is one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Cannot {doing} pool {path}", path = path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} is not a pool; make one with `tvmm pool create --at {path}`", path = path.display())]
    NotAPool { path: PathBuf },
    #[error(
        "tvmm has not formatted {path}, and what is on it would be lost; to format it, say so by its name: --format \
         {name}",
        path = path.display()
    )]
    Foreign { path: PathBuf, name: String },
    #[error(
        "{path} is already a pool with {snapshots} snapshots; to format it again, say so by its name: --format {name}",
        path = path.display()
    )]
    Exists { path: PathBuf, name: String, snapshots: usize },
    #[error("{path} is {have} bytes long, the smallest pool is {need}", path = path.display())]
    TooSmall { path: PathBuf, have: u64, need: u64 },
    #[error(
        "Pool {path} has format {version}, this build reads {known}; use the version of tvmm that made it",
        path = path.display()
    )]
    Newer { path: PathBuf, version: u32, known: u32 },
    #[error("Pool {path} is damaged: {problem}", path = path.display())]
    Damaged { path: PathBuf, problem: String },
    #[error("Pool {path} is being changed by {who}; try again when that is done", path = path.display())]
    Busy { path: PathBuf, who: String },
    #[error(
        "Pool {path} is full: {what} takes {need_mib:.1} MiB more, {free_mib:.1} MiB are free; nothing was added. \
         Remove snapshots (`tvmm pool rm`, then `tvmm pool gc`), or make a larger pool",
        path = path.display(), need_mib = mib(*need_pages), free_mib = mib(*free_pages)
    )]
    Full { path: PathBuf, what: String, need_pages: u64, free_pages: u64 },
    #[error(
        "The catalogue of pool {path} is full: {need} bytes more do not fit; nothing was changed. Make a larger pool",
        path = path.display()
    )]
    CatalogueFull { path: PathBuf, need: u64 },
    #[error(
        "Pool {path} has no snapshot {what}; `tvmm pool ls {path}` lists those it has, `tvmm pool add` adds one",
        path = path.display()
    )]
    NoSnapshot { path: PathBuf, what: String },
    #[error("{count} snapshots in pool {path} are called {what}; give more of the id", path = path.display())]
    Ambiguous { path: PathBuf, what: String, count: usize },
    #[error("Pool {path} has snapshot {what} already", path = path.display())]
    Known { path: PathBuf, what: String },
    #[error(
        "All {slots} leases of pool {path} are taken: as many VMs run from it, or ran on hosts that are gone, whose \
         leases `tvmm pool gc {path}` ends",
        path = path.display()
    )]
    NoLease { path: PathBuf, slots: u64 },
    #[error(
        "Cannot take a lease of pool {path}: other hosts share it and see only leases that are written, and this user \
         may only read it. Give the user write access to it, or restore from a pool in a directory, which is enough \
         to read",
        path = path.display()
    )]
    ReadOnly { path: PathBuf },
    #[error(
        "The VM's lease of pool {path} was ended by another host, which has not heard of this one for too long (`tvmm \
         pool gc --lease-expiry`), made the pool anew, or took the same lease at the same moment: its memory may be \
         another's",
        path = path.display()
    )]
    LeaseLost { path: PathBuf },
    #[error(
        "{vms} VMs run from pool {path}, and would lose their memory; end them first. Those of hosts that are gone \
         end with `tvmm pool gc {path} --lease-expiry 0`",
        path = path.display()
    )]
    InUse { path: PathBuf, vms: usize },
    #[error(
        "Pool {path} was taken over by {who} while this process changed it: nothing was published",
        path = path.display()
    )]
    Ousted { path: PathBuf, who: String },
    #[error(
        "This process, or its host, stood still while it changed pool {path}: others may have taken over, and what it \
         did may be lost or half done. Look with `tvmm pool fsck {path}` and `tvmm pool ls {path}`, and try again",
        path = path.display()
    )]
    StoodStill { path: PathBuf },
    #[error("The profile was recorded on snapshot {made_for}, not on {given}")]
    ProfileOfOther { made_for: String, given: String },
}

fn mib(pages: u64) -> f64 {
    (pages * PAGE_SIZE) as f64 / f64::from(1 << 20)
}

impl Error {
    pub fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
        let path = path.to_path_buf();
        move |source| Error::Io { doing, path, source }
    }

    pub fn damaged(path: &Path, problem: impl Into<String>) -> Error {
        Error::Damaged { path: path.to_path_buf(), problem: problem.into() }
    }
}
