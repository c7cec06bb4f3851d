//! Choices of a restore that are no part of its plan.

use serde::{Deserialize, Serialize};

/// The mapping of pages placed in place, where the tier leaves the choice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InPlaceMapping {
    /// The kernel copies pages that are written.
    #[default]
    Private,
    /// Read-only, as a tier without copy-on-write (device DAX) must be mapped: the VMM copies pages that are written.
    Shared,
}

impl std::str::FromStr for InPlaceMapping {
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

impl std::str::FromStr for Verify {
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
