//! VMs that serve requests by the policy `ladder`: the memory that they give back at the end of each window.

use std::time::{Duration, Instant};

use serde_json::json;

use super::super::costs::WindowCosts;
use super::super::samples::Work;
use super::super::stage::{WindowCounts, put};
use super::probe::{Probe, READY, REST, samples};
use crate::snapshot::PAGE_SIZE;
use crate::sys::bounded_wait::Wait;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::idle::{GiveBack, IdlePolicy, IdleSpec};
use crate::tiering::window::{AfterRequest, TrackingCost, WindowEnd, Windows};

/// VMs that are measured.
const VMS: usize = 3;
/// Windows that are measured: the last of them ends with request 31.
const MOST: usize = 5;
/// Pause between two looks at the counts.
const LOOK: Duration = Duration::from_millis(1);
/// Idle time after which a VM would take a step, which none reaches.
const NEVER_MS: u64 = 86_400_000;

/// The end of a window of one VM.
struct Ended {
    give: Work,
    pages: WindowEnd,
    mib: f64,
    request: Work,
    after_mib: f64,
}

impl Probe<'_> {
    /// The costs of the ends of windows, in their order, until the VM gives no memory back any more.
    pub(super) fn windows(&self) -> Result<Vec<WindowCosts>, BoxError> {
        let idle = IdleSpec {
            floor_ms: Some(NEVER_MS),
            cap_ms: Some(NEVER_MS),
            give_back: Some(GiveBack::Always),
            ..IdleSpec::of(IdlePolicy::Ladder)
        };
        let settings = json!({ "idle": idle });
        put(self.service, self.function, self.workload, settings.as_object().cloned().unwrap_or_default())?;
        let mut all: Vec<Vec<Ended>> = Vec::new();
        for _ in 0..VMS {
            for (index, end) in self.windows_of_vm()?.into_iter().enumerate() {
                if index == all.len() {
                    all.push(Vec::new());
                }
                all[index].push(end);
            }
        }
        let costs = |ends: &Vec<Ended>| {
            let times = |time: fn(&Ended) -> Work| samples("the ends of windows", ends.iter().map(time).collect());
            let mean = |mib: fn(&Ended) -> f64| ends.iter().map(mib).sum::<f64>() / ends.len() as f64;
            let Some(last) = ends.last() else { return refuse("Cannot measure the ends of windows: there was none") };
            Ok(WindowCosts {
                give: times(|end| end.give)?,
                pages: last.pages,
                mib: mean(|end| end.mib),
                request: times(|end| end.request)?,
                after_mib: mean(|end| end.after_mib),
            })
        };
        all.iter().map(costs).collect()
    }

    /// Lets a VM serve requests until no further window ends, or the service puts the end of one off: it has counted
    /// more time for the ends before than was seen here.
    fn windows_of_vm(&self) -> Result<Vec<Ended>, BoxError> {
        let mut windows = Windows::default();
        let mut ends = Vec::new();
        let mut recalled_ever = 0;
        let mut before = self.counts()?.windows;
        let mut vm = self.ask(&json!({}))?.vm;
        let answered = Instant::now();
        let mut cost = TrackingCost::default();
        while ends.len() < MOST && !windows.are_over() {
            let mut given = None;
            if matches!(windows.after_request(cost, answered.elapsed()), AfterRequest::Shrink(_)) {
                let Some((give, now)) = self.end_of_window(before)? else { break };
                // A little more than the service counts.
                cost.add(Duration::from_secs_f64(give.ms / 1000.0) + LOOK);
                recalled_ever += (now.recalled - before.recalled) / PAGE_SIZE;
                let end = (now.done > before.done).then(|| WindowEnd {
                    given: (now.freed - before.freed) / PAGE_SIZE,
                    recalled_ever,
                    local: now.local / PAGE_SIZE,
                    away: now.away / PAGE_SIZE,
                });
                windows.ended(end);
                given = Some((give, end.unwrap_or(WindowEnd { recalled_ever, ..WindowEnd::default() })));
            }
            let mib = self.memory_of(&vm)?;
            // The service puts the end of a window off until the VM has lived for so long.
            std::thread::sleep(cost.life_needed().saturating_sub(answered.elapsed()).max(REST));
            before = self.counts()?.windows;
            let asked = self.ask(&json!({}))?;
            vm = asked.vm;
            if let Some((give, pages)) = given {
                let after_mib = self.memory_of(&vm)?;
                ends.push(Ended { give, pages, mib, request: asked.work, after_mib });
            }
        }
        self.service.ask("DELETE", &format!("/vms/{vm}"), None)?;
        Ok(ends)
    }

    /// Waits for the end of a window after the request that was answered just now. Returns its time, and the counts;
    /// `None`: the service has put it off.
    fn end_of_window(&self, before: WindowCounts) -> Result<Option<(Work, WindowCounts)>, BoxError> {
        let answered = Instant::now();
        let cpu = self.cpu()?;
        let mut wait = Wait::new("the end of a window", READY);
        loop {
            let now = self.counts()?.windows;
            if now.done + now.refused > before.done + before.refused {
                let ms = answered.elapsed().as_secs_f64() * 1000.0;
                // The service itself is busy with these looks.
                let (cpu_ms, _) = self.cpu()?.since(cpu);
                return Ok(Some((Work { ms, cpu_ms: cpu_ms.min(ms) }, now)));
            }
            if now.put_off > before.put_off {
                return Ok(None);
            }
            if wait.is_over() {
                return refuse(format!("Cannot measure the ends of windows: none after {} s", READY.as_secs()));
            }
            std::thread::sleep(LOOK);
        }
    }
}
