//! A function whose costs are measured: it is asked, and its VMs are looked at.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::super::cpu::CpuTime;
use super::super::memory::{mib, of};
use super::super::samples::{Samples, Work};
use super::super::service::Service;
use super::super::stage::{Counts, counts, invocation};
use super::super::workload::Workload;
use crate::sys::bounded_wait::Wait;
use crate::sys::errors::{BoxError, refuse};

/// VMs whose requests are measured, of which the first is not counted.
pub(super) const RUNS: usize = 6;
/// Pause before a request to a VM that waits: the next request of a trace finds a VM whose threads sleep.
pub(super) const REST: Duration = Duration::from_millis(20);
/// Time for a VM to stand by, or to take a step.
pub(super) const READY: Duration = Duration::from_secs(60);

/// A function whose costs are measured.
pub(super) struct Probe<'a> {
    pub(super) service: &'a Service,
    pub(super) function: usize,
    pub(super) workload: &'a Workload,
}

/// An answered request.
pub(super) struct Answered {
    pub(super) work: Work,
    pub(super) vm: String,
    /// The state in which the VM was found, or the way in which it was made.
    pub(super) origin: String,
}

/// The times of an action.
///
/// # Errors
/// It was never done.
pub(super) fn samples(action: &str, times: Vec<Work>) -> Result<Samples, BoxError> {
    Ok(Samples::of(times).ok_or_else(|| format!("Cannot measure {action}: it was never done"))?)
}

impl Probe<'_> {
    /// The counts of the function.
    pub(super) fn counts(&self) -> Result<Counts, BoxError> {
        counts(self.service, self.function..self.function + 1)
    }

    /// Waits for a VM in a state. Returns its id.
    pub(super) fn wait(&self, is_one: &dyn Fn(&Value) -> bool, state: &str) -> Result<String, BoxError> {
        let mut wait = Wait::new(format!("a VM in the state `{state}`"), READY);
        loop {
            let vms = self.service.ask("GET", "/vms", None)?;
            let found = vms.as_array().into_iter().flatten().find(|vm| is_one(vm));
            if let Some(id) = found.and_then(|vm| vm["vmId"].as_str()) {
                return Ok(id.to_string());
            }
            if wait.is_over() {
                return refuse(format!("Cannot measure VMs in the state `{state}`: none after {} s", READY.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Invokes the function, with the keys of `more`.
    pub(super) fn ask(&self, more: &Value) -> Result<Answered, BoxError> {
        let mut body = invocation(self.function, self.workload);
        body.extend(more.as_object().cloned().unwrap_or_default());
        let (work, answer) = self.timed("POST", "/invocations", Some(&Value::Object(body)))?;
        if answer["ok"] != true {
            return refuse(format!("Cannot measure function `{}`: the guest answers `{}`", self.workload.call, answer));
        }
        match answer["vmId"].as_str() {
            Some(vm) => {
                let origin = answer["origin"].as_str().unwrap_or_default().to_string();
                Ok(Answered { work, vm: vm.to_string(), origin })
            }
            None => refuse("tvmm serve has answered without `vmId`"),
        }
    }

    pub(super) fn timed(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(Work, Value), BoxError> {
        let before = self.cpu()?;
        let begun = Instant::now();
        let answer = self.service.ask(method, path, body)?;
        let ms = begun.elapsed().as_secs_f64() * 1000.0;
        let (_, cpu_ms) = self.cpu()?.since(before);
        // Several CPUs may have worked.
        Ok((Work { ms, cpu_ms: cpu_ms.min(ms) }, answer))
    }

    pub(super) fn cpu(&self) -> Result<CpuTime, BoxError> {
        CpuTime::of(self.service.pid())
    }

    pub(super) fn memory_of(&self, vm: &str) -> Result<f64, BoxError> {
        Ok(mib(of(&[self.pid_of(vm)?]).own_kib()))
    }

    pub(super) fn pid_of(&self, vm: &str) -> Result<u32, BoxError> {
        let record = self.service.ask("GET", &format!("/vms/{vm}"), None)?;
        Ok(record["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap_or_default())
    }
}
