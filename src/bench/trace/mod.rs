//! `tvmm bench trace`: an arrival trace by several policies for VMs between requests, on a real service or simulated.

mod arrivals;
mod calibrate;
mod costs;
mod cpu;
mod files;
mod load;
mod memory;
mod outcome;
mod policy;
mod random;
mod replay;
mod report;
mod samples;
mod service;
mod settings;
mod simulator;
mod stage;
mod synthetic;
mod workload;

use std::path::Path;
use std::process::ExitCode;
use std::thread::ScopedJoinHandle;

use indicatif::{ProgressBar, ProgressStyle};

use crate::bench::load::busy_cpus;
use crate::bench::scratch::Scratch;
use crate::sys::errors::{BoxError, refuse};
use crate::sys::limits::raise_open_files;
use costs::Costs;
use load::Load;
use outcome::Outcome;
use policy::{Processes, Rules};
use replay::Replay;
use report::{Fact, Report};
use service::Service;
use settings::Settings;
use simulator::Simulation;
use workload::Workloads;

pub use settings::TraceArgs;

/// Open files that this process and the service may need.
const OPEN_FILES: u64 = 65_536;

pub fn run(args: &TraceArgs) -> Result<ExitCode, BoxError> {
    let settings = Settings::new(args)?;
    let workloads = Workloads::of(&settings.trace, args.workloads.as_deref())?;
    workloads.check_room(args.memory)?;
    let mut notes = settings.trace.notes.clone();
    let outcomes = match &args.costs {
        Some(path) if args.simulate => {
            let costs = Costs::read(path)?;
            notes.extend(costs.gap(&settings.rules));
            let cpus = args.cpus.map_or(costs.cpus, |cpus| cpus as usize);
            simulate(&settings, &workloads, &costs, cpus)?
        }
        _ => {
            settings.check_replay()?;
            make_directory(&args.out)?;
            replay(&settings, &workloads, &args.out)?
        }
    };
    make_directory(&args.out)?;
    let has_failed = outcomes.iter().any(|outcome| outcome.requests.iter().any(|request| request.way.is_none()));
    let functions = &settings.trace.functions;
    Report { facts: facts(&settings), notes: &notes, outcomes: &outcomes, functions }.publish(&args.out)?;
    Ok(if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn make_directory(dir: &Path) -> Result<(), BoxError> {
    Ok(std::fs::create_dir_all(dir).map_err(|error| format!("Cannot make {}: {error}", dir.display()))?)
}

fn facts(settings: &Settings) -> Vec<Fact> {
    let trace = &settings.trace;
    let fact = |name, value| Fact { name, value };
    vec![
        fact("trace", settings.source.clone()),
        fact("functions", trace.functions.len().to_string()),
        fact("requests", trace.arrivals.len().to_string()),
        fact("length of the trace, s", format!("{:.1}", trace.length_us as f64 / 1e6)),
        fact("speed", settings.speed.to_string()),
        fact("keep-alive, s of the trace", settings.keep_alive_s.to_string()),
        fact("floor, s of the trace", settings.floor_s.to_string()),
        fact("guest memory of all VMs, at most, MiB", settings.limits(1).memory_mib.to_string()),
        fact("tvmm", env!("CARGO_PKG_VERSION").to_string()),
    ]
}

fn load<'a>(settings: &'a Settings, workloads: &'a Workloads, rules: &Rules) -> Load<'a> {
    Load { trace: &settings.trace, workloads, rules: *rules, speed: settings.speed }
}

/// Simulates policies.
fn simulate(settings: &Settings, workloads: &Workloads, costs: &Costs, cpus: usize) -> Result<Vec<Outcome>, BoxError> {
    let limits = settings.limits(cpus);
    let one = |rules: &Rules| {
        Simulation { load: load(settings, workloads, rules), costs, limits, cpus, seed: settings.seed }.run()
    };
    std::thread::scope(|scope| {
        let one = |rules| std::thread::Builder::new().name("simulation".into()).spawn_scoped(scope, move || one(rules));
        let running: Result<Vec<_>, _> = settings.rules.iter().map(one).collect();
        let running = running.map_err(|error| format!("Cannot start a thread for a simulation: {error}"))?;
        let outcome = |thread: ScopedJoinHandle<Result<Outcome, BoxError>>| {
            thread.join().unwrap_or_else(|_| refuse("A simulation has panicked"))
        };
        running.into_iter().map(outcome).collect()
    })
}

/// Replays all policies by VMs, and simulates them with the costs of this host, which it writes to `out`.
fn replay(settings: &Settings, workloads: &Workloads, out: &Path) -> Result<Vec<Outcome>, BoxError> {
    raise_open_files(OPEN_FILES);
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let limits = settings.limits(cpus);
    let scratch = Scratch::new(None)?;
    let dir = scratch.path().join("serve");
    let bar = ProgressBar::new(workloads.of.len() as u64).with_style(ProgressStyle::with_template("{msg} {elapsed}")?);
    let service = Service::start(&dir, limits, Processes::End)?;
    stage::prepare(&service, workloads, |done| {
        bar.set_message(format!("snapshot {done} of {}", workloads.of.len()));
    })?;
    service.end()?;
    bar.set_message("costs of one request at a time");
    let costs_path = out.join("costs.json");
    calibrate::measure(&dir, limits, workloads, cpus)?.write(&costs_path)?;
    // The numbers as `--costs` will have them: they lose their last digits on the way.
    let costs = Costs::read(&costs_path)?;
    let mut outcomes = Vec::new();
    for rules in &settings.rules {
        bar.set_message(format!("policy {}", rules.policy));
        let others = busy_cpus()?;
        let service = Service::start(&dir, limits, rules.processes)?;
        stage::set_policy(&service, workloads, rules)?;
        let replay = Replay { service: &service, load: load(settings, workloads, rules) };
        outcomes.push(Outcome { other_cpus: Some(others), ..replay.run()? });
        stage::end_suspended(&service)?;
        service.end()?;
    }
    bar.finish_and_clear();
    outcomes.extend(simulate(settings, workloads, &costs, cpus)?);
    Ok(outcomes)
}
