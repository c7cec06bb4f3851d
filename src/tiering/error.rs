//! Errors of profiles, costs, plans, and of the pools that plans take pages from.

use std::path::PathBuf;

use super::cold::ChunkError;
use super::pool::Error as PoolError;
use crate::snapshot::{self, PoolId, SnapshotId};

/// The one error of the room `tiering`, apart from those of pools and cold pools, which it contains.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("There is no recorder {name:?}; there are: {known}")]
    UnknownRecorder { name: String, known: String },
    #[error("Profiles cannot be merged by {name:?}, only by: {known}")]
    UnknownMerge { name: String, known: String },
    #[error("The profile was recorded on snapshot {made_for} and is of no use for snapshot {given}")]
    ProfileOfOther { made_for: SnapshotId, given: SnapshotId },
    #[error("{object} is not a valid profile: {problem}")]
    Profile { object: String, problem: String },
    #[error(
        "Policy {policy} needs a profile: record one with `tvmm profile record --snapshot DIR --recorder uffd --run \
         FUNCTION --out FILE`, and give it with --profile FILE"
    )]
    NeedsProfile { policy: &'static str },
    #[error(
        "A budget of {pages} pages ({mib:.1} MiB) of local memory is too small: the request writes {least} pages, so \
         the least that works is {least_mib} MiB",
        mib = *pages as f64 / 256.0, least_mib = least.div_ceil(256)
    )]
    BudgetTooSmall { pages: u64, least: u64 },
    #[error("The costs in {path} cannot be used: {problem}", path = path.display())]
    Costs { path: PathBuf, problem: String },
    #[error("The plan was made for snapshot {made_for} and is of no use for snapshot {given}")]
    PlanOfOther { made_for: SnapshotId, given: SnapshotId },
    #[error("{path} was changed after the plan was made; make the plan again", path = path.display())]
    SourceChanged { path: PathBuf },
    #[error("Pool {pool} was changed after the plan was made: the snapshot's pages lie elsewhere; make the plan again")]
    PoolChanged { pool: PoolId },
    #[error("The plan takes pages from pool {pool}; give the pools it was made for with --pool, in the same order")]
    PlanNeedsPool { pool: PoolId },
    #[error("The plan takes no pages from pool {pool}; leave it out, or make the plan again with it")]
    PlanWithoutPool { pool: PoolId },
    #[error("The plan in {path} cannot be used: {problem}", path = path.display())]
    PlanFile { path: PathBuf, problem: String },
    #[error(transparent)]
    Cold(#[from] ChunkError),
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
}

impl Error {
    pub(crate) fn profile(object: &str, problem: impl Into<String>) -> Error {
        Error::Profile { object: object.to_string(), problem: problem.into() }
    }
}
