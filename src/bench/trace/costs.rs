//! The costs of requests and VMs, measured one by one on the service: the simulator's calibration.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::policy::{Policy, Rules};
use super::samples::Samples;
use super::workload::{Workload, Workloads};
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::window::WindowEnd;

/// The version of the file that is written.
pub(super) const VERSION: u32 = 3;
/// The oldest version that is read: it has one time of each kind, no windows, no memory of a VM that
/// starts, and no restores into fresh memory.
const OLDEST: u32 = 2;

/// Costs of all workloads on one host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Costs {
    pub(super) version: u32,
    pub(super) tvmm_version: String,
    /// CPUs of the host.
    pub(super) cpus: usize,
    /// Local memory of the processes that the service keeps ready, MiB.
    pub(super) shells_mib: f64,
    pub(super) workloads: BTreeMap<String, WorkloadCosts>,
}

/// Costs of one workload: times, and local memory of a VM, MiB.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WorkloadCosts {
    pub(super) workload: Workload,
    /// A request that restores its VM.
    pub(super) restored: Samples,
    /// The same while the VMs before live on, so that its memory is not what another one has given back just now. None:
    /// it was not measured.
    pub(super) grown: Option<Samples>,
    /// A request whose VM takes over the process of a finished one. None: no process was taken over.
    pub(super) repurposed: Option<Samples>,
    /// A request to a VM that has served one before.
    pub(super) warm: Samples,
    /// The first request of a VM that stands by.
    pub(super) standby: Samples,
    /// A request to a VM that was rewound.
    pub(super) rewound: Samples,
    pub(super) rewind: Samples,
    /// The end of a VM, with its process.
    pub(super) end: Samples,
    /// The part of it until the kernel no longer counts the memory as the VM's.
    pub(super) gone: Samples,
    /// The process of a VM that has finished. None: no process was kept.
    pub(super) kept: Option<KeptCosts>,
    /// VMs that have given local copies back. None: no request found one.
    pub(super) trimmed: Option<StepCosts>,
    /// VMs whose written pages are in a file. None: no request found one.
    pub(super) spilled: Option<StepCosts>,
    /// A request to a VM that was suspended.
    pub(super) woken: Samples,
    /// The suspension of a VM.
    pub(super) suspend: Samples,
    /// VMs that serve requests by the policy `ladder`, at the end of each window. None: it was not measured.
    pub(super) windows: Option<Vec<WindowCosts>>,
    /// A VM from its restore to its first answer, the mean over that time. None: it was not measured.
    pub(super) starting_mib: Option<f64>,
    /// A VM that has served a request.
    pub(super) used_mib: f64,
    /// A VM that stands by for its first request.
    pub(super) standby_mib: f64,
    /// A VM that was rewound.
    pub(super) rewound_mib: f64,
    /// A VM that was rewound, after its next request.
    pub(super) reused_mib: f64,
    /// A VM that was suspended, after its next request.
    pub(super) woken_mib: f64,
}

/// Costs of a process that is kept for another VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KeptCosts {
    /// From the answer until the VM's memory is gone.
    pub(super) vacate: Samples,
    /// Local memory from then on.
    pub(super) mib: f64,
}

/// Costs of VMs at a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StepCosts {
    /// A request to such a VM.
    pub(super) request: Samples,
    /// The step itself.
    pub(super) step: Samples,
    /// Local memory after the step.
    pub(super) mib: f64,
    /// Local memory after the next request.
    pub(super) after_mib: f64,
}

/// Costs of the end of a window, at which a VM that serves requests gives untouched memory back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WindowCosts {
    /// From the answer until the memory is given back.
    pub(super) give: Samples,
    pub(super) pages: WindowEnd,
    /// Local memory afterwards.
    pub(super) mib: f64,
    /// The next request, which has faults where it touches memory that was given back.
    pub(super) request: Samples,
    /// Local memory after it.
    pub(super) after_mib: f64,
}

impl WorkloadCosts {
    /// All times, with their names.
    fn times(&self) -> Vec<(&'static str, &Samples)> {
        let mut times = vec![
            ("restored", &self.restored),
            ("warm", &self.warm),
            ("standby", &self.standby),
            ("rewound", &self.rewound),
            ("rewind", &self.rewind),
            ("end", &self.end),
            ("gone", &self.gone),
            ("woken", &self.woken),
            ("suspend", &self.suspend),
        ];
        times.extend(self.grown.iter().map(|times| ("grown", times)));
        times.extend(self.repurposed.iter().map(|times| ("repurposed", times)));
        times.extend(self.kept.iter().map(|kept| ("vacate", &kept.vacate)));
        times.extend(self.steps().flat_map(|of| [("request", &of.request), ("step", &of.step)]));
        times.extend(self.windows().iter().flat_map(|of| [("give", &of.give), ("request", &of.request)]));
        times
    }

    /// All sizes, with their names.
    fn sizes(&self) -> Vec<(&'static str, f64)> {
        let mut sizes = vec![
            ("used_mib", self.used_mib),
            ("standby_mib", self.standby_mib),
            ("rewound_mib", self.rewound_mib),
            ("reused_mib", self.reused_mib),
            ("woken_mib", self.woken_mib),
        ];
        sizes.extend(self.starting_mib.map(|mib| ("starting_mib", mib)));
        sizes.extend(self.kept.iter().map(|kept| ("mib", kept.mib)));
        sizes.extend(self.steps().flat_map(|of| [("mib", of.mib), ("after_mib", of.after_mib)]));
        sizes.extend(self.windows().iter().flat_map(|of| [("mib", of.mib), ("after_mib", of.after_mib)]));
        sizes
    }

    fn steps(&self) -> impl Iterator<Item = &StepCosts> {
        self.trimmed.iter().chain(&self.spilled)
    }

    /// The ends of windows, in their order.
    pub(super) fn windows(&self) -> &[WindowCosts] {
        self.windows.as_deref().unwrap_or_default()
    }

    fn check(&self) -> Result<(), String> {
        for (name, times) in self.times() {
            times.check().map_err(|problem| format!("`{name}` {problem}"))?;
        }
        for (name, number) in self.sizes() {
            if !number.is_finite() || number < 0.0 {
                return Err(format!("`{name}` is {number}, not a number from 0 on"));
            }
        }
        Ok(())
    }
}

impl Costs {
    /// Reads a file that a replay has written.
    ///
    /// # Errors
    /// The file is of another kind or version, or has numbers that are none.
    pub(super) fn read(path: &Path) -> Result<Costs, BoxError> {
        let named = |problem: String| format!("Cannot use the costs of {}: {problem}", path.display());
        let text = std::fs::read_to_string(path).map_err(|error| named(error.to_string()))?;
        let costs: Costs = serde_json::from_str(&text).map_err(|error| named(error.to_string()))?;
        if !(OLDEST..=VERSION).contains(&costs.version) {
            let known = format!("this tvmm reads {OLDEST} to {VERSION}");
            return refuse(named(format!("it has version {}, and {known}", costs.version)));
        }
        if costs.cpus == 0 || !costs.shells_mib.is_finite() {
            return refuse(named("`cpus` or `shells_mib` is no number that a host has".to_string()));
        }
        for (name, workload) in &costs.workloads {
            workload.check().map_err(|problem| named(format!("workload `{name}`: {problem}")))?;
        }
        Ok(costs)
    }

    /// A remark for the report, if simulations by some of these rules leave something out that the costs do not have.
    pub(super) fn gap(&self, rules: &[Rules]) -> Option<String> {
        let needs_windows = rules.iter().any(|rules| rules.policy == Policy::Shrink);
        let lacks_windows = self.workloads.values().any(|costs| costs.windows.is_none());
        (needs_windows && lacks_windows).then(|| {
            format!(
                "The costs (version {}) have no `windows`: simulated VMs of `{}` give no memory back between requests. \
                 Replay the trace once for new costs",
                self.version,
                Policy::Shrink
            )
        })
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), BoxError> {
        let text = serde_json::to_string_pretty(self)?;
        Ok(std::fs::write(path, text + "\n").map_err(|error| format!("Cannot write {}: {error}", path.display()))?)
    }

    /// The costs of each function of a trace, by its index.
    ///
    /// # Errors
    /// The costs have no workload of this name, or one that was measured with other requests.
    pub(super) fn of<'a>(&'a self, workloads: &Workloads) -> Result<Vec<&'a WorkloadCosts>, BoxError> {
        for (name, workload) in &workloads.all {
            match self.workloads.get(name) {
                None => return refuse(format!("Cannot simulate workload `{name}`: the costs do not have it")),
                Some(costs) if costs.workload != *workload => {
                    return refuse(format!(
                        "Cannot simulate workload `{name}`: its costs were measured with other memory or requests. \
                         Replay it once with these --workloads"
                    ));
                }
                Some(_) => {}
            }
        }
        Ok(workloads.of.iter().filter_map(|name| self.workloads.get(name)).collect())
    }
}
