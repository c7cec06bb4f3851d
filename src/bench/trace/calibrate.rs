//! Measures the costs of each workload, one request at a time, on the service that the trace will run on.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::costs::{Costs, KeptCosts, StepCosts, VERSION, WorkloadCosts};
use super::memory::{children, mib, of};
use super::outcome::rank;
use super::policy::{Processes, Set};
use super::service::{Limits, Service};
use super::stage::{counts, invocation, name, put};
use super::workload::{Workload, Workloads};
use crate::sys::bounded_wait::Wait;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::idle::{IdlePolicy, IdleSpec, Step};

/// Requests of each kind, of which the first of a kind is not counted.
const RUNS: usize = 6;
/// Idle time after which a VM takes its step.
const IDLE_MS: u64 = 600;
/// Requests to VMs at each step.
const STEPS: usize = 3;
/// Time for the process of a finished VM to be there for the next one. The service keeps it for 1 s.
const FINISHED: Duration = Duration::from_millis(150);
/// Time for a VM to stand by, or to take a step.
const READY: Duration = Duration::from_secs(60);

/// A function whose costs are measured.
struct Probe<'a> {
    service: &'a Service,
    function: usize,
    workload: &'a Workload,
}

/// An answered request.
struct Answered {
    ms: f64,
    vm: String,
    /// The state in which the VM was found, or the way in which it was made.
    origin: String,
}

/// Measures all workloads by a service of its own on `dir`.
pub(super) fn measure(
    dir: &std::path::Path,
    limits: Limits,
    workloads: &Workloads,
    cpus: usize,
) -> Result<Costs, BoxError> {
    let service = Service::start(dir, limits, Processes::Shared)?;
    let mut all = BTreeMap::new();
    for (workload_name, workload) in &workloads.all {
        let Some(function) = workloads.of.iter().position(|of| of == workload_name) else { continue };
        all.insert(workload_name.clone(), Probe { service: &service, function, workload }.costs()?);
    }
    // No VM lives now.
    std::thread::sleep(FINISHED);
    let shells = of(&children(service.pid()));
    service.end()?;
    let tvmm_version = env!("CARGO_PKG_VERSION").to_string();
    Ok(Costs { version: VERSION, tvmm_version, cpus, shells_mib: mib(shells.own_kib()), workloads: all })
}

impl Probe<'_> {
    fn costs(&self) -> Result<WorkloadCosts, BoxError> {
        let mut restored = Vec::new();
        let mut warm = Vec::new();
        let mut rewind = Vec::new();
        let mut rewound = Vec::new();
        let mut end = Vec::new();
        let mut used_mib = 0.0;
        let mut rewound_mib = 0.0;
        let mut reused_mib = 0.0;
        put(self.service, self.function, self.workload, Map::new())?;
        for _ in 0..RUNS {
            let Answered { ms, vm, .. } = self.ask(&json!({ "keep": true }))?;
            restored.push(ms);
            warm.push(self.ask(&json!({ "vmId": vm }))?.ms);
            used_mib = self.memory_of(&vm)?;
            rewind.push(self.timed("POST", &format!("/vms/{vm}/rewind"), Some(&json!({})))?);
            rewound_mib = self.memory_of(&vm)?;
            rewound.push(self.ask(&json!({ "vmId": vm }))?.ms);
            reused_mib = self.memory_of(&vm)?;
            end.push(self.timed("DELETE", &format!("/vms/{vm}"), None)?);
        }
        let repurposed_ms = self.repurposed()?;
        let kept = self.kept(used_mib)?;
        let (standby_ms, standby_mib) = self.standby()?;
        let ladder = IdleSpec { floor_ms: Some(IDLE_MS), ..IdleSpec::of(IdlePolicy::Ladder) };
        let trimmed = self.descended(&ladder, Step::Trimmed)?;
        // All of a VM is offloaded at once, which is the same as the ladder's step, and comes sooner.
        let offload = IdleSpec { floor_ms: Some(IDLE_MS), offload_ms: Some(1), ..IdleSpec::of(IdlePolicy::Faasmem) };
        let spilled = self.descended(&offload, Step::Spilled)?;
        let suspend = IdleSpec { keep_alive_ms: Some(IDLE_MS), ..IdleSpec::of(IdlePolicy::Suspend) };
        let woken = self.descended(&suspend, Step::Suspended)?;
        let Some(suspended) = woken else {
            return refuse("Cannot measure suspended VMs: no request found its VM suspended");
        };
        put(self.service, self.function, self.workload, Map::new())?;
        Ok(WorkloadCosts {
            workload: self.workload.clone(),
            restored_ms: median(restored),
            repurposed_ms,
            warm_ms: median(warm),
            standby_ms,
            rewound_ms: median(rewound),
            rewind_ms: median(rewind),
            end_ms: median(end),
            kept,
            trimmed,
            spilled,
            woken_ms: suspended.request_ms,
            suspend_ms: suspended.step_ms,
            used_mib,
            standby_mib,
            rewound_mib,
            reused_mib,
            woken_mib: suspended.after_mib,
        })
    }

    /// The time of a request whose VM takes over the process of the one before it.
    fn repurposed(&self) -> Result<Option<f64>, BoxError> {
        let functions = self.function + 1;
        let mut times = Vec::new();
        for run in 0..=RUNS {
            let before = counts(self.service, functions)?.repurposed;
            let ms = self.ask(&json!({ "keep": false }))?.ms;
            if run > 0 && counts(self.service, functions)?.repurposed > before {
                times.push(ms);
            }
            std::thread::sleep(FINISHED);
        }
        Ok((!times.is_empty()).then(|| median_of(times)))
    }

    /// The time for which the memory of a VM that has served and finished stays, which was `used_mib`, and what its
    /// process has afterwards.
    fn kept(&self, used_mib: f64) -> Result<Option<KeptCosts>, BoxError> {
        let mut times = Vec::new();
        let mut after_mib = 0.0;
        for _ in 0..RUNS {
            let Answered { vm, .. } = self.ask(&json!({ "keep": false }))?;
            let answered = Instant::now();
            let pid = self.pid_of(&vm)?;
            let mut samples = Vec::new();
            while answered.elapsed() < FINISHED {
                let at_ms = answered.elapsed().as_secs_f64() * 1000.0;
                samples.push((at_ms, mib(of(&[pid]).own_kib())));
                std::thread::sleep(Duration::from_millis(1));
            }
            // The last one is 0 if the process was not kept.
            let Some((_, last)) = samples.last().copied().filter(|(_, last)| *last > 0.0) else { continue };
            after_mib = last;
            let is_gone = |(_, mib): &&(f64, f64)| *mib <= (used_mib + last) / 2.0;
            times.extend(samples.iter().find(is_gone).map(|(at_ms, _)| *at_ms));
        }
        // A kept process would become the next VM that stands by.
        std::thread::sleep(Duration::from_secs(1));
        Ok((!times.is_empty()).then(|| KeptCosts { vacate_ms: median_of(times), mib: after_mib }))
    }

    /// The time of the first request of a VM that stands by, and its memory before.
    fn standby(&self) -> Result<(f64, f64), BoxError> {
        let set = Set { min: 1, max: 1 };
        let settings = json!({ "standby": { "min": set.min, "max": set.max }, "after": "end" });
        put(self.service, self.function, self.workload, settings.as_object().cloned().unwrap_or_default())?;
        let mut times = Vec::new();
        let mut memory_mib = 0.0;
        for _ in 0..RUNS {
            let vm = self.ready()?;
            memory_mib = self.memory_of(&vm)?;
            times.push(self.ask(&json!({}))?.ms);
            std::thread::sleep(FINISHED);
        }
        Ok((median(times), memory_mib))
    }

    /// The costs of a VM that waits by the policy `spec` until it is at `step`, and is asked again. `None`: each
    /// request found its VM at another step.
    fn descended(&self, spec: &IdleSpec, step: Step) -> Result<Option<StepCosts>, BoxError> {
        let settings = json!({ "idle": spec });
        put(self.service, self.function, self.workload, settings.as_object().cloned().unwrap_or_default())?;
        // The service may take a further step before this one is seen.
        let reached: Vec<&str> = Step::ALL.into_iter().filter(|other| *other >= step).map(Step::name).collect();
        let is_there = |record: &Value| record["state"].as_str().is_some_and(|state| reached.contains(&state));
        let (done_before, took_before_us) = self.steps(step)?;
        let mut vm = self.ask(&json!({}))?.vm;
        let mut requests = Vec::new();
        let mut mib = 0.0;
        let mut after_mib = 0.0;
        for _ in 0..STEPS {
            self.wait(&|record| record["vmId"] == vm.as_str() && is_there(record), step.name())?;
            let before_mib = self.memory_of(&vm)?;
            let again = self.ask(&json!({}))?;
            vm = again.vm;
            if again.origin == step.name() {
                requests.push(again.ms);
                mib = before_mib;
                after_mib = self.memory_of(&vm)?;
            }
        }
        self.service.ask("DELETE", &format!("/vms/{vm}"), None)?;
        let (done, took_us) = self.steps(step)?;
        if requests.is_empty() || done == done_before {
            return Ok(None);
        }
        let step_ms = (took_us - took_before_us) as f64 / 1000.0 / (done - done_before) as f64;
        Ok(Some(StepCosts { request_ms: median_of(requests), step_ms, mib, after_mib }))
    }

    /// The number of such steps that were done, and their time, µs.
    fn steps(&self, step: Step) -> Result<(u64, u64), BoxError> {
        Ok(counts(self.service, self.function + 1)?.steps[step as usize])
    }

    /// The VM that stands by.
    fn ready(&self) -> Result<String, BoxError> {
        let function = name(self.function);
        let is_one = |vm: &Value| vm["state"] == "standby" && vm["func_name"] == function.as_str();
        self.wait(&is_one, "standby")
    }

    /// Waits for a VM in a state. Returns its id.
    fn wait(&self, is_one: &dyn Fn(&Value) -> bool, state: &str) -> Result<String, BoxError> {
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
    fn ask(&self, more: &Value) -> Result<Answered, BoxError> {
        let mut body = invocation(self.function, self.workload);
        body.extend(more.as_object().cloned().unwrap_or_default());
        let begun = Instant::now();
        let answer = self.service.ask("POST", "/invocations", Some(&Value::Object(body)))?;
        let ms = begun.elapsed().as_secs_f64() * 1000.0;
        if answer["ok"] != true {
            return refuse(format!("Cannot measure function `{}`: the guest answers `{}`", self.workload.call, answer));
        }
        match answer["vmId"].as_str() {
            Some(vm) => {
                let origin = answer["origin"].as_str().unwrap_or_default().to_string();
                Ok(Answered { ms, vm: vm.to_string(), origin })
            }
            None => refuse("tvmm serve has answered without `vmId`"),
        }
    }

    fn timed(&self, method: &str, path: &str, body: Option<&Value>) -> Result<f64, BoxError> {
        let begun = Instant::now();
        self.service.ask(method, path, body)?;
        Ok(begun.elapsed().as_secs_f64() * 1000.0)
    }

    fn memory_of(&self, vm: &str) -> Result<f64, BoxError> {
        Ok(mib(of(&[self.pid_of(vm)?]).own_kib()))
    }

    fn pid_of(&self, vm: &str) -> Result<u32, BoxError> {
        let record = self.service.ask("GET", &format!("/vms/{vm}"), None)?;
        Ok(record["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap_or_default())
    }
}

/// The median of the counted times.
fn median(mut times: Vec<f64>) -> f64 {
    times.remove(0);
    median_of(times)
}

fn median_of(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    rank(&times, 0.5)
}
