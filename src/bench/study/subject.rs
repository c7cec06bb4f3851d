//! The subject of a measurement: a snapshot, and the requests that its guest gets.

use std::path::PathBuf;

use super::workload::Workload;

/// A snapshot to restore, and its requests.
#[derive(Clone)]
pub(super) struct Subject {
    pub(super) workload: &'static Workload,
    pub(super) snapshot: PathBuf,
    /// True if it has inputs of other sizes than A and B.
    pub(super) sizes: bool,
    /// The request of the recorded run.
    pub(super) recorded: String,
    /// The request of the measured run.
    pub(super) asked: String,
    /// Additional arguments of `tvmm restore`.
    pub(super) more: Vec<String>,
}
