//! The ways to bring a function up that are compared, by the names FaaSnap's harness gave them.

use std::fmt;
use std::str::FromStr;

use crate::tiering::policy::Policy;
use crate::tiering::profile::RecorderKind;

/// A way to get an answer from a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flow {
    /// Firecracker: the memory file mapped, nothing cached.
    Vanilla,
    /// The same, the snapshot cached.
    VanillaCache,
    /// FaaSnap, by what mincore saw.
    Mincore,
    /// FaaSnap, by exact recording in groups of as many faults.
    Emumincore,
    /// REAP.
    Reap,
    /// TrEnv.
    Trenv,
    /// Aquifer.
    Aquifer,
    /// tvmm's own.
    Tiered,
    /// tvmm's own, the snapshot cached.
    TieredCache,
    /// No restore: the VM that ran the function with the recorded input runs it again.
    Warm,
    /// Another VMM of Firecracker's command line and API, its own snapshot, its File back end, nothing cached.
    Firecracker,
    /// The same, the snapshot cached.
    FirecrackerCache,
}

/// How a flow restores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restore {
    pub policy: Policy,
    /// Whose profile it uses, if it needs one.
    pub recorder: RecorderKind,
    pub cached: bool,
}

impl Flow {
    /// Those that need nothing but tvmm.
    pub const OWN: [Flow; 10] = [
        Flow::Vanilla,
        Flow::VanillaCache,
        Flow::Mincore,
        Flow::Emumincore,
        Flow::Reap,
        Flow::Trenv,
        Flow::Aquifer,
        Flow::Tiered,
        Flow::TieredCache,
        Flow::Warm,
    ];
    const ALL: [Flow; 12] = [
        Flow::Vanilla,
        Flow::VanillaCache,
        Flow::Mincore,
        Flow::Emumincore,
        Flow::Reap,
        Flow::Trenv,
        Flow::Aquifer,
        Flow::Tiered,
        Flow::TieredCache,
        Flow::Warm,
        Flow::Firecracker,
        Flow::FirecrackerCache,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Flow::Vanilla => "vanilla",
            Flow::VanillaCache => "vanilla-cache",
            Flow::Mincore => "mincore",
            Flow::Emumincore => "emumincore",
            Flow::Reap => "reap",
            Flow::Trenv => "trenv",
            Flow::Aquifer => "aquifer",
            Flow::Tiered => "tiered",
            Flow::TieredCache => "tiered-cache",
            Flow::Warm => "warm",
            Flow::Firecracker => "firecracker",
            Flow::FirecrackerCache => "firecracker-cache",
        }
    }

    /// The place of the flow of this name among all, if there is one.
    pub fn place(name: &str) -> Option<usize> {
        Flow::ALL.iter().position(|flow| flow.name() == name)
    }

    /// How tvmm restores for it; `None` where it does not.
    pub fn restore(self) -> Option<Restore> {
        let (policy, recorder, cached) = match self {
            Flow::Vanilla => (Policy::Firecracker, RecorderKind::Uffd, false),
            Flow::VanillaCache => (Policy::Firecracker, RecorderKind::Uffd, true),
            Flow::Mincore => (Policy::Faasnap, RecorderKind::Mincore, false),
            Flow::Emumincore => (Policy::Faasnap, RecorderKind::Uffd, false),
            Flow::Reap => (Policy::Reap, RecorderKind::Uffd, false),
            Flow::Trenv => (Policy::Trenv, RecorderKind::Uffd, false),
            Flow::Aquifer => (Policy::Aquifer, RecorderKind::Uffd, false),
            Flow::Tiered => (Policy::Tiered, RecorderKind::Uffd, false),
            Flow::TieredCache => (Policy::Tiered, RecorderKind::Uffd, true),
            Flow::Warm | Flow::Firecracker | Flow::FirecrackerCache => return None,
        };
        Some(Restore { policy, recorder, cached })
    }

    /// Whether its snapshot is in the page cache when it begins.
    pub fn is_cached(self) -> bool {
        matches!(self, Flow::VanillaCache | Flow::TieredCache | Flow::FirecrackerCache)
    }

    /// Whether it is another VMM's.
    pub fn is_foreign(self) -> bool {
        matches!(self, Flow::Firecracker | Flow::FirecrackerCache)
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Flow {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Flow::ALL
            .into_iter()
            .find(|flow| flow.name() == name)
            .ok_or_else(|| format!("There is no flow {name:?}; there are: {}", Flow::ALL.map(Flow::name).join(", ")))
    }
}
