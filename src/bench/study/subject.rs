//! The subject of a measurement: a snapshot, and the requests that its guest gets.

use std::path::PathBuf;

use super::door::Door;
use super::workload::{Inputs, Workload};

/// A snapshot to restore, and its requests.
#[derive(Clone)]
pub(super) struct Subject {
    pub(super) workload: &'static Workload,
    pub(super) snapshot: PathBuf,
    /// The inputs that its guest is prepared for.
    pub(super) inputs: Inputs,
    /// The way in which its guest takes requests.
    pub(super) door: Door,
    /// The size of its runtime image; `None`: the guest's default.
    pub(super) runtime_mib: Option<u64>,
    /// The request of the recorded run.
    pub(super) recorded: String,
    /// The request of the measured run.
    pub(super) asked: String,
    /// Additional arguments of `tvmm restore`.
    pub(super) more: Vec<String>,
}
