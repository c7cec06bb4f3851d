//! `tvmm bench run`: functions over every policy, in the experiments that the papers of REAP, FaaSnap and Aquifer made;
//! `tvmm bench burst`: many VMs asked at once.

mod burst;
mod door;
mod experiments;
mod flow;
mod foreign;
mod forked;
mod many;
mod measure;
mod repurposed;
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

use crate::sys::errors::{BoxError, refuse};
use crate::sys::limits::raise_open_files;
use measure::Study;
use settings::Settings;
use store::{Header, Store};

pub use flow::Flow;
pub use settings::{BurstArgs, Experiment, RunArgs};

pub fn run(args: &RunArgs) -> Result<ExitCode, BoxError> {
    study(Settings::from(args)?)
}

/// Descriptors for a VM that is being started: both ends of the guest's pipes, its messages, the news of its start.
const DESCRIPTORS: u64 = 8;

/// Descriptors beside those of VMs.
const DESCRIPTORS_BESIDES: u64 = 100;

pub fn run_burst(args: &BurstArgs) -> Result<ExitCode, BoxError> {
    let settings = Settings::from_burst(args)?;
    check_open_files(settings.most())?;
    study(settings)
}

/// # Errors
/// This process may not open as many files as `most` VMs at once need.
fn check_open_files(most: u32) -> Result<(), BoxError> {
    let needed = u64::from(most) * DESCRIPTORS + DESCRIPTORS_BESIDES;
    match raise_open_files(needed) {
        Some(allowed) if allowed < needed => refuse(format!(
            "Cannot ask {most} VMs at once: they need {needed} open files, and this process may have {allowed}. Raise \
             the hard limit (ulimit -Hn), or give smaller --counts"
        )),
        _ => Ok(()),
    }
}

fn study(settings: Settings) -> Result<ExitCode, BoxError> {
    let store = Store::open(&settings.out, Header::new(settings.described(), host()))?;
    let trials = experiments::trials(&settings);
    let mut study = Study::new(settings, store, trials)?;
    if let Err(error) = study.check_room_of_bursts() {
        study.clear()?;
        return Err(error);
    }
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
