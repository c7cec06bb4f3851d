//! Choices that a restore names: its policy, how pages in place are mapped, when memory is compared.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A restore policy, by name. `tiering::policy` makes the plans.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "&'static str")]
pub enum Policy {
    /// Everything is read and verified before the guest runs.
    Eager,
    /// One private mapping of the memory file, pages on demand.
    Firecracker,
    /// Nothing is mapped; each page is installed when it is touched.
    FirecrackerUffd,
    /// The image mapped in place, private pages on demand.
    Catalyzer,
    /// The recorded working set installed from a compact file, the rest page by page.
    Reap,
    /// The loading set mapped from a compact file that is read concurrently.
    Faasnap,
    /// The image mapped in place, copied on write.
    Trenv,
    /// The hot set copied before the guest runs, cold pages fetched asynchronously.
    Aquifer,
    /// tvmm's own.
    Tiered,
}

/// The reason for which a restore has its policy, as its report names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyReason {
    /// The request names the policy.
    Requested,
    /// The request names none and has a profile, so the policy is `tiered`.
    Profile,
    /// The request names neither, so the policy is `firecracker`.
    NoProfile,
    /// The request has a plan, which a policy made before.
    PlanFile,
}

/// A name that no policy has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("There is no policy {name:?}; there are: {known}")]
pub struct UnknownPolicy {
    pub name: String,
    pub known: String,
}

impl Policy {
    pub const ALL: [Policy; 9] = [
        Policy::Eager,
        Policy::Firecracker,
        Policy::FirecrackerUffd,
        Policy::Catalyzer,
        Policy::Reap,
        Policy::Faasnap,
        Policy::Trenv,
        Policy::Aquifer,
        Policy::Tiered,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Policy::Eager => "eager",
            Policy::Firecracker => "firecracker",
            Policy::FirecrackerUffd => "firecracker-uffd",
            Policy::Catalyzer => "catalyzer",
            Policy::Reap => "reap",
            Policy::Faasnap => "faasnap",
            Policy::Trenv => "trenv",
            Policy::Aquifer => "aquifer",
            Policy::Tiered => "tiered",
        }
    }

    /// The policy of a restore that names none: `tiered` if it has a profile, else `firecracker`.
    pub fn default_for(profile: Option<&Path>) -> Policy {
        if profile.is_some() { Policy::Tiered } else { Policy::Firecracker }
    }

    /// True if the policy needs a recorded run.
    pub fn needs_profile(self) -> bool {
        matches!(self, Policy::Reap | Policy::Faasnap | Policy::Aquifer | Policy::Tiered)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        Policy::ALL
            .into_iter()
            .find(|policy| policy.name() == name)
            .ok_or_else(|| UnknownPolicy { name: name.to_string(), known: Policy::ALL.map(Policy::name).join(", ") })
    }
}

impl TryFrom<String> for Policy {
    type Error = UnknownPolicy;

    fn try_from(name: String) -> Result<Self, UnknownPolicy> {
        name.parse()
    }
}

impl From<Policy> for &'static str {
    fn from(policy: Policy) -> &'static str {
        policy.name()
    }
}

/// The default worth of a MiB of local memory: µs of a request's time. 200 ns for a page, less than a page fault, more
/// than copying it in a huge page.
pub const DRAM_PRICE_US: u64 = 50;

/// The mapping of pages placed in place, where the tier leaves the choice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
#[schema(as = Mapping)]
pub enum InPlaceMapping {
    /// The kernel copies pages that are written.
    #[default]
    Private,
    /// Read-only: the VMM copies pages that are written. Device DAX has no copy-on-write and is always mapped so.
    Shared,
}

impl FromStr for InPlaceMapping {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "private" => Ok(InPlaceMapping::Private),
            "shared" => Ok(InPlaceMapping::Shared),
            _ => Err("it is neither `private` nor `shared`".to_owned()),
        }
    }
}

/// The time at which restored memory is compared with the checksums of its snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    /// Never.
    Off,
    /// A few chunks, before the guest runs.
    Sample,
    /// A few chunks before the guest runs, and the rest once it has settled.
    #[default]
    Background,
    /// All of it, before the guest runs.
    Full,
}

impl FromStr for Verify {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Verify::Off),
            "sample" => Ok(Verify::Sample),
            "background" => Ok(Verify::Background),
            "full" => Ok(Verify::Full),
            _ => Err("it is not one of `off`, `sample`, `background` and `full`".to_owned()),
        }
    }
}
