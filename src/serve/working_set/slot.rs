//! The profiles that a snapshot can have: one file for each way to record.

use std::path::{Path, PathBuf};

use crate::serve::fault::Fault;
use crate::tiering::policy::Policy;
use crate::tiering::profile::RecorderKind;

/// The profiles that a snapshot can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Recorded for `/snapshots/{id}/profile`.
    Run,
    /// FaaSnap's layers.
    Mincore,
    /// REAP's working set.
    Reap,
}

/// The order of preference of a policy that prefers no slot of its own.
const OF_RUNS_FIRST: [Slot; 3] = [Slot::Run, Slot::Reap, Slot::Mincore];

impl Slot {
    fn file_name(self) -> &'static str {
        match self {
            Slot::Run => "run.profile",
            Slot::Mincore => "mincore.profile",
            Slot::Reap => "reap.profile",
        }
    }

    /// The path of the profile, which may not exist yet.
    pub fn path(self, profiles: &Path) -> PathBuf {
        profiles.join(self.file_name())
    }

    /// The path of the profile if it exists.
    pub fn existing(self, profiles: &Path) -> Option<PathBuf> {
        Some(self.path(profiles)).filter(|path| path.exists())
    }

    /// The slot for this recorder's profiles.
    pub fn of_recorder(name: &str) -> Result<Slot, Fault> {
        match name.parse::<RecorderKind>() {
            Ok(RecorderKind::Mincore) => Ok(Slot::Mincore),
            Ok(_) => Ok(Slot::Run),
            Err(error) => Err(Fault::bad(error.to_string())),
        }
    }

    /// The profile for a restore that names no policy, if there is one.
    pub fn any(profiles: &Path) -> Option<PathBuf> {
        OF_RUNS_FIRST.into_iter().find_map(|slot| slot.existing(profiles))
    }

    /// The profile for a policy: its own if there is one, else any other.
    pub fn for_policy(policy: Policy, profiles: &Path) -> Result<PathBuf, Fault> {
        let order = match policy {
            Policy::Reap => [Slot::Reap, Slot::Run, Slot::Mincore],
            Policy::Faasnap => [Slot::Mincore, Slot::Run, Slot::Reap],
            _ => OF_RUNS_FIRST,
        };
        order.into_iter().find_map(|slot| slot.existing(profiles)).ok_or_else(|| {
            Fault::conflict(format!(
                "Policy `{policy}` needs a profile: record one by POST /snapshots/{{id}}/profile, or by an invocation \
                 with `record`."
            ))
        })
    }
}
