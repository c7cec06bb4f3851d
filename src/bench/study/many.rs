//! Many VMs: restored at once (E3), alive at once (E6).

use std::process::Command;
use std::time::Instant;

use super::flow::{Flow, Many, Ready, Restore};
use super::measure::{Study, scratch_of, values_of};
use super::settings::Experiment;
use super::stats::Summary;
use super::store::{Key, Values};
use super::subject::Subject;
use super::together::{Together, together};
use super::waiting::wakes;
use super::workload::Workload;
use crate::bench::cache::{Cache, evict};
use crate::bench::child;
use crate::bench::commands::LONG;
use crate::bench::guest::{Guest, digest_of};
use crate::snapshot::{Durability, PartialDir};
use crate::sys::errors::{BoxError, refuse};
use crate::sys::process_memory::ProcessMemory;

/// Most different snapshots: they take disk space.
const SNAPSHOTS: u32 = 16;

impl Study {
    /// E3: restores at once, of one snapshot, and of a snapshot each (as many as there are).
    pub fn at_once(&mut self, workload: &'static Workload) -> Result<(), BoxError> {
        let subject = self.subject(workload)?;
        for same in [true, false] {
            for count in self.settings.parallel.clone() {
                let wanted = if same { 1 } else { count.min(SNAPSHOTS) };
                let case = format!("{} ×{count}, {wanted} snapshot(s)", workload.name);
                let flows = self.many_vms();
                let keys = |flow: Flow, round: u32| Key {
                    experiment: Experiment::E3.name().to_string(),
                    case: case.clone(),
                    flow: flow.name().to_string(),
                    round,
                };
                let runs = self.settings.runs;
                if flows.iter().all(|(flow, _)| (0..runs).all(|round| self.store.has(&keys(*flow, round)))) {
                    self.bar.inc(u64::from(runs) * flows.len() as u64);
                    continue;
                }
                for round in 0..runs {
                    for &(flow, source) in &flows {
                        let all = self.copies(&self.behind(&subject, flow.door())?, wanted)?;
                        self.measure(keys(flow, round), |study| match source {
                            Many::Restored(restore) => study.restored_at_once(&all, count, flow, restore),
                            Many::Waiting(ready) => study.asked_at_once(&all, count, ready),
                        })?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The flows with any number of VMs.
    fn many_vms(&self) -> Vec<(Flow, Many)> {
        self.settings.flows.iter().filter_map(|flow| Some((*flow, flow.many()?))).collect()
    }

    /// The snapshot and copies of it, as many as `wanted`.
    fn copies(&self, subject: &Subject, wanted: u32) -> Result<Vec<Subject>, BoxError> {
        let mut all = vec![subject.clone()];
        for number in 1..wanted {
            let dir = subject.snapshot.with_file_name(format!("copy{number}"));
            let snapshot = dir.join("snapshot");
            if !snapshot.exists() {
                std::fs::create_dir_all(&dir)?;
                let partial = PartialDir::create(&dir)?;
                // cp keeps holes, and shares blocks where the file system can.
                let mut copy = Command::new("cp");
                copy.args(["-rT", "--sparse=always", "--reflink=auto", "--preserve=timestamps"]);
                let output = child::output(copy.arg(&subject.snapshot).arg(partial.path()), LONG)?;
                if !output.status.success() {
                    let said = String::from_utf8_lossy(&output.stderr);
                    return refuse(format!("Cannot copy {}: {}", subject.snapshot.display(), said.trim()));
                }
                partial.publish(&snapshot, Durability::Synced)?;
            }
            all.push(Subject { snapshot, ..subject.clone() });
        }
        Ok(all)
    }

    /// Begins `count` restores together. Returns their times, each from the start of its process.
    fn restored_at_once(
        &mut self,
        all: &[Subject],
        count: u32,
        flow: Flow,
        restore: Restore,
    ) -> Result<Values, BoxError> {
        let mut trials = Vec::new();
        for index in 0..count as usize {
            let subject = &all[index % all.len()];
            let scratch = scratch_of(self.scratch.path(), &index.to_string())?;
            trials.push(self.trial(subject, restore, scratch)?);
        }
        for (index, subject) in all.iter().enumerate() {
            // Files derived from a snapshot are made before, and everything is brought into the wanted state.
            if let Some(trial) = trials.get(index) {
                trial.run(restore.policy, Cache::Warm)?;
            }
            if !flow.is_cached() {
                evict(&subject.snapshot)?;
            }
        }
        let Together { begun, outcomes } = together(trials.len(), |index| {
            let report = trials[index].run(restore.policy, Cache::Warm)?;
            Ok((report, Instant::now()))
        })?;
        let mut answers = Vec::new();
        let mut all_done = 0.0_f64;
        for outcome in outcomes {
            let (report, ended) = outcome?;
            let subject = &all[0];
            let digest = report["answer"].as_str().and_then(digest_of).ok_or("A report has no answer")?;
            // Copies have the same contents, so their answers must be the same.
            self.stage.check_digest(subject, &subject.asked, digest)?;
            answers.extend(values_of(&report).get("answer_ms").copied());
            all_done = all_done.max((ended - begun).as_secs_f64() * 1000.0);
        }
        let mut values = answer_values(answers)?;
        values.insert("all_ended_ms".to_string(), all_done);
        Ok(values)
    }

    /// Asks `count` waiting VMs together. Returns their times from the first request.
    fn asked_at_once(&mut self, all: &[Subject], count: u32, ready: Ready) -> Result<Values, BoxError> {
        let mut vms = self.waiting_vms(all, ready, count)?;
        let mut values = answer_values(self.ask_together(&all[0], &mut vms)?)?;
        values.extend(wakes(&vms)?);
        Ok(values)
    }

    /// E6: VMs of one snapshot that live on: they have answered, or wait.
    pub fn alive(&mut self, workload: &'static Workload) -> Result<(), BoxError> {
        let subject = self.subject(workload)?;
        for count in self.settings.vms.clone() {
            for (flow, source) in self.many_vms() {
                let subject = self.behind(&subject, flow.door())?;
                let key = Key {
                    experiment: Experiment::E6.name().to_string(),
                    case: format!("{} ×{count}", workload.name),
                    flow: flow.name().to_string(),
                    round: 0,
                };
                self.measure(key, |study| match source {
                    Many::Restored(restore) => study.crowd(&subject, count, restore),
                    Many::Waiting(ready) => study.crowd_that_waits(&subject, count, ready),
                })?;
            }
        }
        Ok(())
    }

    fn crowd(&mut self, subject: &Subject, count: u32, restore: Restore) -> Result<Values, BoxError> {
        let trial = self.trial(subject, restore, self.scratch.path().to_owned())?;
        let mut guests = Vec::new();
        for _ in 0..count {
            let mut guest = Guest::start(trial.command(restore.policy))?;
            let answered = guest.call(&subject.asked)?;
            self.stage.check_digest(subject, &subject.asked, answered.digest())?;
            guests.push(guest);
        }
        memory_values(guests.iter())
    }

    /// The memory of VMs that wait. They are asked afterwards, so that only VMs that work are counted.
    fn crowd_that_waits(&mut self, subject: &Subject, count: u32, ready: Ready) -> Result<Values, BoxError> {
        let mut vms = self.waiting_vms(std::slice::from_ref(subject), ready, count)?;
        let values = memory_values(vms.iter().map(|vm| &vm.guest))?;
        self.ask_together(subject, &mut vms)?;
        Ok(values)
    }
}

/// The median, the 95th percentile and the most of times to an answer.
pub(super) fn answer_values(answers_ms: Vec<f64>) -> Result<Values, BoxError> {
    let summary = Summary::of(answers_ms).ok_or("No VM was measured")?;
    Ok(Values::from([
        ("answer_ms".to_string(), summary.median),
        ("answer_p95_ms".to_string(), summary.p95),
        ("answer_max_ms".to_string(), summary.max),
    ]))
}

/// The memory of a VM's process.
pub(super) fn memory_of(guest: &Guest) -> Result<ProcessMemory, BoxError> {
    let pid = guest.pid();
    let memory = ProcessMemory::of(pid);
    Ok(memory.map_err(|error| format!("Cannot read the memory of process {pid}: {error}"))?)
}

/// The memory of VMs, for each and for all.
fn memory_values<'a>(guests: impl ExactSizeIterator<Item = &'a Guest>) -> Result<Values, BoxError> {
    let count = guests.len() as f64;
    let mut sum = ProcessMemory::default();
    for guest in guests {
        sum += memory_of(guest)?;
    }
    let per_vm = |kib: u64| kib as f64 / 1024.0 / count;
    Ok(Values::from([
        ("local_mib_per_vm".to_string(), per_vm(sum.own_kib())),
        ("page_tables_mib_per_vm".to_string(), per_vm(sum.page_tables_kib)),
        ("shared_mib".to_string(), sum.shared_kib as f64 / 1024.0),
        ("all_mib".to_string(), (sum.own_kib() + sum.shared_kib) as f64 / 1024.0),
    ]))
}
