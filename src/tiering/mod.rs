//! Placement of a restored guest's pages: profiles, policies, plans, and the contents of pools.
//!
//! Owns: recorders and profiles, policies and the cost model, plan files, the formats of pools (`pool/`) and of cold
//! pools (`cold/`), and the traits that back ends implement (`tier::Tier`, `pool::Medium`, `cold::Place`).
//! Must not know: KVM, guest memory, devices, HTTP. A policy is a pure function from a snapshot, a profile, costs and
//! budgets to a [`RestorePlan`](crate::snapshot::RestorePlan), so all of them are tested without a machine.
//! Start reading: `planner.rs` (chooses a restore's plan), `policy/mod.rs`, then `policy/reap.rs` (the smallest with a
//! profile) and `costs.rs`.

pub mod cold;
pub mod costs;
pub mod fault;
pub mod fit;
pub mod plan_cache;
pub mod plan_file;
pub mod planner;
pub mod policy;
pub mod pool;
pub mod profile;
pub mod recorder;
pub mod tier;

use std::path::PathBuf;

use crate::snapshot::{self, PoolId, SnapshotId};

/// Errors of making a plan.
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
        "Policy {policy} needs a profile: record one with `tvmm profile record --snapshot DIR --recorder uffd --run FUNCTION --out FILE`, and give it with --profile FILE"
    )]
    NeedsProfile { policy: &'static str },
    #[error(
        "A budget of {pages} pages ({mib:.1} MiB) of local memory is too small: the request writes {least} pages, so the least that works is {least_mib} MiB",
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
    Cold(#[from] cold::ChunkError),
    #[error(transparent)]
    Pool(#[from] pool::Error),
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
}

impl Error {
    pub(crate) fn profile(object: &str, problem: impl Into<String>) -> Error {
        Error::Profile { object: object.to_string(), problem: problem.into() }
    }
}
