//! The settings of a study.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;

use super::flow::Flow;
use super::workload::{WORKLOADS, Workload};
use crate::sys::errors::{BoxError, refuse};

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Experiments, or `all`: E1 record with input A, test with B; E2 six sizes of input; E3 many restores at once; E4
    /// snapshots on a slow medium (--slow-dir); E5 causes of page loads; E6 memory against the number of VMs; E7
    /// policies under budgets of local memory
    #[arg(value_delimiter = ',', default_value = "E1,E5", value_name = "EXPERIMENTS")]
    experiments: Vec<String>,
    /// Numbers of restores at once (E3)
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64", value_name = "NUMBERS",
        value_parser = clap::value_parser!(u32).range(1..=1024))]
    parallel: Vec<u32>,
    /// Numbers of VMs that live at once (E6)
    #[arg(long, value_delimiter = ',', default_value = "1,10,50", value_name = "NUMBERS",
        value_parser = clap::value_parser!(u32).range(1..=1024))]
    vms: Vec<u32>,
    /// A few functions, three rounds: two minutes
    #[arg(long)]
    quick: bool,
    /// A directory on a slow or remote medium, for the snapshots of E4
    #[arg(long, value_name = "DIR")]
    slow_dir: Option<PathBuf>,
    #[command(flatten)]
    study: StudyArgs,
}

/// The arguments that `tvmm bench run` and `tvmm bench burst` share.
#[derive(Debug, Args)]
struct StudyArgs {
    /// Functions, or `all`
    #[arg(long, value_delimiter = ',', default_value = "all", value_name = "NAMES")]
    functions: Vec<String>,
    /// Flows, or `all`: vanilla, vanilla-cache, mincore, emumincore, reap, trenv, aquifer, tiered, tiered-cache, warm,
    /// standby, standby-vsock, rewound, forked, repurposed, and with --pool trenv-pool, aquifer-pool, tiered-pool,
    /// standby-pool; by name only: reap-cache, trenv-cache, aquifer-cache
    #[arg(long, value_delimiter = ',', default_value = "all", value_name = "NAMES")]
    flows: Vec<String>,
    /// Rounds; one more comes first and is not counted [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,
    /// A pool (`tvmm pool create`), empty or not, for flows that take memory from one
    #[arg(long, value_name = "POOL")]
    pool: Option<PathBuf>,
    /// A VMM with Firecracker's command line and API, to be measured beside tvmm (in bursts by its File back end)
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Directory for the results; a run goes on from results there that were measured with the same settings
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Keep the snapshots, so that another run need not make them again
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Args)]
#[command(
    mut_arg("functions", |functions| functions.default_value("hello").help(BURST_FUNCTIONS)),
    mut_arg("flows", |flows| flows.help(BURST_FLOWS))
)]
pub struct BurstArgs {
    /// Numbers of VMs that are asked at once
    #[arg(long, value_delimiter = ',', default_value = "1,10,50,100", value_name = "NUMBERS",
        value_parser = clap::value_parser!(u32).range(1..=1024))]
    counts: Vec<u32>,
    /// The runtime image of each guest, MiB, of which every function touches a part; 0: none. Default: as in
    /// `tvmm bench run`
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(0..=512))]
    runtime: Option<u64>,
    #[command(flatten)]
    study: StudyArgs,
}

const BURST_FUNCTIONS: &str =
    "The function that each guest runs, recorded with input A and asked for input B; several, or `all`";
const BURST_FLOWS: &str = "Flows, or `all`: vanilla-cache, reap-cache, trenv-cache, aquifer-cache, tiered-cache, \
                           standby, standby-vsock, rewound, and with --pool trenv-pool, aquifer-pool, tiered-pool, \
                           standby-pool; by name only: flows of `tvmm bench run` whose snapshot is not cached \
                           (vanilla, tiered, …)";

/// An experiment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Experiment {
    E1,
    E2,
    E3,
    E4,
    E5,
    E6,
    E7,
    Burst,
}

impl Experiment {
    /// Those of `tvmm bench run`.
    const OF_PAPERS: [Experiment; 7] = [
        Experiment::E1,
        Experiment::E2,
        Experiment::E3,
        Experiment::E4,
        Experiment::E5,
        Experiment::E6,
        Experiment::E7,
    ];
    pub const ALL: [Experiment; 8] = [
        Experiment::E1,
        Experiment::E2,
        Experiment::E3,
        Experiment::E4,
        Experiment::E5,
        Experiment::E6,
        Experiment::E7,
        Experiment::Burst,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Experiment::E1 => "E1",
            Experiment::E2 => "E2",
            Experiment::E3 => "E3",
            Experiment::E4 => "E4",
            Experiment::E5 => "E5",
            Experiment::E6 => "E6",
            Experiment::E7 => "E7",
            Experiment::Burst => "burst",
        }
    }

    /// Its title in one line.
    pub fn title(self) -> &'static str {
        match self {
            Experiment::E1 => "Recorded with input A, asked with input B",
            Experiment::E2 => "Recorded with the third size of input, asked with six",
            Experiment::E3 => "Many restores at once",
            Experiment::E4 => "Snapshots on a slow medium",
            Experiment::E5 => "What brought pages in",
            Experiment::E6 => "Local memory against the number of VMs",
            Experiment::E7 => "Under budgets of local memory",
            Experiment::Burst => "Many VMs asked at the same moment",
        }
    }
}

/// The arguments, checked.
#[derive(Debug)]
pub struct Settings {
    pub experiments: Vec<Experiment>,
    pub workloads: Vec<&'static Workload>,
    pub flows: Vec<Flow>,
    pub runs: u32,
    /// The size of the guests' runtime image; `None`: the guest's default.
    pub runtime_mib: Option<u64>,
    pub parallel: Vec<u32>,
    pub vms: Vec<u32>,
    pub slow_dir: Option<PathBuf>,
    pub pool: Option<PathBuf>,
    pub firecracker: Option<PathBuf>,
    pub out: PathBuf,
    pub keep: bool,
}

/// The functions of --quick: their snapshots are small.
const QUICK: [&str; 4] = ["hello", "json", "chameleon", "pyaes"];
const RUNS: u32 = 5;
const QUICK_RUNS: u32 = 3;

impl Settings {
    /// # Errors
    /// Unknown names, and experiments that lack an argument.
    pub fn from(args: &RunArgs) -> Result<Settings, BoxError> {
        let quick_runs = if args.quick { QUICK_RUNS } else { RUNS };
        let study = Settings::of_study(&args.study, &Flow::OWN, &Flow::FOREIGN)?;
        let workloads = if args.quick && args.study.functions == ["all"] { find(&QUICK)? } else { study.workloads };
        Ok(Settings {
            experiments: experiments(args)?,
            workloads,
            runs: args.study.runs.unwrap_or(quick_runs),
            parallel: args.parallel.clone(),
            vms: args.vms.clone(),
            slow_dir: args.slow_dir.clone(),
            ..study
        })
    }

    /// # Errors
    /// Unknown names, and flows without any number of VMs at once.
    pub fn from_burst(args: &BurstArgs) -> Result<Settings, BoxError> {
        let study = Settings::of_study(&args.study, &Flow::BURST, &[Flow::FirecrackerCache])?;
        if let Some(flow) = study.flows.iter().find(|flow| !flow.can_burst()) {
            return refuse(format!(
                "Cannot ask VMs of {flow} at once: one VM, or one page-fault handler, serves them all. Leave it out of \
                 --flows"
            ));
        }
        Ok(Settings {
            experiments: vec![Experiment::Burst],
            runtime_mib: args.runtime,
            parallel: args.counts.clone(),
            ..study
        })
    }

    /// The settings that all studies have. `all`: the flows that `all` means; `foreign`: those of another VMM that are
    /// added if none is named.
    fn of_study(args: &StudyArgs, all: &[Flow], foreign: &[Flow]) -> Result<Settings, BoxError> {
        let names: Vec<&str> = args.functions.iter().map(String::as_str).collect();
        Ok(Settings {
            experiments: Vec::new(),
            workloads: if names == ["all"] { WORKLOADS.iter().collect() } else { find(&names)? },
            flows: FlowNames { args, all, foreign }.parse()?,
            runs: args.runs.unwrap_or(RUNS),
            runtime_mib: None,
            parallel: Vec::new(),
            vms: Vec::new(),
            slow_dir: None,
            pool: args.pool.clone(),
            firecracker: args.firecracker.clone(),
            out: args.out.clone(),
            keep: args.keep,
        })
    }

    /// The largest number of VMs at once.
    pub fn most(&self) -> u32 {
        self.parallel.iter().copied().max().unwrap_or_default()
    }

    /// The settings that measurements depend on, for the header. The list of measurements is not among them: it may
    /// grow from run to run.
    pub fn described(&self) -> BTreeMap<String, String> {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let named = [
            ("slow medium", path(&self.slow_dir)),
            ("runtime MiB", self.runtime_mib.map(|mib| mib.to_string())),
            ("pool", path(&self.pool)),
            ("firecracker", path(&self.firecracker)),
        ];
        let given = named.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?)));
        given.chain([("rounds".to_string(), self.runs.to_string())]).collect()
    }
}

/// The flows that arguments name.
struct FlowNames<'a> {
    args: &'a StudyArgs,
    /// Those that `all` means.
    all: &'a [Flow],
    /// Those of another VMM that are added if none is named.
    foreign: &'a [Flow],
}

impl FlowNames<'_> {
    fn parse(&self) -> Result<Vec<Flow>, BoxError> {
        let mut flows: Vec<Flow> = match self.args.flows.as_slice() {
            [all] if all == "all" => self.all.to_vec(),
            names => names.iter().map(|name| name.parse()).collect::<Result<_, String>>()?,
        };
        match &self.args.firecracker {
            Some(path) if !path.is_file() => return refuse(format!("There is no {} to measure", path.display())),
            Some(_) if !flows.iter().any(|flow| flow.backend().is_some()) => flows.extend(self.foreign),
            None if flows.iter().any(|flow| flow.backend().is_some()) => {
                return refuse("The flows firecracker and firecracker-… need --firecracker PATH, the VMM to measure");
            }
            _ => {}
        }
        match &self.args.pool {
            Some(_) if !flows.iter().any(|flow| flow.is_pooled()) => flows.extend(Flow::POOLED),
            None if flows.iter().any(|flow| flow.is_pooled()) => {
                return refuse("The flows whose names end in -pool need --pool POOL");
            }
            _ => {}
        }
        Ok(flows)
    }
}

fn experiments(args: &RunArgs) -> Result<Vec<Experiment>, BoxError> {
    if args.experiments.iter().any(|name| name == "all") {
        let has_what_it_needs = |experiment: &Experiment| *experiment != Experiment::E4 || args.slow_dir.is_some();
        return Ok(Experiment::OF_PAPERS.into_iter().filter(has_what_it_needs).collect());
    }
    let mut found = Vec::new();
    for name in &args.experiments {
        let experiment =
            Experiment::OF_PAPERS.into_iter().find(|experiment| experiment.name().eq_ignore_ascii_case(name));
        match experiment {
            None => return refuse(format!("There is no experiment {name:?}; there are E1 to E7, and all")),
            Some(Experiment::E4) if args.slow_dir.is_none() => {
                return refuse(
                    "E4 needs --slow-dir DIR: a directory on the slow or remote medium that is to be measured",
                );
            }
            Some(experiment) => found.push(experiment),
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn find(names: &[&str]) -> Result<Vec<&'static Workload>, BoxError> {
    let mut found = Vec::new();
    for name in names {
        match WORKLOADS.iter().find(|workload| workload.name == *name) {
            Some(workload) => found.push(workload),
            None => {
                let known: Vec<&str> = WORKLOADS.iter().map(|workload| workload.name).collect();
                return refuse(format!("There is no function {name:?} to measure; there are: {}", known.join(", ")));
            }
        }
    }
    Ok(found)
}
