//! `tvmm --config` and `tvmm restore`: one VM, from start to end.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::identify::{InputPath, Role};
use super::overrides::OverrideArgs;
use super::{MemoryLost, SessionArgs};
use crate::api;
use crate::config::VmConfig;
use crate::config::control;
use crate::config::request::ColdPools;
use crate::config::request::{LoadSnapshot, SnapshotPaths};
use crate::session::console::{self, Answer, Input};
use crate::session::controller::Controller;
use crate::session::log;
use crate::session::main_loop;
use crate::session::main_loop::{Begin, Outcome, Surroundings};
use crate::session::port_request::PortRequest;
use crate::session::report;
use crate::session::report::Report;
use crate::snapshot::{InPlaceMapping, Verify};
use crate::sys::errors::{BoxError, refuse};
use crate::sys::lost::CANNOT_GO_ON;
use crate::sys::otlp;
use crate::sys::otlp::Exporter;
use crate::sys::output::ConsoleOutput;
use crate::sys::signals::EndSignals;
use crate::sys::timeline::{Slice, Timeline};
use crate::sys::{clock, inherit, kick};
use crate::tiering::policy::DRAM_PRICE_US;
use crate::tiering::profile::Profile;

#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The snapshot: a directory that `tvmm snapshot` made, or with --mem-file the state file of Firecracker's two
    #[arg(long, value_name = "DIR")]
    snapshot: PathBuf,
    /// The memory file of the two-file form (`mem_file_path`)
    #[arg(long, value_name = "FILE")]
    mem_file: Option<PathBuf>,
    /// How guest memory is restored: eager, firecracker, firecracker-uffd, catalyzer, trenv, or with --profile reap,
    /// faasnap, aquifer, tiered
    #[arg(long, default_value = crate::config::request::DEFAULT_POLICY, value_name = "NAME")]
    policy: String,
    /// What a recorded run did to each page, for policies that need it (`tvmm profile record`)
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// A plan made by `tvmm plan --out`, instead of a policy
    #[arg(long, value_name = "FILE", conflicts_with_all = ["policy", "profile", "costs", "dram", "dram_price", "cxl"])]
    plan: Option<PathBuf>,
    /// Keep plans and working-set images in a folder of this directory. Default: beside the snapshot, or where that cannot be
    /// written in $XDG_CACHE_HOME/tvmm/plans or ~/.cache/tvmm/plans (root: /var/cache/tvmm/plans)
    #[arg(long, value_name = "DIR")]
    plan_dir: Option<PathBuf>,
    /// What things cost on this host (`tvmm calibrate`); default: its last measurement, else built-in numbers
    #[arg(long, value_name = "FILE")]
    costs: Option<PathBuf>,
    /// Local memory for what is preloaded or will be written, MiB
    #[arg(long, value_name = "MIB")]
    dram: Option<u64>,
    /// How much longer a request may take to save a MiB of local memory that it does not write, µs (0: time is all that
    /// counts); only `tiered` weighs that
    #[arg(long, default_value_t = DRAM_PRICE_US, value_name = "US")]
    dram_price: u64,
    /// Memory in the CXL tier, MiB
    #[arg(long, value_name = "MIB")]
    cxl: Option<u64>,
    /// How pages in place are mapped: private, the kernel copies what is written; shared, tvmm does, as it must where a
    /// tier has no copy-on-write
    #[arg(long, value_name = "HOW", default_value = "private")]
    in_place_mapping: InPlaceMapping,
    /// When memory is compared with the snapshot's checksums: off; sample, a few chunks before the guest runs; background,
    /// a few chunks before, and the rest while the guest runs; full, everything before
    #[arg(long, value_name = "WHEN", default_value = "background")]
    verify: Verify,
    /// Take the snapshot's memory from a cold pool instead of its memory files: a directory, direct:DIR[,depth=N]
    /// (past the page cache), tcp:HOST:PORT[,HOST:PORT…], with RDMA built in rdma:HOST:PORT[,HOST:PORT…], or with object stores
    /// built in s3://BUCKET/PREFIX, gs://, az://, http(s)://; repeatable, nearest first, the next stands by
    #[arg(long, value_name = "POOL", conflicts_with = "mem_file")]
    cold: Vec<String>,
    /// Keep chunks that come from other hosts in this directory
    #[arg(long, value_name = "DIR", requires = "cold")]
    cold_cache: Option<PathBuf>,
    /// The most that directory may hold, MiB; what was used longest ago goes first [default: 1024]
    #[arg(long, value_name = "MIB", requires = "cold_cache", value_parser = clap::value_parser!(u64).range(1..))]
    cold_cache_size: Option<u64>,
    /// Take guest memory from this pool instead of the snapshot's files; several: from the first that has the snapshot
    #[arg(long, value_name = "POOL", conflicts_with = "mem_file")]
    pool: Vec<PathBuf>,
    /// Log the pages the guest writes from now on, for diff snapshots
    #[arg(long)]
    track_dirty_pages: bool,
    /// Move the guest's clock on to the present; without it, no time has passed for the guest since the snapshot
    #[arg(long)]
    clock_realtime: bool,
    /// Restore, but leave the VM paused until the API resumes it
    #[arg(long, requires = "api_sock", conflicts_with = "run")]
    paused: bool,
    /// The profile of a run that does the same: --report then counts what the plan brought ahead and this run never
    /// touched
    #[arg(long, value_name = "FILE", requires = "report")]
    against: Option<PathBuf>,
    #[command(flatten)]
    overrides: OverrideArgs,
    #[command(flatten)]
    session: SessionArgs,
}

impl RestoreArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        let profiles = self.profile.iter().chain(&self.against).map(|path| InputPath::new(path, Role::Profile));
        let plans = self.plan.iter().map(|path| InputPath::new(path, Role::Plan));
        let cold = self.cold.iter().map(|pool| InputPath::new(Path::new(pool), Role::Pool));
        let pools = self.pool.iter().map(|path| InputPath::new(path, Role::Pool)).chain(cold);
        let mut inputs = InputPath::snapshot(&self.snapshot, self.mem_file.as_deref());
        inputs.extend(profiles.chain(plans).chain(pools));
        inputs
    }
}

/// Boots or restores the machine of `config`, or waits for the API.
pub fn boot(args: &SessionArgs, config: Option<&Path>) -> Result<ExitCode, BoxError> {
    let timeline = Timeline::begin(args.start_time_us);
    let has_api = args.api_sock.is_some() || args.api_fd.is_some();
    let Some(path) = config else {
        return match has_api {
            true => run(args, VmConfig::default(), Begin::Wait, timeline, Operation { name: "boot", against: None }),
            false => refuse("Nothing to boot: give --config FILE, or --api-sock PATH to be told later"),
        };
    };
    let mut config = VmConfig::from_file(path)?;
    let (name, begin) = match config.snapshot_load.take() {
        None => ("boot", Begin::Boot),
        Some(load) if !load.resume && (args.run.is_some() || !has_api) => {
            return refuse(format!(
                "Config file {} leaves the VM paused: say \"resume_vm\": true in its snapshot-load, or give --api-sock \
                 PATH (and no --run), by which it can be resumed",
                path.display()
            ));
        }
        Some(load) => ("restore", Begin::Restore(*load)),
    };
    run(args, config, begin, timeline, Operation { name, against: None })
}

/// Restores a snapshot.
pub fn restore(args: &RestoreArgs) -> Result<ExitCode, BoxError> {
    let timeline = Timeline::begin(args.session.start_time_us);
    let load = LoadSnapshot {
        location: SnapshotPaths { snapshot: args.snapshot.clone(), memory: args.mem_file.clone() },
        policy: args.policy.clone(),
        profile: args.profile.clone(),
        plan: args.plan.clone(),
        plan_dir: args.plan_dir.clone(),
        costs: args.costs.clone(),
        dram_mib: args.dram,
        cxl_mib: args.cxl,
        dram_price_us: Some(args.dram_price),
        in_place_mapping: args.in_place_mapping,
        verify: args.verify,
        cold: ColdPools { pools: args.cold.clone(), cache: args.cold_cache.clone(), cache_mib: args.cold_cache_size },
        pools: args.pool.clone(),
        handler: None,
        overrides: args.overrides.overrides(),
        track_dirty_pages: args.track_dirty_pages,
        clock_realtime: args.clock_realtime,
        resume: !args.paused,
    };
    // Before the guest runs: a profile that is none is refused at once.
    let against = args.against.as_deref().map(Profile::load).transpose()?;
    run(&args.session, VmConfig::default(), Begin::Restore(load), timeline, Operation { name: "restore", against })
}

/// What the report is about.
struct Operation {
    name: &'static str,
    against: Option<Profile>,
}

const RUN_ID: &str = "run";

fn run(
    args: &SessionArgs,
    config: VmConfig,
    begin: Begin,
    mut timeline: Timeline,
    operation: Operation,
) -> Result<ExitCode, BoxError> {
    if let Some(logger) = &config.logger {
        log::configure(logger)?;
    }
    // Refused before anything runs.
    args.otlp.as_deref().map(otlp::endpoint).transpose()?;
    // Before any thread exists, so that none of them takes the signals.
    let signals = EndSignals::take()?;
    kick::install_handler()?;
    let (control, receiver) = control::channel()?;
    // First thing that can fail for reasons of the caller's, and the first a client may wait for.
    let server = match (&args.api_sock, args.api_fd) {
        (Some(path), _) => Some(api::serve(path, control, &args.id)?),
        (None, Some(fd)) => Some(api::serve_stream(inherit::stream(fd)?, control, &args.id)?),
        (None, None) => None,
    };
    let answer = args.run.as_ref().map(|_| Answer::new()).transpose()?;
    let (outside, moments) =
        console::to_stdout(answer.as_ref().map(|answer| (RUN_ID, answer)), Duration::from_secs(args.fault_timeout))?;
    let around = Surroundings {
        input: input(args)?,
        request: port_request(args, answer.as_ref()),
        reads_stdin: args.run.is_none(),
        control: server.is_some().then_some(receiver),
        signals,
        answer: answer.clone(),
        timeout: args.run.is_some().then(|| Duration::from_secs(args.run_timeout)),
    };
    timeline.lap(Slice::Setup);
    let controller = Controller::new(args.id.clone(), config, outside, timeline)?;
    let (outcome, mut controller, around) = main_loop::run(controller, begin, around)?;
    drop(around);
    controller.timeline.note_moments(&moments, answer.as_deref().and_then(Answer::get).map(|(_, at)| at));
    if let Err(error) = controller.write_metrics() {
        tracing::warn!(error = crate::sys::errors::chain(&error), "The last metrics are lost.");
    }
    let report = (args.report.is_some() || args.trace.is_some() || args.otlp.is_some())
        .then(|| report::collect(&controller, operation.name, answer.as_deref(), operation.against.as_ref()));
    let stopping = clock::monotonic_ns();
    let stopped = controller.stop();
    drop(server);
    controller.timeline.add(Slice::Stop, stopping, clock::monotonic_ns());
    if let Some(report) = report {
        let report = report?.ended(&outcome).finish(&controller);
        args.report.as_deref().map_or(Ok(()), |path| report.write(path))?;
        args.trace.as_deref().map_or(Ok(()), |path| report.write_trace(path))?;
        args.otlp.as_deref().map_or(Ok(()), |url| export(url, &report))?;
    }
    let code = exit_code(&outcome, args, answer.as_deref(), controller.output())?;
    stopped?;
    Ok(code)
}

/// How long the end of a VM's process waits for a collector.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(7);

/// Sends a report's spans to a collector.
fn export(url: &str, report: &Report) -> Result<(), BoxError> {
    let exporter = Exporter::start(url)?;
    let (mut trace_id, mut root_id) = ([0; 16], [0; 8]);
    for id in [&mut trace_id[..], &mut root_id[..]] {
        rustix::rand::getrandom(id, rustix::rand::GetRandomFlags::empty()).map_err(std::io::Error::from)?;
    }
    let trace = report.spans(u128::from_ne_bytes(trace_id), u64::from_ne_bytes(root_id));
    exporter.send(move || trace);
    exporter.finish(EXPORT_TIMEOUT);
    let counts = exporter.counts();
    match (counts.sent(), counts.why().as_str()) {
        (1.., _) => Ok(()),
        (0, "") => refuse(format!("The collector at {url} does not answer: the spans are lost")),
        (0, why) => refuse(format!("The collector at {url} has not taken the spans: {}", why.trim_end_matches('.'))),
    }
}

fn input(args: &SessionArgs) -> Result<Input, BoxError> {
    let Some(function) = &args.run else { return Ok(Input::stdin()?) };
    if function.trim().is_empty() || function.chars().any(char::is_control) {
        return refuse("--run takes one function of the guest with its arguments, such as `hello` or `fill pages=16`");
    }
    Ok(match args.run_port {
        Some(_) => Input::default(),
        None => Input::script(format!("{}\n", request_line(function)).as_bytes()),
    })
}

fn request_line(function: &str) -> String {
    format!("run {RUN_ID} {}", function.trim())
}

/// The request of --run, if --run-port says that it goes over vsock.
fn port_request(args: &SessionArgs, answer: Option<&Arc<Answer>>) -> Option<PortRequest> {
    let (port, function, answer) = (args.run_port?, args.run.as_ref()?, answer?.clone());
    Some(PortRequest { port, line: request_line(function), id: RUN_ID.to_string(), answer })
}

fn exit_code(
    outcome: &Outcome,
    args: &SessionArgs,
    answer: Option<&Answer>,
    output: &ConsoleOutput,
) -> Result<ExitCode, BoxError> {
    match outcome {
        Outcome::Failed(what) => refuse(format!("{CANNOT_GO_ON}: {what}")),
        Outcome::MemoryLost(what) => Err(Box::new(MemoryLost(what.clone()))),
        Outcome::TimedOut => refuse(format!("The guest did not answer --run within {} seconds", args.run_timeout)),
        Outcome::Guest(ending) if args.run.is_some() => {
            refuse(format!("The guest ended before it answered: {ending:?}"))
        }
        Outcome::NoAnswer(why) => refuse(format!("The guest did not answer --run: {why}")),
        Outcome::Answered => match (output.loss(), answer.and_then(Answer::get)) {
            (Some(loss), _) => refuse(format!("Cannot write the guest's output to standard output: {loss}")),
            (None, Some((line, _))) if line.starts_with("ok ") => Ok(ExitCode::SUCCESS),
            _ => Ok(ExitCode::FAILURE),
        },
        Outcome::Guest(_) | Outcome::Signal(_) | Outcome::Quit => Ok(ExitCode::SUCCESS),
    }
}
