//! `tvmm bench burst`: many VMs are asked at the same moment, and each one's time to its first answer counts.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::flow::{Flow, Many, Restore};
use super::foreign::{Foreign, POLL};
use super::many::{answer_values, memory_of};
use super::measure::{Study, scratch_of};
use super::settings::Experiment;
use super::socket_watch::SocketWatch;
use super::store::{Key, Measured, Values};
use super::subject::Subject;
use super::together::{Together, together};
use super::waiting::wakes;
use super::workload::Workload;
use crate::bench::cache::evict;
use crate::bench::guest::Guest;
use crate::bench::load::busy_cpus;
use crate::sys::available_memory::available_memory;
use crate::sys::errors::{BoxError, refuse};
use crate::sys::process_memory::ProcessMemory;

/// The share of the available memory that the VMs may take, percent.
const MEMORY_SHARE: u64 = 80;
/// Longest wait for the news of a socket, before the VMM is looked after.
const NEWS: Duration = Duration::from_millis(20);

/// A VM that has answered, and lives on.
struct Answered {
    guest: Guest,
    at: Instant,
    digest: String,
}

/// VMs that have answered, and live on.
struct Burst {
    guests: Vec<Guest>,
    /// Each one's time to its answer, from the moment at which all were asked.
    answers_ms: Vec<f64>,
    /// The times to the guests' first instructions, if they stood by.
    wakes: Values,
}

impl Study {
    /// Looks at one VM of each flow that has a burst to be measured.
    ///
    /// # Errors
    /// The host has too little memory for the largest burst.
    pub fn check_room_of_bursts(&mut self) -> Result<(), BoxError> {
        if !self.settings.experiments.contains(&Experiment::Burst) {
            return Ok(());
        }
        let most = self.settings.most();
        let runs = self.settings.runs;
        for workload in self.settings.workloads.clone() {
            let subject = self.subject(workload)?;
            for flow in self.settings.flows.clone() {
                if (0..runs).all(|round| self.store.has(&key(workload, most, flow, round))) {
                    continue;
                }
                // The measurement itself tells of a VM that fails.
                if let Ok(each_kib) = self.alone_kib(&subject, flow) {
                    check_room(Crowd { workload, flow, count: most }, each_kib)?;
                }
            }
        }
        Ok(())
    }

    /// Asks each number of VMs at once, flow by flow and round by round. The first round is not counted.
    pub fn bursts(&mut self, workload: &'static Workload) -> Result<(), BoxError> {
        let subject = self.subject(workload)?;
        let runs = self.settings.runs;
        for count in self.settings.parallel.clone() {
            let key = |flow: Flow, round| key(workload, count, flow, round);
            let flows = self.settings.flows.clone();
            self.forth_and_back(&subject, &flows, runs, key, |study, flow| study.burst(&subject, flow, count))?;
        }
        Ok(())
    }

    /// Asks one VM alone, then `count` VMs at once.
    fn burst(&mut self, subject: &Subject, flow: Flow, count: u32) -> Result<Measured, BoxError> {
        // The VM alone makes the files that policies derive from a snapshot, and shows the memory that each needs.
        let each_kib = self.alone_kib(subject, flow)?;
        check_room(Crowd { workload: subject.workload, flow, count }, each_kib)?;
        let load = busy_cpus()?;
        let Burst { guests, answers_ms, wakes } = self.answered(subject, flow, count)?;
        drop(guests);
        let mut values = answer_values(answers_ms.clone())?;
        values.extend(wakes);
        values.insert("load_before_cpus".to_string(), load);
        values.insert("alone_mib".to_string(), each_kib / 1024.0);
        Ok(Measured { values, answers_ms })
    }

    /// The memory of a VM that is asked alone.
    fn alone_kib(&mut self, subject: &Subject, flow: Flow) -> Result<f64, BoxError> {
        let alone = self.answered(subject, flow, 1)?;
        let mut memory = ProcessMemory::default();
        for guest in &alone.guests {
            memory += memory_of(guest)?;
        }
        Ok(memory.own_kib() as f64)
    }

    /// Asks `count` VMs at once, and waits for all answers.
    fn answered(&mut self, subject: &Subject, flow: Flow, count: u32) -> Result<Burst, BoxError> {
        match (flow.many(), self.settings.firecracker.clone()) {
            (Some(Many::Waiting(ready)), _) => {
                let subject = self.behind(subject, flow.door())?;
                let mut vms = self.waiting_vms(std::slice::from_ref(&subject), ready, count)?;
                let answers_ms = self.ask_together(&subject, &mut vms)?;
                let wakes = wakes(&vms)?;
                Ok(Burst { guests: vms.into_iter().map(|vm| vm.guest).collect(), answers_ms, wakes })
            }
            (Some(Many::Restored(restore)), _) => {
                let answered = self.restored_together(subject, restore, count)?;
                self.checked(subject, answered)
            }
            (None, Some(vmm)) => {
                let foreign = Foreign::new(&vmm, subject)?;
                foreign.set_cached(flow.cache())?;
                let folder = scratch_of(self.scratch.path(), "foreign")?;
                let answered = loaded_together(&foreign, &subject.asked, &folder, count);
                // Sockets of VMMs that were killed stay behind.
                std::fs::remove_dir_all(&folder)
                    .map_err(|error| format!("Cannot remove {}: {error}", folder.display()))?;
                self.checked(subject, answered?)
            }
            (None, None) => refuse(format!("{flow} needs --firecracker PATH")),
        }
    }

    /// Restores `count` VMs by tvmm at once, each in a separate process and asked over its console.
    fn restored_together(
        &mut self,
        subject: &Subject,
        restore: Restore,
        count: u32,
    ) -> Result<Together<Answered>, BoxError> {
        let trial = self.trial(subject, restore, self.scratch.path().to_owned())?;
        if !restore.cached {
            evict(&subject.snapshot)?;
        }
        together(count as usize, |_| ask(Guest::start(trial.command(restore.policy))?, &subject.asked))
    }

    /// The times of VMs that were asked together, each from the common start.
    ///
    /// # Errors
    /// A VM has failed, or has computed another result than those before.
    fn checked(&mut self, subject: &Subject, together: Together<Answered>) -> Result<Burst, BoxError> {
        let Together { begun, outcomes } = together;
        let count = outcomes.len();
        let mut burst = Burst { guests: Vec::new(), answers_ms: Vec::new(), wakes: Values::new() };
        let mut failures = Vec::new();
        for outcome in outcomes {
            match outcome {
                Ok(Answered { guest, at, digest }) => {
                    self.stage.check_digest(subject, &subject.asked, &digest)?;
                    burst.answers_ms.push((at - begun).as_secs_f64() * 1000.0);
                    burst.guests.push(guest);
                }
                Err(error) => failures.push(error),
            }
        }
        match failures.first() {
            Some(first) => refuse(format!("{} of {count} VMs failed, the first because: {first}", failures.len())),
            None => Ok(burst),
        }
    }
}

fn ask(mut guest: Guest, asked: &str) -> Result<Answered, BoxError> {
    let answered = guest.call(asked)?;
    Ok(Answered { guest, at: answered.at, digest: answered.digest().to_string() })
}

/// Restores `count` VMs by another VMM at once. Their sockets are in `folder`.
fn loaded_together(foreign: &Foreign, asked: &str, folder: &Path, count: u32) -> Result<Together<Answered>, BoxError> {
    let names: Vec<String> = (0..count).map(|index| format!("{index}.sock")).collect();
    let (watch, news) = SocketWatch::new(folder, &names)?;
    let news: Vec<Mutex<Receiver<()>>> = news.into_iter().map(Mutex::new).collect();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let telling = std::thread::Builder::new().spawn_scoped(scope, || watch.tell(&is_over));
        let telling = telling.map_err(|error| format!("Cannot start a thread that watches sockets: {error}"))?;
        let loaded = together(names.len(), |index| {
            let mut is_there = false;
            let pause = || is_there = is_there_after_a_pause(&news[index], is_there);
            ask(foreign.load(&folder.join(&names[index]), &foreign.file(), pause)?, asked)
        });
        is_over.store(true, Ordering::Relaxed);
        match telling.join() {
            Ok(told) => told?,
            Err(_) => return refuse("The thread that watches sockets has panicked"),
        }
        loaded
    })
}

/// Waits for the news that a socket is there, or for a moment if it is and no program listens yet.
fn is_there_after_a_pause(news: &Mutex<Receiver<()>>, is_there: bool) -> bool {
    if !is_there && let Ok(news) = news.lock() {
        match news.recv_timeout(NEWS) {
            Ok(()) => return true,
            Err(RecvTimeoutError::Timeout) => return false,
            Err(RecvTimeoutError::Disconnected) => {}
        }
    }
    std::thread::sleep(POLL);
    is_there
}

/// The VMs of a burst.
#[derive(Clone, Copy)]
struct Crowd {
    workload: &'static Workload,
    flow: Flow,
    count: u32,
}

fn key(workload: &Workload, count: u32, flow: Flow, round: u32) -> Key {
    Key {
        experiment: Experiment::Burst.name().to_string(),
        case: format!("{} ×{count}", workload.name),
        flow: flow.name().to_string(),
        round,
    }
}

/// # Errors
/// The host has too little memory for the VMs, each of which needs `each_kib`: it would end processes.
fn check_room(crowd: Crowd, each_kib: f64) -> Result<(), BoxError> {
    let Crowd { workload, flow, count } = crowd;
    let available = available_memory().map_err(|error| format!("Cannot read the available memory: {error}"))?;
    let most_mib = (available >> 20) * MEMORY_SHARE / 100;
    let need_mib = each_kib / 1024.0 * f64::from(count);
    if need_mib > most_mib as f64 {
        return refuse(format!(
            "Cannot have {count} VMs of {} by {flow} at once: each needs {:.1} MiB, all need {need_mib:.0}, and \
             {MEMORY_SHARE} % of the available memory are {most_mib}. Give smaller --counts",
            workload.name,
            each_kib / 1024.0
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::workload::WORKLOADS;
    use super::*;

    #[test]
    fn vms_that_do_not_fit_are_refused_before_they_are_made() {
        let crowd = |count| Crowd { workload: &WORKLOADS[0], flow: Flow::Standby, count };
        check_room(crowd(10), 1024.0).unwrap();
        let said = check_room(crowd(500), 1024.0 * 1024.0 * 1024.0).unwrap_err().to_string();
        assert!(said.contains("Cannot have 500 VMs of hello by standby") && said.contains("--counts"), "{said}");
    }
}
