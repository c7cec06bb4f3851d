//! `tvmm bench run`: functions over every policy, in the experiments that the papers of REAP, FaaSnap and Aquifer made.

mod experiments;
mod flow;
mod foreign;
mod many;
mod settings;
mod stage;
pub mod stats;
pub mod store;
mod workload;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::{BoxError, Cache, Scratch, Trial, end_of};
use flow::Restore;
use settings::Settings;
use stage::Stage;
use store::{Header, Key, Sample, Store};
use workload::Workload;

pub use flow::Flow;
pub use settings::{Experiment, RunArgs};

/// Numbers by name.
type Values = BTreeMap<String, f64>;

pub fn run(args: &RunArgs) -> Result<ExitCode, BoxError> {
    let settings = Settings::from(args)?;
    let store = Store::open(&settings.out, Header::new(settings.described(), host()))?;
    let mut study = Study::new(settings, store)?;
    let experiments = study.settings.experiments.clone();
    for experiment in experiments {
        study.bar.set_message(format!("{} {}", experiment.name(), experiment.title()));
        study.experiment(experiment)?;
    }
    study.finish()
}

struct Study {
    settings: Settings,
    exe: PathBuf,
    store: Store,
    stage: Stage,
    scratch: Scratch,
    bar: ProgressBar,
}

impl Study {
    fn new(settings: Settings, store: Store) -> Result<Study, BoxError> {
        let exe = std::env::current_exe()?;
        let stage = Stage::new(&exe, settings.out.join(STAGE));
        let bar = ProgressBar::new(experiments::trials(&settings));
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}, {eta} left  {msg}")?;
        bar.set_style(style);
        Ok(Study { settings, exe, store, stage, scratch: Scratch::new(None)?, bar })
    }

    /// Measures what has not been measured yet. A failed measurement is stored as such, and the study goes on.
    fn measure(
        &mut self,
        key: Key,
        measurement: impl FnOnce(&mut Self) -> Result<Values, BoxError>,
    ) -> Result<(), BoxError> {
        self.bar.inc(1);
        if self.store.has(&key) {
            return Ok(());
        }
        let sample = match measurement(self) {
            Ok(values) => Sample { key, values, failed: None },
            Err(error) => {
                Sample { key, values: Values::new(), failed: Some(crate::sys::errors::chain(error.as_ref())) }
            }
        };
        self.store.add(sample)
    }

    /// Removes the files of the measurements, writes the report, and lists the failures.
    fn finish(mut self) -> Result<ExitCode, BoxError> {
        self.bar.finish_and_clear();
        if let Some(pool) = &self.settings.pool {
            self.stage.leave_pool(pool)?;
        }
        if !self.settings.keep {
            let dir = self.settings.out.join(STAGE);
            std::fs::remove_dir_all(&dir).map_err(|error| format!("Cannot remove {}: {error}", dir.display()))?;
        }
        super::report::publish(&self.store.results, &self.settings.out)?;
        let failures = stats::failures(&self.store.results);
        for ((experiment, case, flow), (count, why)) in &failures {
            say!("tvmm: {experiment}, {case}, {flow}: {count} failed, the first because: {why}");
        }
        Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// One restore by tvmm in a separate process, with the request `asked`.
    fn restore(&mut self, from: &From, flow: Flow, restore: Restore) -> Result<Values, BoxError> {
        let trial = self.trial(from, restore, self.scratch.path().to_owned())?;
        let cache = if flow.is_cached() { Cache::Warm } else { Cache::Evicted };
        let report = trial.run(restore.policy, cache)?;
        self.check_answer(from, &report)?;
        Ok(values_of(&report))
    }

    /// Prepares a restore: its profile is recorded, its snapshot is in the pool.
    fn trial(&mut self, from: &From, restore: Restore, scratch: PathBuf) -> Result<Trial, BoxError> {
        let needs_profile = restore.policy.needs_profile() || restore.pooled;
        let profile = match needs_profile {
            true => Some(self.stage.profile(&from.snapshot, restore.recorder, &from.recorded)?),
            false => None,
        };
        let pool = self.settings.pool.clone().filter(|_| restore.pooled);
        if let (Some(pool), Some(profile)) = (&pool, &profile) {
            self.stage.add_to_pool(pool, &from.snapshot, profile)?;
        }
        Ok(Trial {
            exe: self.exe.clone(),
            snapshot: from.snapshot.clone(),
            profile,
            pool,
            function: from.asked.clone(),
            run_port: None,
            with_api: false,
            more: from.more.clone(),
            scratch,
        })
    }

    fn check_answer(&mut self, from: &From, report: &Value) -> Result<(), BoxError> {
        let answer = report["answer"].as_str().unwrap_or_default();
        let digest = answer.split(' ').nth(2).ok_or("A report has no answer")?;
        self.stage.check_digest(&from.snapshot, &from.asked, digest)
    }
}

/// A snapshot to restore, and its requests.
#[derive(Clone)]
struct From {
    workload: &'static Workload,
    snapshot: PathBuf,
    /// True if it has inputs of other sizes than A and B.
    sizes: bool,
    /// The request of the recorded run.
    recorded: String,
    /// The request of the measured run.
    asked: String,
    /// Additional arguments of `tvmm restore`.
    more: Vec<String>,
}

/// Folder in the directory of results; it exists while a study runs.
const STAGE: &str = "stage";

/// The numbers of a report.
fn values_of(report: &Value) -> Values {
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

/// The time of the function by the guest's clock: the fourth word of `ok ID DIGEST US …`.
fn guest_us(answer: &str) -> Option<f64> {
    answer.split(' ').nth(3)?.parse().ok()
}

/// Facts about the host of the measurements.
fn host() -> BTreeMap<String, String> {
    let first = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_string();
        line.split_once(':').map_or(line.clone(), |(_, value)| value.trim().to_string())
    };
    let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    BTreeMap::from([
        ("cpu".to_string(), first("/proc/cpuinfo", "model name")),
        ("cpus".to_string(), cpus.to_string()),
        ("memory".to_string(), first("/proc/meminfo", "MemTotal")),
        ("kernel".to_string(), first("/proc/version", "Linux version").chars().take(60).collect()),
    ])
}

/// The directory for scratch files of the `index`th of several concurrent restores.
fn scratch_of(scratch: &Path, index: usize) -> Result<PathBuf, BoxError> {
    let dir = scratch.join(index.to_string());
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}
