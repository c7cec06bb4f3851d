//! The compared ways of starting a function, by the names of FaaSnap's harness.

use std::fmt;
use std::str::FromStr;

use super::door::Door;
use crate::bench::cache::Cache;
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
    /// REAP, the snapshot cached.
    ReapCache,
    /// TrEnv, the snapshot cached.
    TrenvCache,
    /// Aquifer, the snapshot cached.
    AquiferCache,
    /// TrEnv, from a pool.
    TrenvPool,
    /// Aquifer, from a pool.
    AquiferPool,
    /// tvmm's own, from a pool.
    TieredPool,
    /// No restore: the VM that ran the function with the recorded input runs it again.
    Warm,
    /// A VM that stands by, restored as by `TieredCache`, gets its first request.
    Standby,
    /// The same, restored as by `TieredPool`.
    StandbyPool,
    /// As `Standby`, asked over vsock.
    StandbyVsock,
    /// A VM, restored as by `TieredCache`, that has answered and was rewound gets its next request.
    Rewound,
    /// The child of a VM, restored as by `TieredCache`, that has answered gets its first request, over vsock.
    Forked,
    /// A VM that was another function's and was repurposed, restored as by `TieredCache`, gets its first request.
    Repurposed,
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

/// The way in which another VMM of Firecracker's API gets its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    File,
    Uffd(Answer),
}

/// The state in which a restored VM waits for its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// The guest has not run since the restore.
    Standby,
    /// The VM has answered a request and was rewound.
    Rewound,
}

/// A flow whose restore is over before the clock starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    pub waiting: Waiting,
    pub restore: Restore,
}

/// A flow whose one VM serves all rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    Warm,
    Rewound(Ready),
    Forked(Restore),
    Repurposed(Restore),
}

/// The source of a flow's VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Many {
    /// Each is restored when it is asked.
    Restored(Restore),
    /// They wait before they are asked.
    Waiting(Ready),
}

/// The restore of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restore {
    pub policy: Policy,
    /// The recorder of its profile, if it needs one.
    pub recorder: RecorderKind,
    pub cached: bool,
    /// True if memory comes from the pool.
    pub pooled: bool,
}

impl Flow {
    /// The flows that need nothing but tvmm.
    pub const OWN: [Flow; 15] = [
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
        Flow::Standby,
        Flow::StandbyVsock,
        Flow::Rewound,
        Flow::Forked,
        Flow::Repurposed,
    ];
    /// The flows that need a pool: the methods for byte-addressable tiers.
    pub const POOLED: [Flow; 4] = [Flow::TrenvPool, Flow::AquiferPool, Flow::TieredPool, Flow::StandbyPool];
    /// The flows of another VMM that are measured by default. Serving all memory takes long, so it is on request only.
    pub const FOREIGN: [Flow; 4] =
        [Flow::Firecracker, Flow::FirecrackerCache, Flow::FirecrackerUffd, Flow::FirecrackerUffdCache];
    /// The flows of a burst that need nothing but tvmm.
    pub const BURST: [Flow; 8] = [
        Flow::VanillaCache,
        Flow::ReapCache,
        Flow::TrenvCache,
        Flow::AquiferCache,
        Flow::TieredCache,
        Flow::Standby,
        Flow::StandbyVsock,
        Flow::Rewound,
    ];
    const ALL: [Flow; 28] = [
        Flow::Vanilla,
        Flow::VanillaCache,
        Flow::Mincore,
        Flow::Emumincore,
        Flow::Reap,
        Flow::Trenv,
        Flow::Aquifer,
        Flow::Tiered,
        Flow::TieredCache,
        Flow::ReapCache,
        Flow::TrenvCache,
        Flow::AquiferCache,
        Flow::TrenvPool,
        Flow::AquiferPool,
        Flow::TieredPool,
        Flow::Warm,
        Flow::Standby,
        Flow::StandbyPool,
        Flow::StandbyVsock,
        Flow::Rewound,
        Flow::Forked,
        Flow::Repurposed,
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
            Flow::ReapCache => "reap-cache",
            Flow::TrenvCache => "trenv-cache",
            Flow::AquiferCache => "aquifer-cache",
            Flow::TrenvPool => "trenv-pool",
            Flow::AquiferPool => "aquifer-pool",
            Flow::TieredPool => "tiered-pool",
            Flow::Warm => "warm",
            Flow::Standby => "standby",
            Flow::StandbyPool => "standby-pool",
            Flow::StandbyVsock => "standby-vsock",
            Flow::Rewound => "rewound",
            Flow::Forked => "forked",
            Flow::Repurposed => "repurposed",
            Flow::Firecracker => "firecracker",
            Flow::FirecrackerCache => "firecracker-cache",
            Flow::FirecrackerUffd => "firecracker-uffd-ext",
            Flow::FirecrackerUffdCache => "firecracker-uffd-ext-cache",
            Flow::FirecrackerUffdAll => "firecracker-uffd-all",
            Flow::FirecrackerUffdAllCache => "firecracker-uffd-all-cache",
        }
    }

    /// The index of the flow of this name among all, if there is one.
    pub fn place(name: &str) -> Option<usize> {
        Flow::ALL.iter().position(|flow| flow.name() == name)
    }

    /// The restore by tvmm for which a request waits; `None` for the other flows.
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
            Flow::ReapCache => (Policy::Reap, RecorderKind::Uffd, true),
            Flow::TrenvCache => (Policy::Trenv, RecorderKind::Uffd, true),
            Flow::AquiferCache => (Policy::Aquifer, RecorderKind::Uffd, true),
            Flow::Warm
            | Flow::Standby
            | Flow::StandbyPool
            | Flow::StandbyVsock
            | Flow::Rewound
            | Flow::Forked
            | Flow::Repurposed
            | Flow::Firecracker
            | Flow::FirecrackerCache
            | Flow::FirecrackerUffd
            | Flow::FirecrackerUffdCache
            | Flow::FirecrackerUffdAll
            | Flow::FirecrackerUffdAllCache => return None,
        };
        Some(Restore { policy, recorder, cached, pooled: self.is_pooled() })
    }

    /// The VM that is asked, for flows that restore it before the clock starts; `None` for the other flows.
    pub fn ready(self) -> Option<Ready> {
        let (waiting, by) = match self {
            Flow::Standby | Flow::StandbyVsock => (Waiting::Standby, Flow::TieredCache),
            Flow::StandbyPool => (Waiting::Standby, Flow::TieredPool),
            Flow::Rewound => (Waiting::Rewound, Flow::TieredCache),
            _ => return None,
        };
        by.restore().map(|restore| Ready { waiting, restore })
    }

    /// The source of VMs of which any number can be measured beside each other; `None` for the other flows.
    pub fn many(self) -> Option<Many> {
        self.restore().map(Many::Restored).or(self.ready().map(Many::Waiting))
    }

    /// Returns whether many of its VMs can be asked at once.
    pub fn can_burst(self) -> bool {
        self.many().is_some() || self.backend() == Some(Backend::File)
    }

    /// The VM that serves all rounds; `None` for flows that have a VM for each.
    pub fn kept(self) -> Option<Kept> {
        let by = Flow::TieredCache.restore();
        match self {
            Flow::Warm => Some(Kept::Warm),
            Flow::Rewound => self.ready().map(Kept::Rewound),
            Flow::Forked => by.map(Kept::Forked),
            Flow::Repurposed => by.map(Kept::Repurposed),
            _ => None,
        }
    }

    /// The way in which its VMs are asked.
    pub fn door(self) -> Door {
        match self {
            // A child of a fork has no standard input.
            Flow::StandbyVsock | Flow::Forked => Door::Vsock,
            _ => Door::Console,
        }
    }

    /// Returns whether it needs a pool.
    pub fn is_pooled(self) -> bool {
        Flow::POOLED.contains(&self)
    }

    /// Returns whether its snapshot is in the page cache at the start.
    pub fn is_cached(self) -> bool {
        matches!(
            self,
            Flow::VanillaCache
                | Flow::TieredCache
                | Flow::ReapCache
                | Flow::TrenvCache
                | Flow::AquiferCache
                | Flow::Standby
                | Flow::StandbyVsock
                | Flow::Rewound
                | Flow::Forked
                | Flow::Repurposed
                | Flow::FirecrackerCache
                | Flow::FirecrackerUffdCache
                | Flow::FirecrackerUffdAllCache
        )
    }

    /// The change to the page cache before each of its restores.
    pub fn cache(self) -> Cache {
        if self.is_cached() { Cache::Warm } else { Cache::Evicted }
    }

    /// The back end of another VMM; `None` for tvmm's flows.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_one_flow_and_says_which_memory_it_finds() {
        for (index, flow) in Flow::ALL.into_iter().enumerate() {
            assert_eq!(flow.name().parse(), Ok(flow));
            assert_eq!(Flow::place(flow.name()), Some(index), "{flow} stands twice");
            assert_eq!(flow.is_pooled(), flow.name().ends_with("-pool"), "{flow}");
            let names = ["standby", "standby-vsock", "rewound", "forked", "repurposed"];
            let is_named_cached = flow.name().ends_with("-cache") || names.contains(&flow.name());
            assert_eq!(flow.is_cached(), is_named_cached, "{flow}");
            if let Some(restore) = flow.restore() {
                assert_eq!((restore.cached, restore.pooled), (flow.is_cached(), flow.is_pooled()), "{flow}");
            }
        }
        assert!(Flow::BURST.iter().chain(&Flow::POOLED).all(|flow| flow.can_burst()));
        for flow in [Flow::Warm, Flow::Forked, Flow::Repurposed, Flow::FirecrackerUffd] {
            assert!(!flow.can_burst(), "{flow}");
        }
    }
}
