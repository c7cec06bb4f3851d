//! A study under way: it measures what the file of results lacks, restores by tvmm, and writes the report at the end.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::door::Door;
use super::flow::{Flow, Restore};
use super::settings::Settings;
use super::stage::Stage;
use super::stats::{Failure, failures};
use super::store::{Key, Measured, Sample, Store, Values};
use super::subject::Subject;
use crate::bench::cache::{Cache, prepare};
use crate::bench::guest::{digest_of, guest_us};
use crate::bench::report::publish;
use crate::bench::scratch::Scratch;
use crate::bench::trial::{Trial, end_of};
use crate::sys::errors::{BoxError, chain};

/// Folder in the directory of results; it exists while a study runs.
const STAGE: &str = "stage";

/// A study under way.
pub(super) struct Study {
    pub(super) settings: Settings,
    pub(super) exe: PathBuf,
    pub(super) store: Store,
    pub(super) stage: Stage,
    pub(super) scratch: Scratch,
    pub(super) bar: ProgressBar,
}

impl Study {
    /// `trials`: the number of measurements, for the progress bar.
    pub(super) fn new(settings: Settings, store: Store, trials: u64) -> Result<Study, BoxError> {
        let exe = std::env::current_exe()?;
        let scratch = Scratch::new(None)?;
        let stage = Stage::new(&exe, &settings.out.join(STAGE), scratch.path(), settings.runtime_mib)?;
        let bar = ProgressBar::new(trials);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}, {eta} left  {msg}")?;
        bar.set_style(style);
        Ok(Study { settings, exe, store, stage, scratch, bar })
    }

    /// Measures what has not been measured yet. A failed measurement is stored as such, and the study goes on.
    pub(super) fn measure<M: Into<Measured>>(
        &mut self,
        key: Key,
        measurement: impl FnOnce(&mut Self) -> Result<M, BoxError>,
    ) -> Result<(), BoxError> {
        self.bar.inc(1);
        if self.store.has(&key) {
            return Ok(());
        }
        let sample = match measurement(self) {
            Ok(measured) => Sample::new(key, measured.into()),
            Err(error) => Sample { failed: Some(chain(error.as_ref())), ..Sample::new(key, Measured::default()) },
        };
        self.store.add(sample)
    }

    /// Measures flows, round after round: those with nothing cached, then those with everything cached. The first round
    /// is not counted: it makes the files that policies derive from a snapshot.
    pub(super) fn forth_and_back<M: Into<Measured>>(
        &mut self,
        subject: &Subject,
        flows: &[Flow],
        runs: u32,
        key: impl Fn(Flow, u32) -> Key,
        measurement: impl Fn(&mut Self, Flow) -> Result<M, BoxError>,
    ) -> Result<(), BoxError> {
        for cached in [false, true] {
            let mut order: Vec<Flow> = flows.iter().filter(|flow| flow.is_cached() == cached).copied().collect();
            let is_done = |flow: &Flow| (0..runs).all(|round| self.store.has(&key(*flow, round)));
            if order.iter().all(is_done) {
                self.bar.inc(order.len() as u64 * u64::from(runs));
                continue;
            }
            if cached {
                self.bring_into_cache(subject, &order)?;
            }
            for round in 0..=runs {
                // Forth and back: VMs leave a state behind that the next ones find.
                order.reverse();
                for &flow in &order {
                    match round.checked_sub(1) {
                        // Failures also show in the rounds that count.
                        None => drop(measurement(self, flow)),
                        Some(round) => self.measure(key(flow, round), |study| measurement(study, flow))?,
                    }
                }
            }
        }
        Ok(())
    }

    /// The subject for VMs that are asked at `door`: a snapshot of its own.
    pub(super) fn behind(&self, subject: &Subject, door: Door) -> Result<Subject, BoxError> {
        if subject.door == door {
            return Ok(subject.clone());
        }
        let snapshot = self.stage.snapshot(subject.workload, subject.inputs, door)?;
        Ok(Subject { snapshot, door, ..subject.clone() })
    }

    /// Brings the snapshots of `flows` into the page cache.
    pub(super) fn bring_into_cache(&self, subject: &Subject, flows: &[Flow]) -> Result<(), BoxError> {
        let doors: BTreeSet<Door> = flows.iter().map(|flow| flow.door()).collect();
        doors.into_iter().try_for_each(|door| prepare(&self.behind(subject, door)?.snapshot, Cache::Warm))
    }

    /// Removes the files of the measurements.
    pub(super) fn clear(&mut self) -> Result<(), BoxError> {
        self.bar.finish_and_clear();
        if let Some(pool) = &self.settings.pool {
            self.stage.leave_pool(pool)?;
        }
        if !self.settings.keep {
            let dir = self.settings.out.join(STAGE);
            std::fs::remove_dir_all(&dir).map_err(|error| format!("Cannot remove {}: {error}", dir.display()))?;
        }
        Ok(())
    }

    /// Removes the files of the measurements, writes the report, and lists the failures.
    pub(super) fn finish(mut self) -> Result<ExitCode, BoxError> {
        self.clear()?;
        publish(&self.store.results, &self.settings.out)?;
        let failures = failures(&self.store.results);
        for Failure { experiment, case, flow, count, reason } in &failures {
            say!("tvmm: {experiment}, {case}, {flow}: {count} failed, the first because: {reason}");
        }
        Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// One restore by tvmm in a separate process, with the request `asked`.
    pub(super) fn restore(&mut self, subject: &Subject, flow: Flow, restore: Restore) -> Result<Values, BoxError> {
        let trial = self.trial(subject, restore, self.scratch.path().to_owned())?;
        let report = trial.run(restore.policy, flow.cache())?;
        self.check_answer(subject, &report)?;
        Ok(values_of(&report))
    }

    /// Prepares a restore: its profile is recorded, its snapshot is in the pool.
    pub(super) fn trial(&mut self, subject: &Subject, restore: Restore, scratch: PathBuf) -> Result<Trial, BoxError> {
        let needs_profile = restore.policy.needs_profile() || restore.pooled;
        let profile = if needs_profile { Some(self.stage.profile(subject, restore.recorder)?) } else { None };
        let pool = self.settings.pool.clone().filter(|_| restore.pooled);
        if let (Some(pool), Some(profile)) = (&pool, &profile) {
            self.stage.add_to_pool(pool, &subject.snapshot, profile)?;
        }
        Ok(Trial {
            exe: self.exe.clone(),
            snapshot: subject.snapshot.clone(),
            profile,
            pool,
            function: subject.asked.clone(),
            run_port: None,
            with_api: false,
            more: subject.more.clone(),
            scratch,
        })
    }

    fn check_answer(&mut self, subject: &Subject, report: &Value) -> Result<(), BoxError> {
        let answer = report["answer"].as_str().unwrap_or_default();
        let digest = digest_of(answer).ok_or("A report has no answer")?;
        self.stage.check_digest(subject, &subject.asked, digest)
    }
}

/// The numbers of a report.
pub(super) fn values_of(report: &Value) -> Values {
    let mut values = Values::new();
    let mut put = |name: &str, value: Option<f64>| {
        if let Some(value) = value {
            *values.entry(name.to_string()).or_default() += value;
        }
    };
    put("answer_ms", end_of(report, "execute").map(|us| us / 1000.0));
    put("first_exit_ms", report["first_exit_us"].as_f64().map(|us| us / 1000.0));
    put("guest_ms", guest_us(report["answer"].as_str().unwrap_or_default()).map(|us| us / 1000.0));
    for slice in report["slices"].as_array().into_iter().flatten() {
        if let Some(name) = slice["slice"].as_str() {
            put(&format!("{name}_ms"), slice["length_us"].as_f64().map(|us| us / 1000.0));
        }
    }
    let numbers = [
        ("fault_ins", "by_read", "by_read_pages"),
        ("fault_ins", "by_write", "by_write_pages"),
        ("fault_ins", "preloaded", "preloaded_pages"),
        ("fault_ins", "minor_faults", "minor_faults"),
        ("fault_ins", "major_faults", "major_faults"),
        ("memory", "guest_private_kib", "local_dram_kib"),
        ("memory", "guest_vmas", "vmas"),
        ("memory", "vmm_pss_kib", "vmm_pss_kib"),
    ];
    for (part, field, name) in numbers {
        put(name, report[part][field].as_f64());
    }
    values
}

/// The directory of this name for scratch files of one of several VMs.
pub(super) fn scratch_of(scratch: &Path, name: &str) -> Result<PathBuf, BoxError> {
    let dir = scratch.join(name);
    std::fs::create_dir_all(&dir).map_err(|error| format!("Cannot make {}: {error}", dir.display()))?;
    Ok(dir)
}
