//! The costs of requests and VMs, measured one by one on the service: the simulator's calibration.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::workload::{Workload, Workloads};
use crate::sys::errors::{BoxError, refuse};

/// The version of the file.
pub(super) const VERSION: u32 = 2;

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

/// Costs of one workload: medians of times, ms, and local memory of a VM, MiB.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WorkloadCosts {
    pub(super) workload: Workload,
    /// A request that restores its VM.
    pub(super) restored_ms: f64,
    /// A request whose VM takes over the process of a finished one. None: no process was taken over.
    pub(super) repurposed_ms: Option<f64>,
    /// A request to a VM that has served one before.
    pub(super) warm_ms: f64,
    /// The first request of a VM that stands by.
    pub(super) standby_ms: f64,
    /// A request to a VM that was rewound.
    pub(super) rewound_ms: f64,
    pub(super) rewind_ms: f64,
    /// The end of a VM, with its process.
    pub(super) end_ms: f64,
    /// The process of a VM that has finished. None: no process was kept.
    pub(super) kept: Option<KeptCosts>,
    /// VMs that have given local copies back. None: no request found one.
    pub(super) trimmed: Option<StepCosts>,
    /// VMs whose written pages are in a file. None: no request found one.
    pub(super) spilled: Option<StepCosts>,
    /// A request to a VM that was suspended.
    pub(super) woken_ms: f64,
    /// The suspension of a VM.
    pub(super) suspend_ms: f64,
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
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KeptCosts {
    /// Time from the answer until the VM's memory is gone.
    pub(super) vacate_ms: f64,
    /// Local memory from then on.
    pub(super) mib: f64,
}

/// Costs of VMs at a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StepCosts {
    /// A request to such a VM.
    pub(super) request_ms: f64,
    /// The step itself.
    pub(super) step_ms: f64,
    /// Local memory after the step.
    pub(super) mib: f64,
    /// Local memory after the next request.
    pub(super) after_mib: f64,
}

impl StepCosts {
    fn numbers(&self) -> [(&'static str, f64); 4] {
        let StepCosts { request_ms, step_ms, mib, after_mib } = *self;
        [("request_ms", request_ms), ("step_ms", step_ms), ("mib", mib), ("after_mib", after_mib)]
    }
}

impl WorkloadCosts {
    fn check(&self) -> Result<(), String> {
        for (name, number) in [
            ("restored_ms", self.restored_ms),
            ("repurposed_ms", self.repurposed_ms.unwrap_or(1.0)),
            ("warm_ms", self.warm_ms),
            ("standby_ms", self.standby_ms),
            ("rewound_ms", self.rewound_ms),
            ("rewind_ms", self.rewind_ms),
            ("end_ms", self.end_ms),
            ("woken_ms", self.woken_ms),
            ("suspend_ms", self.suspend_ms),
            ("used_mib", self.used_mib),
            ("standby_mib", self.standby_mib),
            ("rewound_mib", self.rewound_mib),
            ("reused_mib", self.reused_mib),
            ("woken_mib", self.woken_mib),
        ]
        .into_iter()
        .chain(self.kept.iter().flat_map(|kept| [("vacate_ms", kept.vacate_ms), ("mib", kept.mib)]))
        .chain(self.trimmed.iter().chain(&self.spilled).flat_map(StepCosts::numbers))
        {
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
        if costs.version != VERSION {
            return refuse(named(format!("it has version {}, and this tvmm reads {VERSION}", costs.version)));
        }
        if costs.cpus == 0 || !costs.shells_mib.is_finite() {
            return refuse(named("`cpus` or `shells_mib` is no number that a host has".to_string()));
        }
        for (name, workload) in &costs.workloads {
            workload.check().map_err(|problem| named(format!("workload `{name}`: {problem}")))?;
        }
        Ok(costs)
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
