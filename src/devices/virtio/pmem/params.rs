//! The parameters of a pmem device.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The parameters of a pmem device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemParams {
    pub id: String,
    pub path: PathBuf,
    pub read_only: bool,
    /// For the config only: the setting that the kernel's command line was made from.
    pub is_root: bool,
    /// Guest-physical address: a multiple of 2 MiB.
    pub gpa: u64,
}
