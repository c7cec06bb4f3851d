//! `tvmm --config` and `tvmm restore`: one VM, from start to end.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::failure::{ArgumentConflict, MemoryLost};
use super::identify::{InputPath, Role};
use super::jail_args::Outputs;
use super::load_args::LoadArgs;
use super::session_args::SessionArgs;
use crate::api;
use crate::config::VmConfig;
use crate::config::control;
use crate::config::restore::Start;
use crate::session::console::{self, Answer, Input};
use crate::session::controller::Controller;
use crate::session::fork::ChildEnd;
use crate::session::log;
use crate::session::main_loop;
use crate::session::main_loop::{Begin, EventSources};
use crate::session::outcome::Outcome;
use crate::session::port_request::PortRequest;
use crate::session::report;
use crate::session::report::Report;
use crate::sys::errors::{BoxError, refuse};
use crate::sys::lost::CANNOT_GO_ON;
use crate::sys::otlp;
use crate::sys::otlp::Exporter;
use crate::sys::output::ConsoleOutput;
use crate::sys::seccomp::{self, Kind};
use crate::sys::signals::EndSignals;
use crate::sys::timeline::{Slice, Timeline};
use crate::sys::{clock, inherit, kick};
use crate::tiering::profile::Profile;

#[derive(Debug, Args)]
#[command(
    mut_arg("paused", |paused| paused.requires("api_sock").conflicts_with("run")),
    mut_arg("standby", |standby| standby.conflicts_with("run"))
)]
pub struct RestoreArgs {
    #[command(flatten)]
    load: LoadArgs,
    /// Profile of a run of the same function: --report then counts the pages that the plan brought ahead and this run
    /// never touched
    #[arg(long, value_name = "FILE", requires = "report")]
    against: Option<PathBuf>,
    #[command(flatten)]
    session: SessionArgs,
}

impl RestoreArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        let mut inputs = self.load.inputs();
        inputs.extend(self.against.iter().map(|path| InputPath::new(path, Role::Profile)));
        inputs
    }
}

/// Boots or restores the machine of `config`, or waits for the API.
pub fn boot(args: &SessionArgs, config: Option<&Path>) -> Result<ExitCode, BoxError> {
    let timeline = Timeline::begin(args.start_time_us);
    let has_api = args.api_sock.is_some() || args.api_fd.is_some();
    let Some(path) = config else {
        return if has_api {
            run(args, VmConfig::default(), Begin::Wait, timeline, Operation { name: "boot", against: None })
        } else {
            refuse("Nothing to boot: give --config FILE, or --api-sock PATH to be told later")
        };
    };
    let mut config = VmConfig::from_file(path)?;
    let (name, begin) = match config.snapshot_load.take() {
        None => ("boot", Begin::Boot),
        Some(load) if load.start != Start::Running && args.run.is_some() || load.start == Start::Paused && !has_api => {
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
    let load =
        args.load.request().map_err(|invalid| ArgumentConflict { command: "restore", message: invalid.in_flags() })?;
    // Loaded before the guest runs: an invalid profile is refused at once.
    let against = args.against.as_deref().map(Profile::load).transpose()?;
    run(&args.session, VmConfig::default(), Begin::Restore(load), timeline, Operation { name: "restore", against })
}

/// The subject of the report.
struct Operation {
    name: &'static str,
    against: Option<Profile>,
}

fn run(
    args: &SessionArgs,
    config: VmConfig,
    begin: Begin,
    mut timeline: Timeline,
    operation: Operation,
) -> Result<ExitCode, BoxError> {
    args.jail.close_inherited(args.api_fd)?;
    if let Some(logger) = &config.logger {
        log::configure(logger)?;
    }
    if args.own_session {
        let why = "it leads a process group already. Leave --own-session out";
        rustix::process::setsid().map_err(|_| format!("Cannot run in a session of its own: {why}"))?;
    }
    // Refused before anything runs.
    args.otlp.as_deref().map(otlp::endpoint).transpose()?;
    // Taken before any thread exists, so that none of them gets the signals.
    let signals = EndSignals::take()?;
    kick::install_handler()?;
    confine(args, &config, &begin)?;
    let (control, receiver) = control::channel()?;
    // The first step that can fail by the caller's fault, and the first that a client may wait for.
    let server = match (&args.api_sock, args.api_fd) {
        (Some(path), _) => Some(api::serve(path, control, &args.id)?),
        (None, Some(fd)) => Some(api::serve_stream(inherit::stream(fd)?, control, &args.id)?),
        (None, None) => None,
    };
    let answer = args.run.as_ref().map(|_| Answer::new()).transpose()?;
    let id = console::request_id("run");
    let watched = answer.as_ref().map(|answer| (id.as_str(), answer));
    let (outside, moments) = console::to_stdout(watched, Duration::from_secs(args.fault_timeout))?;
    let event_sources = EventSources {
        input: input(args, &id)?,
        request: port_request(args, watched),
        reads_stdin: args.run.is_none() && !args.await_parent,
        parent: args.await_parent.then_some(ChildEnd),
        // An API may ask for a fork or another machine at any time, an export makes a connection at the end.
        last_filter: if server.is_none() && args.otlp.is_none() { Kind::Main } else { Kind::Start },
        control: server.is_some().then_some(receiver),
        signals,
        answer: answer.clone(),
        timeout: args.run.is_some().then(|| Duration::from_secs(args.run_timeout)),
    };
    timeline.lap(Slice::Setup);
    let controller = Controller::new(args.id.clone(), config, outside, timeline)?;
    let (outcome, mut controller, event_sources) = main_loop::run(controller, begin, event_sources)?;
    drop(event_sources);
    controller.timeline.note_moments(&moments, answer.as_deref().and_then(Answer::get).map(|(_, at)| at));
    if let Err(error) = controller.write_metrics() {
        tracing::warn!(error = crate::sys::errors::chain(&error), "Cannot write the last metrics");
    }
    let report = (args.report.is_some() || args.trace.is_some() || args.otlp.is_some())
        .then(|| report::collect(&controller.facts(), operation.name, answer.as_deref(), operation.against.as_ref()));
    let stopping = clock::monotonic_ns();
    let stopped = controller.stop();
    drop(server);
    controller.timeline.add(Slice::Stop, stopping, clock::monotonic_ns());
    if let Some(report) = report {
        let report = report?.ended(&outcome).finish(&controller.facts());
        args.report.as_deref().map_or(Ok(()), |path| report.write(path))?;
        args.trace.as_deref().map_or(Ok(()), |path| report.write_trace(path))?;
        args.otlp.as_deref().map_or(Ok(()), |url| export(url, &report))?;
    }
    let code = exit_code(&outcome, args, answer.as_deref(), controller.output())?;
    stopped?;
    Ok(code)
}

/// Enters the jail and installs the seccomp filters, if the arguments ask for them.
fn confine(args: &SessionArgs, config: &VmConfig, begin: &Begin) -> Result<(), BoxError> {
    let files = args.report.iter().chain(&args.trace).map(PathBuf::as_path).collect();
    let outputs = Outputs { socket: args.api_sock.as_deref(), files, has_collector: args.otlp.is_some() };
    let load = match begin {
        Begin::Restore(load) | Begin::Record(load, _) => Some(load),
        Begin::Wait | Begin::Boot => None,
    };
    // Read while the file is still there. A jail is made by calls that no filter allows.
    let filters = args.seccomp.filters()?;
    args.jail.enter(&outputs, config, load)?;
    filters.map_or(Ok(()), |filters| Ok(seccomp::begin(filters, args.await_parent)?))
}

/// Longest wait for a collector at the end of a VM's process.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(7);

/// Sends a report's spans to a collector.
fn export(url: &str, report: &Report) -> Result<(), BoxError> {
    let exporter = Exporter::start(url)?;
    let mut trace_id = [0; 16];
    let mut root_id = [0; 8];
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

fn input(args: &SessionArgs, id: &str) -> Result<Input, BoxError> {
    let Some(function) = &args.run else { return Ok(Input::stdin()?) };
    if function.trim().is_empty() || function.chars().any(char::is_control) {
        return refuse("--run takes one function of the guest with its arguments, such as `hello` or `fill pages=16`");
    }
    Ok(match args.run_port {
        Some(_) => Input::default(),
        None => Input::script(format!("{}\n", request_line(id, function)).as_bytes()),
    })
}

fn request_line(id: &str, function: &str) -> String {
    format!("run {id} {}", function.trim())
}

/// The request of --run, if it goes over vsock (--run-port).
fn port_request(args: &SessionArgs, watched: Option<(&str, &Arc<Answer>)>) -> Option<PortRequest> {
    let port = args.run_port?;
    let function = args.run.as_ref()?;
    let (id, answer) = watched?;
    Some(PortRequest { port, line: request_line(id, function), id: id.to_string(), answer: answer.clone() })
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
