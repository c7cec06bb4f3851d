//! Measures the costs of each workload, one request at a time, on the service that the trace will run on.

mod lives;
mod probe;
mod windows;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::costs::{Costs, KeptCosts, StepCosts, VERSION, WorkloadCosts};
use super::memory::{children, mib, of};
use super::outcome::rank;
use super::policy::{Processes, Set};
use super::samples::{Samples, Work};
use super::service::{Limits, Service};
use super::stage::{name, put};
use super::workload::Workloads;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::idle::{IdlePolicy, IdleSpec, Step};
use lives::Lives;
use probe::{Answered, Probe, REST, RUNS, samples};

/// The most VMs that live at once.
const AT_ONCE: u64 = 8;
/// Requests to each VM that has served one.
const WARM: usize = 4;
/// Idle time after which a VM takes its step.
const IDLE_MS: u64 = 600;
/// The same of steps after which none follows soon.
const SHORT_IDLE_MS: u64 = 200;
/// Requests to VMs at each step.
const STEPS: usize = 5;
/// Time for the process of a finished VM to be there for the next one. The service keeps it for 1 s.
const FINISHED: Duration = Duration::from_millis(150);

/// Costs of VMs that are restored, asked again, and rewound.
#[derive(Default)]
struct Served {
    restored: Vec<Work>,
    warm: Vec<Work>,
    rewind: Vec<Work>,
    rewound: Vec<Work>,
    used_mib: f64,
    rewound_mib: f64,
    reused_mib: f64,
}

/// Measures all workloads by services of its own on `dir`.
pub(super) fn measure(
    dir: &std::path::Path,
    limits: Limits,
    workloads: &Workloads,
    cpus: usize,
) -> Result<Costs, BoxError> {
    let mut probed = Vec::new();
    for (workload_name, workload) in &workloads.all {
        let function = workloads.of.iter().position(|of| of == workload_name);
        probed.extend(function.map(|function| (workload_name, function, workload)));
    }
    let service = Service::start(dir, limits, Processes::End)?;
    let mut lives = BTreeMap::new();
    for &(workload_name, function, workload) in &probed {
        lives.insert(workload_name, Probe { service: &service, function, workload }.lives()?);
    }
    service.end()?;
    let service = Service::start(dir, limits, Processes::Shared)?;
    let mut all = BTreeMap::new();
    for (workload_name, function, workload) in probed {
        let Some(lives) = lives.remove(workload_name) else { continue };
        let room = (limits.memory_mib / workload.mem_mib).min(limits.max_vms as u64).min(AT_ONCE);
        all.insert(workload_name.clone(), Probe { service: &service, function, workload }.costs(lives, room)?);
    }
    // No VM lives now.
    std::thread::sleep(FINISHED);
    let shells = of(&children(service.pid()));
    service.end()?;
    let tvmm_version = env!("CARGO_PKG_VERSION").to_string();
    Ok(Costs { version: VERSION, tvmm_version, cpus, shells_mib: mib(shells.own_kib()), workloads: all })
}

impl Probe<'_> {
    /// `room`: VMs that may live at once.
    fn costs(&self, lives: Lives, room: u64) -> Result<WorkloadCosts, BoxError> {
        let grown = self.grown(room)?;
        let served = self.served()?;
        let repurposed = self.repurposed()?;
        let kept = self.kept(served.used_mib)?;
        let (standby, standby_mib) = self.standby()?;
        // All of a VM is offloaded at once, which is the same as the ladder's step, and comes sooner.
        let offload =
            IdleSpec { floor_ms: Some(SHORT_IDLE_MS), offload_ms: Some(1), ..IdleSpec::of(IdlePolicy::Faasmem) };
        let spilled = self.descended(&offload, Step::Spilled)?;
        let ladder = IdleSpec { floor_ms: Some(IDLE_MS), ..IdleSpec::of(IdlePolicy::Ladder) };
        let trimmed = self.descended(&ladder, Step::Trimmed)?;
        let suspend = IdleSpec { keep_alive_ms: Some(SHORT_IDLE_MS), ..IdleSpec::of(IdlePolicy::Suspend) };
        let woken = self.descended(&suspend, Step::Suspended)?;
        let Some(suspended) = woken else {
            return refuse("Cannot measure suspended VMs: no request found its VM suspended");
        };
        let windows = self.windows()?;
        put(self.service, self.function, self.workload, Map::new())?;
        Ok(WorkloadCosts {
            workload: self.workload.clone(),
            restored: samples("restores", served.restored)?,
            grown,
            repurposed,
            warm: samples("requests to VMs that wait", served.warm)?,
            standby,
            rewound: samples("requests to VMs that were rewound", served.rewound)?,
            rewind: samples("rewinds", served.rewind)?,
            end: lives.end,
            gone: lives.gone,
            kept,
            trimmed,
            spilled,
            woken: suspended.request,
            suspend: suspended.step,
            windows: Some(windows),
            starting_mib: Some(lives.starting_mib),
            used_mib: served.used_mib,
            standby_mib,
            rewound_mib: served.rewound_mib,
            reused_mib: served.reused_mib,
            woken_mib: suspended.after_mib,
        })
    }

    /// The times of requests whose VMs are restored while those before live on. The first one is not counted: it may
    /// have memory that others have given back.
    fn grown(&self, room: u64) -> Result<Option<Samples>, BoxError> {
        put(self.service, self.function, self.workload, Map::new())?;
        let mut times = Vec::new();
        let mut vms = Vec::new();
        for number in 0..room {
            let Answered { work, vm, .. } = self.ask(&json!({ "keep": true }))?;
            vms.push(vm);
            times.extend((number > 0).then_some(work));
        }
        for vm in vms {
            self.service.ask("DELETE", &format!("/vms/{vm}"), None)?;
        }
        Ok(Samples::of(times))
    }

    /// Restores VMs, asks them again, and rewinds them. The times of the first one are not counted.
    fn served(&self) -> Result<Served, BoxError> {
        put(self.service, self.function, self.workload, Map::new())?;
        let mut served = Served::default();
        for run in 0..RUNS {
            if run == 1 {
                served = Served::default();
            }
            let Answered { work, vm, .. } = self.ask(&json!({ "keep": true }))?;
            served.restored.push(work);
            for _ in 0..WARM {
                std::thread::sleep(REST);
                served.warm.push(self.ask(&json!({ "vmId": vm }))?.work);
            }
            served.used_mib = self.memory_of(&vm)?;
            served.rewind.push(self.timed("POST", &format!("/vms/{vm}/rewind"), Some(&json!({})))?.0);
            served.rewound_mib = self.memory_of(&vm)?;
            std::thread::sleep(REST);
            served.rewound.push(self.ask(&json!({ "vmId": vm }))?.work);
            served.reused_mib = self.memory_of(&vm)?;
            self.service.ask("DELETE", &format!("/vms/{vm}"), None)?;
        }
        Ok(served)
    }

    /// The time of a request whose VM takes over the process of the one before it.
    fn repurposed(&self) -> Result<Option<Samples>, BoxError> {
        let mut times = Vec::new();
        for run in 0..=RUNS {
            let before = self.counts()?.repurposed;
            let work = self.ask(&json!({ "keep": false }))?.work;
            if run > 0 && self.counts()?.repurposed > before {
                times.push(work);
            }
            std::thread::sleep(FINISHED);
        }
        Ok(Samples::of(times))
    }

    /// The time for which the memory of a VM that has served and finished stays, which was `used_mib`, and what its
    /// process has afterwards.
    fn kept(&self, used_mib: f64) -> Result<Option<KeptCosts>, BoxError> {
        let mut times = Vec::new();
        let mut after_mib = 0.0;
        for _ in 0..RUNS {
            let Answered { vm, .. } = self.ask(&json!({ "keep": false }))?;
            let answered = Instant::now();
            let before = self.cpu()?;
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
            let (cpu_ms, _) = self.cpu()?.since(before);
            times
                .extend(samples.iter().find(is_gone).map(|(at_ms, _)| Work { ms: *at_ms, cpu_ms: cpu_ms.min(*at_ms) }));
        }
        // A kept process would become the next VM that stands by.
        std::thread::sleep(Duration::from_secs(1));
        Ok(Samples::of(times).map(|vacate| KeptCosts { vacate, mib: after_mib }))
    }

    /// The time of the first request of a VM that stands by, and its memory before.
    fn standby(&self) -> Result<(Samples, f64), BoxError> {
        let set = Set { min: 1, max: 1 };
        let settings = json!({ "standby": { "min": set.min, "max": set.max }, "after": "end" });
        put(self.service, self.function, self.workload, settings.as_object().cloned().unwrap_or_default())?;
        let mut times = Vec::new();
        let mut memory_mib = 0.0;
        for _ in 0..RUNS {
            let vm = self.ready()?;
            memory_mib = self.memory_of(&vm)?;
            times.push(self.ask(&json!({}))?.work);
            std::thread::sleep(FINISHED);
        }
        times.remove(0);
        Ok((samples("requests to VMs that stand by", times)?, memory_mib))
    }

    /// The costs of a VM that waits by the policy `spec` until it is at `step`, and is asked again. `None`: each
    /// request found its VM at another step.
    fn descended(&self, spec: &IdleSpec, step: Step) -> Result<Option<StepCosts>, BoxError> {
        let settings = json!({ "idle": spec });
        put(self.service, self.function, self.workload, settings.as_object().cloned().unwrap_or_default())?;
        // The service may take a further step before this one is seen.
        let reached: Vec<&str> = Step::ALL.into_iter().filter(|other| *other >= step).map(Step::name).collect();
        let is_there = |record: &Value| record["state"].as_str().is_some_and(|state| reached.contains(&state));
        let mut vm = self.ask(&json!({}))?.vm;
        let mut requests = Vec::new();
        let mut steps = Vec::new();
        let mut mib = Vec::new();
        let mut after_mib = Vec::new();
        for _ in 0..STEPS {
            let (done_before, took_before_us) = self.counts()?.steps[step as usize];
            let before = self.cpu()?;
            self.wait(&|record| record["vmId"] == vm.as_str() && is_there(record), step.name())?;
            // The service itself is busy with the looks at its VMs.
            let (cpu_ms, _) = self.cpu()?.since(before);
            let before_mib = self.memory_of(&vm)?;
            let again = self.ask(&json!({}))?;
            vm = again.vm;
            let (done, took_us) = self.counts()?.steps[step as usize];
            if done > done_before {
                let ms = (took_us - took_before_us) as f64 / 1000.0 / (done - done_before) as f64;
                steps.push(Work { ms, cpu_ms: ms.min(cpu_ms) });
            }
            if again.origin == step.name() {
                requests.push(again.work);
                mib.push(before_mib);
                after_mib.push(self.memory_of(&vm)?);
            }
        }
        self.service.ask("DELETE", &format!("/vms/{vm}"), None)?;
        // Each fifth suspension is a full snapshot, after which a VM has more memory than after the others.
        let typical = |mut sizes: Vec<f64>| {
            sizes.sort_by(f64::total_cmp);
            rank(&sizes, 0.5)
        };
        let mib = typical(mib);
        let after_mib = typical(after_mib);
        let costs = |(request, step)| StepCosts { request, step, mib, after_mib };
        Ok(Samples::of(requests).zip(Samples::of(steps)).map(costs))
    }

    /// The VM that stands by.
    fn ready(&self) -> Result<String, BoxError> {
        let function = name(self.function);
        let is_one = |vm: &Value| vm["state"] == "standby" && vm["func_name"] == function.as_str();
        self.wait(&is_one, "standby")
    }
}
