//! `tvmm bench run`: functions over every policy, in the experiments that the papers of REAP, FaaSnap and Aquifer made;
//! `tvmm bench burst`: many VMs asked at once.

mod burst;
mod experiments;
mod flow;
mod foreign;
mod many;
mod measure;
mod settings;
mod socket_watch;
mod stage;
pub mod stats;
pub mod store;
mod subject;
mod together;
mod waiting;
mod workload;

use std::collections::BTreeMap;
use std::process::ExitCode;

use crate::sys::errors::BoxError;
use crate::sys::limits::raise_open_files;
use measure::Study;
use settings::Settings;
use store::{Header, Store};

pub use flow::Flow;
pub use settings::{BurstArgs, Experiment, RunArgs};

pub fn run(args: &RunArgs) -> Result<ExitCode, BoxError> {
    study(Settings::from(args)?)
}

/// Descriptors of a VM under measurement, and others: the guest's pipes, its messages, sockets.
const DESCRIPTORS: u64 = 8;

pub fn run_burst(args: &BurstArgs) -> Result<ExitCode, BoxError> {
    let settings = Settings::from_burst(args)?;
    let most = settings.parallel.iter().copied().max().unwrap_or_default();
    raise_open_files((u64::from(most) + 100) * DESCRIPTORS);
    study(settings)
}

fn study(settings: Settings) -> Result<ExitCode, BoxError> {
    let store = Store::open(&settings.out, Header::new(settings.described(), host()))?;
    let trials = experiments::trials(&settings);
    let mut study = Study::new(settings, store, trials)?;
    let experiments = study.settings.experiments.clone();
    for experiment in experiments {
        study.bar.set_message(format!("{} {}", experiment.name(), experiment.title()));
        study.experiment(experiment)?;
    }
    study.finish()
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
