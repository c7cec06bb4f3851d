//! Many VMs: restored at once (E3), alive at once (E6).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::Value;

use super::flow::{Flow, Restore};
use super::measure::{Study, scratch_of, values_of};
use super::settings::Experiment;
use super::stats::Summary;
use super::store::{Key, Values};
use super::subject::Subject;
use super::workload::Workload;
use crate::bench::cache::{Cache, evict};
use crate::bench::child;
use crate::bench::commands::LONG;
use crate::bench::guest::{Guest, digest_of};
use crate::bench::trial::Trial;
use crate::snapshot::{Durability, PartialDir};
use crate::sys::errors::{BoxError, refuse};

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
                let flows = self.settings.flows.clone();
                let restored = flows.into_iter().filter_map(|flow| Some((flow, flow.restore()?)));
                let restored: Vec<(Flow, Restore)> = restored.collect();
                let keys = |flow: Flow, round: u32| Key {
                    experiment: Experiment::E3.name().to_string(),
                    case: case.clone(),
                    flow: flow.name().to_string(),
                    round,
                };
                let runs = self.settings.runs;
                if restored.iter().all(|(flow, _)| (0..runs).all(|round| self.store.has(&keys(*flow, round)))) {
                    self.bar.inc(u64::from(runs) * restored.len() as u64);
                    continue;
                }
                let all = self.copies(&subject, wanted)?;
                for round in 0..runs {
                    for &(flow, restore) in &restored {
                        self.measure(keys(flow, round), |study| study.burst(&all, count, flow, restore))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The snapshot and copies of it, as many as `wanted`.
    fn copies(&self, subject: &Subject, wanted: u32) -> Result<Vec<Subject>, BoxError> {
        let mut all = vec![subject.clone()];
        for number in 1..wanted {
            let dir = self.stage.dir_of(subject.workload).join(format!("copy{number}"));
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

    /// Begins `count` restores together. Returns their times from the start of the first.
    fn burst(&mut self, all: &[Subject], count: u32, flow: Flow, restore: Restore) -> Result<Values, BoxError> {
        let mut trials = Vec::new();
        for index in 0..count as usize {
            let subject = &all[index % all.len()];
            let scratch = scratch_of(self.scratch.path(), index)?;
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
        let begun = Instant::now();
        let reports: Vec<Result<(Value, f64), BoxError>> = std::thread::scope(|scope| {
            let run = |trial: &Trial| {
                let report = trial.run(restore.policy, Cache::Warm)?;
                Ok((report, begun.elapsed().as_secs_f64() * 1000.0))
            };
            let spawn = |trial| std::thread::Builder::new().spawn_scoped(scope, move || run(trial));
            let threads: Vec<_> = trials.iter().map(spawn).collect();
            let joined = threads.into_iter().map(|thread| match thread {
                Ok(thread) => thread.join().unwrap_or_else(|_| refuse("A thread that restores has panicked")),
                Err(error) => refuse(format!("Cannot start a thread for each of {count} restores: {error}")),
            });
            joined.collect()
        });
        let mut answers = Vec::new();
        let mut all_done = 0.0_f64;
        for report in reports {
            let (report, done_ms) = report?;
            let subject = &all[0];
            let digest = report["answer"].as_str().and_then(digest_of).ok_or("A report has no answer")?;
            // Copies have the same contents, so their answers must be the same.
            self.stage.check_digest(&subject.snapshot, &subject.asked, digest)?;
            answers.extend(values_of(&report).get("answer_ms").copied());
            all_done = all_done.max(done_ms);
        }
        let summary = Summary::of(answers).ok_or("No restore was measured")?;
        Ok(Values::from([
            ("answer_ms".to_string(), summary.median),
            ("answer_p95_ms".to_string(), summary.p95),
            ("answer_max_ms".to_string(), summary.max),
            ("all_ended_ms".to_string(), all_done),
        ]))
    }

    /// E6: VMs of one snapshot that have answered and live on.
    pub fn alive(&mut self, workload: &'static Workload) -> Result<(), BoxError> {
        let subject = self.subject(workload)?;
        for count in self.settings.vms.clone() {
            let flows = self.settings.flows.clone();
            for (flow, restore) in flows.into_iter().filter_map(|flow| Some((flow, flow.restore()?))) {
                let key = Key {
                    experiment: Experiment::E6.name().to_string(),
                    case: format!("{} ×{count}", workload.name),
                    flow: flow.name().to_string(),
                    round: 0,
                };
                self.measure(key, |study| study.crowd(&subject, count, restore))?;
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
            self.stage.check_digest(&subject.snapshot, &subject.asked, answered.digest())?;
            guests.push(guest);
        }
        let mut sum = Memory::default();
        for guest in &guests {
            sum.add(Path::new(&format!("/proc/{}", guest.pid())))?;
        }
        let per_vm = |kib: f64| kib / 1024.0 / f64::from(count);
        Ok(Values::from([
            ("local_mib_per_vm".to_string(), per_vm(sum.anonymous + sum.page_tables)),
            ("page_tables_mib_per_vm".to_string(), per_vm(sum.page_tables)),
            ("shared_mib".to_string(), sum.shared / 1024.0),
            ("all_mib".to_string(), (sum.anonymous + sum.page_tables + sum.shared) / 1024.0),
        ]))
    }
}

/// Memory of processes, KiB, from `smaps_rollup` and `status` (kernel `Documentation/filesystems/proc.rst`).
#[derive(Default)]
struct Memory {
    /// Pages that no file backs.
    anonymous: f64,
    /// This process's part of files and shared memory: summed over all processes, each page counts once.
    shared: f64,
    page_tables: f64,
}

impl Memory {
    fn add(&mut self, process: &Path) -> Result<(), BoxError> {
        let rollup = read(process.join("smaps_rollup"))?;
        let status = read(process.join("status"))?;
        let kib = |text: &str, name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok()).unwrap_or_default()
        };
        self.anonymous += kib(&rollup, "Pss_Anon");
        self.shared += kib(&rollup, "Pss_File") + kib(&rollup, "Pss_Shmem");
        self.page_tables += kib(&status, "VmPTE");
        Ok(())
    }
}

fn read(path: PathBuf) -> Result<String, BoxError> {
    Ok(std::fs::read_to_string(&path).map_err(|error| format!("Cannot read {}: {error}", path.display()))?)
}
