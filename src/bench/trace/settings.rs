//! The arguments of `tvmm bench trace`.

use std::path::PathBuf;

use clap::Args;

use super::arrivals::{Part, Trace};
use super::files;
use super::policy::{Policy, Rules, Times};
use super::service::Limits;
use super::stage::MAX_FUNCTIONS;
use super::synthetic::{Class, generate};
use crate::sys::available_memory::available_memory;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::idle::FAASMEM_OFFLOAD;

/// The length of a synthetic trace without `--duration`, s.
const HOUR_S: u64 = 3600;
/// Functions of each class of a synthetic trace without `--functions`.
const FUNCTIONS: usize = 10;
/// The part of the available memory that VMs may have, percent.
const MEMORY_SHARE: u64 = 80;
#[derive(Debug, Args)]
pub struct TraceArgs {
    /// A trace of arrivals: `time_s,function` in the order of time, or a file of Azure Functions as published (2019:
    /// requests a minute; 2021: `app,func,end_timestamp,duration`)
    #[arg(value_name = "FILE", required_unless_present = "synthetic", conflicts_with = "synthetic")]
    file: Option<PathBuf>,
    /// Make the arrivals: functions of these classes, by requests a day (high: 512 and more; middle: 64 to 511; low:
    /// fewer), with heavy-tailed gaps
    #[arg(long, value_delimiter = ',', value_name = "CLASSES")]
    synthetic: Vec<Class>,
    /// Policies for VMs between requests, each on a service of its own: keep (wait for --keep-alive), end, repurpose
    /// (end, and let the process become the next VM), standby (VMs stand by, and end after their request), rewind (they
    /// stand by, and go back to their snapshot after it),
    /// suspend (after --floor), ladder (give memory back step by step, from --floor to --keep-alive), faasmem (offload
    /// 1 % a second, from --floor on, and end after --keep-alive)
    #[arg(long, value_delimiter = ',', default_value = "keep,end", value_name = "POLICIES")]
    policy: Vec<Policy>,
    /// Guest memory that all VMs together may have, MiB (`tvmm serve --memory`)
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) memory: u64,
    /// Run the trace so many times as fast as the clock. Keep-alive times are shortened as well, the guests' work is
    /// not
    #[arg(long, default_value_t = 1.0, value_name = "N", value_parser = speed)]
    speed: f64,
    /// Use the first so many seconds of the trace [default: all of a file; 3600 of a synthetic trace]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=320_000_000))]
    duration: Option<u64>,
    /// Use the first so many functions of a file [default: all], or make so many of each class [default: 10]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    functions: Option<u32>,
    /// Seed of the arrivals that are made, of the moments within a minute of 2019's trace, and of the times that the
    /// simulator picks from those of the costs
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// The machines and requests of functions, JSON: {"NAME": {"mem_mib", "prepare", "call", "params", "policy"},
    /// "*": …}
    /// [default: `touch` of 8 of 32 MiB in a guest of 128]
    #[arg(long, value_name = "FILE")]
    pub(super) workloads: Option<PathBuf>,
    /// Time of the trace for which `keep` and `faasmem` let a VM wait, and after which `ladder` suspends it at the
    /// latest, s
    #[arg(long, default_value_t = 600.0, value_name = "SECONDS", value_parser = positive)]
    keep_alive: f64,
    /// Time of the trace after which `suspend` suspends a VM, and before which `ladder` and `faasmem` do nothing, s
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS", value_parser = positive)]
    floor: f64,
    /// VMs of each function that stand by, of `standby` and `rewind`; a rewound VM stays if fewer than four times as
    /// many stand by
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    standby: u16,
    /// Limit on concurrent VMs
    #[arg(long, default_value_t = 1024, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_vms: u32,
    /// Limit on concurrent invocations [default: twice the CPUs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    max_running: Option<u32>,
    /// Start no VMs: compute the outcome from --costs
    #[arg(long, requires = "costs")]
    pub(super) simulate: bool,
    /// Costs for --simulate: the file `costs.json` that a replay has written
    #[arg(long, value_name = "FILE", requires = "simulate")]
    pub(super) costs: Option<PathBuf>,
    /// CPUs of the simulated host [default: those of the costs]
    #[arg(long, value_name = "N", requires = "simulate", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(super) cpus: Option<u32>,
    /// Directory for the results: summary.csv, summary.json, memory.svg, latency.svg, report.html; of a replay
    /// costs.json and requests.csv
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,
}

/// Parses a factor of the clock.
fn speed(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| (0.001..=1e6).contains(number));
    number.ok_or_else(|| "a number from 0.001 to 1000000 is needed".to_string())
}

/// Parses a number above 0.
fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0);
    number.filter(|number| *number <= 1e9).ok_or_else(|| "a number above 0, at most 1e9, is needed".to_string())
}

/// The settings of a run.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) trace: Trace,
    pub(super) source: String,
    pub(super) rules: Vec<Rules>,
    pub(super) speed: f64,
    pub(super) keep_alive_s: f64,
    pub(super) floor_s: f64,
    pub(super) seed: u64,
    memory_mib: u64,
    max_vms: usize,
    max_running: Option<usize>,
}

impl Settings {
    /// Reads or makes the trace.
    ///
    /// # Errors
    /// The trace cannot be used, or an argument does not fit the others.
    pub(super) fn new(args: &TraceArgs) -> Result<Settings, BoxError> {
        let until_us = args.duration.map(|seconds| seconds * 1_000_000);
        let functions = args.functions.map(|count| count as usize);
        let trace = match &args.file {
            Some(file) => files::read(file, Part { until_us, functions }, args.seed)?,
            None => {
                let length_us = until_us.unwrap_or(HOUR_S * 1_000_000);
                generate(&args.synthetic, functions.unwrap_or(FUNCTIONS), length_us, args.seed)?
            }
        };
        let source = match &args.file {
            Some(file) => file.display().to_string(),
            None => {
                let names: Vec<String> = args.synthetic.iter().map(Class::to_string).collect();
                format!("synthetic, {}, seed {}", names.join(" and "), args.seed)
            }
        };
        let ms = |seconds: f64| (seconds / args.speed * 1000.0).round() as u64;
        let times = Times {
            keep_alive_ms: ms(args.keep_alive),
            floor_ms: ms(args.floor),
            offload_ms: ms(FAASMEM_OFFLOAD.as_secs_f64()),
        };
        let rules = args.policy.iter().map(|policy| {
            Rules::new(*policy, times, args.standby.into()).map_err(|error| {
                format!(
                    "Cannot use policy {policy} with --floor {} and --keep-alive {} at --speed {}: {error}",
                    args.floor, args.keep_alive, args.speed
                )
            })
        });
        let rules = rules.collect::<Result<_, _>>()?;
        Ok(Settings {
            trace,
            source,
            rules,
            speed: args.speed,
            keep_alive_s: args.keep_alive,
            floor_s: args.floor,
            seed: args.seed,
            memory_mib: args.memory,
            max_vms: args.max_vms as usize,
            max_running: args.max_running.map(|count| count as usize),
        })
    }

    /// The limits of the service on a host with so many CPUs.
    pub(super) fn limits(&self, cpus: usize) -> Limits {
        let max_running = self.max_running.unwrap_or(2 * cpus);
        Limits { memory_mib: self.memory_mib, max_vms: self.max_vms, max_running }
    }

    /// # Errors
    /// A replay by VMs is not possible on this host.
    pub(super) fn check_replay(&self) -> Result<(), BoxError> {
        let functions = self.trace.functions.len();
        if functions > MAX_FUNCTIONS {
            return refuse(format!(
                "Cannot replay {functions} functions: each has a snapshot of its own, and {MAX_FUNCTIONS} are the \
                 most. Give --functions {MAX_FUNCTIONS}, or --simulate"
            ));
        }
        let available = available_memory().map_err(|error| format!("Cannot read the available memory: {error}"))?;
        let most_mib = (available >> 20) * MEMORY_SHARE / 100;
        if self.memory_mib > most_mib {
            return refuse(format!(
                "Cannot give VMs {} MiB (--memory): {MEMORY_SHARE} % of the available memory are {most_mib} MiB. Give \
                 less, or --simulate",
                self.memory_mib
            ));
        }
        Ok(())
    }
}
