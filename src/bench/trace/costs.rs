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

/// The time of an action.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Work {
    /// From its begin to its end.
    pub(super) ms: f64,
    /// The part of it that one CPU worked. For the rest it waited: for a disk, or for other programs.
    pub(super) cpu_ms: f64,
}

impl Work {
    /// A part of the work.
    pub(super) fn part(self, part: f64) -> Work {
        Work { ms: self.ms * part, cpu_ms: self.cpu_ms * part }
    }

    /// The work without that of `other`, which is part of it.
    pub(super) fn without(self, other: Work) -> Work {
        let cpu_ms = (self.cpu_ms - other.cpu_ms).max(0.0);
        Work { ms: (self.ms - other.ms).max(cpu_ms), cpu_ms }
    }

    /// Work of which a part is that of `other`, and the rest its own.
    pub(super) fn towards(self, other: Work, part: f64) -> Work {
        self.part(1.0 - part) + other.part(part)
    }

    fn numbers(self) -> [(&'static str, f64); 2] {
        [("ms", self.ms), ("cpu_ms", self.cpu_ms)]
    }
}

impl std::ops::Add for Work {
    type Output = Work;

    fn add(self, other: Work) -> Work {
        Work { ms: self.ms + other.ms, cpu_ms: self.cpu_ms + other.cpu_ms }
    }
}

/// Costs of one workload: medians of times, and local memory of a VM, MiB.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WorkloadCosts {
    pub(super) workload: Workload,
    /// A request that restores its VM.
    pub(super) restored: Work,
    /// A request whose VM takes over the process of a finished one. None: no process was taken over.
    pub(super) repurposed: Option<Work>,
    /// A request to a VM that has served one before.
    pub(super) warm: Work,
    /// The first request of a VM that stands by.
    pub(super) standby: Work,
    /// A request to a VM that was rewound.
    pub(super) rewound: Work,
    pub(super) rewind: Work,
    /// The end of a VM, with its process.
    pub(super) end: Work,
    /// The part of it until the kernel no longer counts the memory as the VM's.
    pub(super) gone: Work,
    /// The process of a VM that has finished. None: no process was kept.
    pub(super) kept: Option<KeptCosts>,
    /// VMs that have given local copies back. None: no request found one.
    pub(super) trimmed: Option<StepCosts>,
    /// VMs whose written pages are in a file. None: no request found one.
    pub(super) spilled: Option<StepCosts>,
    /// A request to a VM that was suspended.
    pub(super) woken: Work,
    /// The suspension of a VM.
    pub(super) suspend: Work,
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
    /// From the answer until the VM's memory is gone.
    pub(super) vacate: Work,
    /// Local memory from then on.
    pub(super) mib: f64,
}

/// Costs of VMs at a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StepCosts {
    /// A request to such a VM.
    pub(super) request: Work,
    /// The step itself.
    pub(super) step: Work,
    /// Local memory after the step.
    pub(super) mib: f64,
    /// Local memory after the next request.
    pub(super) after_mib: f64,
}

impl WorkloadCosts {
    fn check(&self) -> Result<(), String> {
        let works = [self.restored, self.warm, self.standby, self.rewound, self.rewind, self.end, self.gone];
        let steps = || self.trimmed.iter().chain(&self.spilled);
        let works = works.into_iter().chain([self.suspend, self.woken]).chain(self.repurposed);
        let works = works.chain(self.kept.map(|kept| kept.vacate)).chain(steps().flat_map(|of| [of.request, of.step]));
        let memory = [
            ("used_mib", self.used_mib),
            ("standby_mib", self.standby_mib),
            ("rewound_mib", self.rewound_mib),
            ("reused_mib", self.reused_mib),
            ("woken_mib", self.woken_mib),
        ];
        let of_steps = steps().flat_map(|step| [("mib", step.mib), ("after_mib", step.after_mib)]);
        let memory = memory.into_iter().chain(self.kept.map(|kept| ("mib", kept.mib))).chain(of_steps);
        for (name, number) in works.flat_map(Work::numbers).chain(memory) {
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
