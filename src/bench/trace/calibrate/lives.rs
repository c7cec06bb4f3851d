//! VMs that end with their answer: the memory that they have meanwhile, and the time until it is gone.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Map, json};

use super::super::memory::{children, mib, of};
use super::super::samples::{Samples, Work};
use super::super::stage::put;
use super::probe::{Probe, RUNS, samples};
use crate::sys::bounded_wait::Wait;
use crate::sys::errors::{BoxError, refuse};

/// Pause between two looks at the memory of the processes.
const LOOK: Duration = Duration::from_micros(500);
/// Time for a VM to end.
const END: Duration = Duration::from_secs(60);

/// Costs of VMs that end with their answer.
pub(super) struct Lives {
    /// Local memory of a VM from its restore to its answer, the mean over that time.
    pub(super) starting_mib: f64,
    /// From the answer to the end of the process.
    pub(super) end: Samples,
    /// The part of it until the memory is gone.
    pub(super) gone: Samples,
}

/// Local memory of a process at a moment.
struct Look {
    at: Instant,
    pid: u32,
    mib: f64,
}

/// Looks at the memory of all processes that `parent` has started, until `is_over`.
fn looks(parent: u32, is_over: &AtomicBool) -> Vec<Look> {
    let mut looks = Vec::new();
    while !is_over.load(Ordering::Relaxed) {
        for pid in children(parent) {
            let at = Instant::now();
            looks.push(Look { at, pid, mib: mib(of(&[pid]).own_kib()) });
        }
        std::thread::sleep(LOOK);
    }
    looks
}

/// The time from the answer of a VM until its memory was gone: half way between two looks.
fn gone_after(looks: &[Look], ended: &Ended) -> Duration {
    let of_vm = || looks.iter().filter(|look| look.pid == ended.pid);
    let most = of_vm().map(|look| look.mib).fold(0.0, f64::max);
    let last = of_vm().filter(|look| look.mib > most / 2.0).map(|look| look.at).max();
    let last = last.unwrap_or(ended.answered).max(ended.answered);
    let next = looks.iter().map(|look| look.at).find(|at| *at > last).unwrap_or(last);
    (last - ended.answered) + (next - last) / 2
}

/// A VM from its restore to its end.
struct Life {
    starting_mib: f64,
    end: Work,
    gone: Work,
}

impl Probe<'_> {
    /// Measures VMs that end with their answer. Their service keeps no processes.
    pub(super) fn lives(&self) -> Result<Lives, BoxError> {
        put(self.service, self.function, self.workload, Map::new())?;
        let mut end = Vec::new();
        let mut gone = Vec::new();
        let mut starting_mib = 0.0;
        for run in 0..RUNS {
            let life = self.life()?;
            if run > 0 {
                starting_mib += life.starting_mib / (RUNS - 1) as f64;
                end.push(life.end);
                gone.push(life.gone);
            }
        }
        let end = samples("the ends of VMs", end)?.with_even_work();
        Ok(Lives { starting_mib, end, gone: samples("the ends of VMs", gone)?.with_even_work() })
    }

    fn life(&self) -> Result<Life, BoxError> {
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let look = || looks(self.service.pid(), &is_over);
            let looking = std::thread::Builder::new().name("memory".into()).spawn_scoped(scope, look);
            let looking = looking.map_err(|error| format!("Cannot start a thread that samples memory: {error}"))?;
            let begun = Instant::now();
            let ended = self.live_and_end();
            is_over.store(true, Ordering::Relaxed);
            let looks = looking.join().or_else(|_| refuse("The thread that samples memory has panicked"))?;
            let ended = ended?;
            let of_vm = || looks.iter().filter(|look| look.pid == ended.pid);
            let starting = of_vm().filter(|look| (begun..ended.answered).contains(&look.at));
            let starting: Vec<f64> = starting.map(|look| look.mib).collect();
            let gone_ms = gone_after(&looks, &ended).as_secs_f64() * 1000.0;
            Ok(Life {
                starting_mib: starting.iter().sum::<f64>() / starting.len().max(1) as f64,
                end: ended.end,
                gone: ended.end.part((gone_ms / ended.end.ms).min(1.0)),
            })
        })
    }

    /// Lets a VM serve one request, and waits for the end of its process.
    fn live_and_end(&self) -> Result<Ended, BoxError> {
        let vm = self.ask(&json!({ "keep": false }))?.vm;
        let answered = Instant::now();
        let before = self.cpu()?;
        let pid = self.pid_of(&vm)?;
        let mut wait = Wait::new("the end of a VM", END);
        while children(self.service.pid()).contains(&pid) {
            if wait.is_over() {
                return refuse(format!("Cannot measure the end of a VM: it lives after {} s", END.as_secs()));
            }
            std::thread::sleep(LOOK);
        }
        let ms = answered.elapsed().as_secs_f64() * 1000.0;
        let (cpu_ms, _) = self.cpu()?.since(before);
        Ok(Ended { pid, answered, end: Work { ms, cpu_ms: cpu_ms.min(ms) } })
    }
}

/// A VM whose process has ended.
struct Ended {
    pid: u32,
    answered: Instant,
    end: Work,
}
