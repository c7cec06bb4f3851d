//! `tvmm bench run`: functions over every policy, in the experiments that the papers of REAP, FaaSnap and Aquifer made.

mod experiments;
mod flow;
mod foreign;
mod many;
mod measure;
mod settings;
mod stage;
pub mod stats;
pub mod store;
mod subject;
mod workload;

use std::collections::BTreeMap;
use std::process::ExitCode;

use crate::sys::errors::BoxError;
use measure::Study;
use settings::Settings;
use store::{Header, Store};

pub use flow::Flow;
pub use settings::{Experiment, RunArgs};

pub fn run(args: &RunArgs) -> Result<ExitCode, BoxError> {
    let settings = Settings::from(args)?;
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
