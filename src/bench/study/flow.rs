//! The ways to bring a function up that are compared, by the names FaaSnap's harness gave them.

use std::fmt;
use std::str::FromStr;

use crate::bench::page_fault_handler::Answer;
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
    /// TrEnv, from a pool.
    TrenvPool,
    /// Aquifer, from a pool.
    AquiferPool,
    /// tvmm's own, from a pool.
    TieredPool,
    /// No restore: the VM that ran the function with the recorded input runs it again.
    Warm,
    /// Another VMM of Firecracker's command line and API, its own snapshot, its File back end, nothing cached.
    Firecracker,
    /// The same, the snapshot cached.
    FirecrackerCache,
    /// The same VMM, its Uffd back end: a handler outside serves page by page, nothing cached.
    FirecrackerUffd,
    /// The same, the snapshot cached.
    FirecrackerUffdCache,
    /// The same, all of memory served at the first fault, nothing cached.
    FirecrackerUffdAll,
    /// The same, the snapshot cached.
    FirecrackerUffdAllCache,
}

/// How another VMM of Firecracker's API gets its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    File,
    Uffd(Answer),
}

/// How a flow restores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restore {
    pub policy: Policy,
    /// Whose profile it uses, if it needs one.
    pub recorder: RecorderKind,
    pub cached: bool,
    /// Whether memory comes from the pool.
    pub pooled: bool,
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
    /// Those that need a pool: the methods for byte-addressable tiers.
    pub const POOLED: [Flow; 3] = [Flow::TrenvPool, Flow::AquiferPool, Flow::TieredPool];
    /// Those of another VMM that are measured when there is one: serving all memory takes long, and is to be asked for.
    pub const FOREIGN: [Flow; 4] =
        [Flow::Firecracker, Flow::FirecrackerCache, Flow::FirecrackerUffd, Flow::FirecrackerUffdCache];
    const ALL: [Flow; 19] = [
        Flow::Vanilla,
        Flow::VanillaCache,
        Flow::Mincore,
        Flow::Emumincore,
        Flow::Reap,
        Flow::Trenv,
        Flow::Aquifer,
        Flow::Tiered,
        Flow::TieredCache,
        Flow::TrenvPool,
        Flow::AquiferPool,
        Flow::TieredPool,
        Flow::Warm,
        Flow::Firecracker,
        Flow::FirecrackerCache,
        Flow::FirecrackerUffd,
        Flow::FirecrackerUffdCache,
        Flow::FirecrackerUffdAll,
        Flow::FirecrackerUffdAllCache,
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
            Flow::TrenvPool => "trenv-pool",
            Flow::AquiferPool => "aquifer-pool",
            Flow::TieredPool => "tiered-pool",
            Flow::Warm => "warm",
            Flow::Firecracker => "firecracker",
            Flow::FirecrackerCache => "firecracker-cache",
            Flow::FirecrackerUffd => "firecracker-uffd-ext",
            Flow::FirecrackerUffdCache => "firecracker-uffd-ext-cache",
            Flow::FirecrackerUffdAll => "firecracker-uffd-all",
            Flow::FirecrackerUffdAllCache => "firecracker-uffd-all-cache",
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
            Flow::Trenv | Flow::TrenvPool => (Policy::Trenv, RecorderKind::Uffd, false),
            Flow::Aquifer | Flow::AquiferPool => (Policy::Aquifer, RecorderKind::Uffd, false),
            Flow::Tiered | Flow::TieredPool => (Policy::Tiered, RecorderKind::Uffd, false),
            Flow::TieredCache => (Policy::Tiered, RecorderKind::Uffd, true),
            Flow::Warm
            | Flow::Firecracker
            | Flow::FirecrackerCache
            | Flow::FirecrackerUffd
            | Flow::FirecrackerUffdCache
            | Flow::FirecrackerUffdAll
            | Flow::FirecrackerUffdAllCache => return None,
        };
        Some(Restore { policy, recorder, cached, pooled: self.is_pooled() })
    }

    /// Whether it needs a pool.
    pub fn is_pooled(self) -> bool {
        Flow::POOLED.contains(&self)
    }

    /// Whether its snapshot is in the page cache when it begins.
    pub fn is_cached(self) -> bool {
        matches!(
            self,
            Flow::VanillaCache
                | Flow::TieredCache
                | Flow::FirecrackerCache
                | Flow::FirecrackerUffdCache
                | Flow::FirecrackerUffdAllCache
        )
    }

    /// How it gets its memory, if it is another VMM's.
    pub fn backend(self) -> Option<Backend> {
        match self {
            Flow::Firecracker | Flow::FirecrackerCache => Some(Backend::File),
            Flow::FirecrackerUffd | Flow::FirecrackerUffdCache => Some(Backend::Uffd(Answer::Page)),
            Flow::FirecrackerUffdAll | Flow::FirecrackerUffdAllCache => Some(Backend::Uffd(Answer::All)),
            _ => None,
        }
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
