//! The restore policies by name.

mod eager;
mod firecracker;

use std::fmt;
use std::str::FromStr;

use super::Error;
use crate::snapshot::{Chain, RestorePlan};

/// A restore policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Everything is read and verified before the guest runs.
    Eager,
    /// One private mapping of the memory file, pages on demand.
    Firecracker,
}

impl Policy {
    pub const ALL: [Policy; 2] = [Policy::Eager, Policy::Firecracker];

    pub fn name(self) -> &'static str {
        match self {
            Policy::Eager => "eager",
            Policy::Firecracker => "firecracker",
        }
    }

    /// Makes the plan for restoring the tip of `chain`.
    pub fn plan(self, chain: &Chain) -> Result<RestorePlan, Error> {
        let extents = match self {
            Policy::Eager => eager::plan(chain)?,
            Policy::Firecracker => firecracker::plan(chain)?,
        };
        let mut plan = RestorePlan::new(chain.tip().manifest().id, self.name(), extents);
        plan.verify = self == Policy::Eager;
        Ok(plan)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Policy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Policy::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| Error::UnknownPolicy {
            name: name.to_string(),
            known: Policy::ALL.map(Policy::name).join(", "),
        })
    }
}
