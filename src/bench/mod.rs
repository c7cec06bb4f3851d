//! `tvmm bench` and `tvmm calibrate`: the costs of restores and hosts, measured side by side.
//!
//! Owns: experiments and their report, the page-fault handler that a measured VMM needs, the costs of a host, and
//! waiting for child processes.
//! Must not know: the machine. Each measured VM is a fresh process, driven over its API socket; rivals are interleaved.
//! Start reading: `study/mod.rs`, `study/flow.rs` (the compared ways), `restore.rs` (the time slices of one restore).

pub(crate) mod calibrate;
pub(crate) mod child;
mod crossover;
mod error;
mod grid;
pub(crate) mod guest;
pub mod host_costs;
pub(crate) mod markup;
pub mod page_fault_handler;
mod report;
mod restore;
mod study;

pub use error::Error;

use std::fs::File;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use rustix::fs::SeekFrom;
use serde_json::{Value, json};

use crate::snapshot::{HUGE_PAGE_SIZE, LoadHuge, Location, PAGE_SIZE, derived_dir};
use crate::sys::clock;
use crate::sys::errors::{BoxError, refuse};
use crate::sys::page_cache::{PageCache, resident_pages};
use crate::tiering::policy::Policy;

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Restore a snapshot repeatedly, policies interleaved, and show the time of each slice
    Restore(restore::RestoreBenchArgs),
    /// Compare policies over a grid of working sets: size, share written, dense or scattered, cached or not
    Grid(grid::GridArgs),
    /// Measure functions over every policy, in the experiments of the papers, and draw the results
    Run(study::RunArgs),
    /// Compare copying the read set to local memory with reading it in place, by the number of reads per page
    Crossover(crossover::CrossoverArgs),
    /// Draw results again
    Report(report::ReportArgs),
    /// Compare two results
    Diff(report::DiffArgs),
}

pub fn run(args: &BenchArgs) -> Result<ExitCode, BoxError> {
    match &args.command {
        BenchCommand::Restore(args) => restore::run(args),
        BenchCommand::Grid(args) => grid::run(args),
        BenchCommand::Run(args) => study::run(args),
        BenchCommand::Crossover(args) => crossover::run(args),
        BenchCommand::Report(args) => report::run(args),
        BenchCommand::Diff(args) => report::run_diff(args),
    }
}

/// The change to the page cache before each restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Cache {
    /// No change: after the first run the snapshot is cached.
    Warm,
    /// The snapshot's files are dropped from it.
    Evicted,
    /// The memory file is cached page by page, as if just written in small pieces: it is evicted, written again over
    /// itself one page a call, and synced.
    AsWritten,
}

impl Cache {
    fn name(self) -> &'static str {
        match self {
            Cache::Warm => "warm",
            Cache::Evicted => "evicted",
            Cache::AsWritten => "as written",
        }
    }
}

/// The policies of these names; `all` means all of them.
fn policies(names: &[String]) -> Result<Vec<Policy>, BoxError> {
    match names {
        [all] if all == "all" => Ok(Policy::ALL.to_vec()),
        names => Ok(names.iter().map(|name| name.parse()).collect::<Result<_, _>>()?),
    }
}

/// One restore to measure, in a separate process.
#[derive(Clone)]
struct Trial {
    exe: PathBuf,
    snapshot: PathBuf,
    profile: Option<PathBuf>,
    /// The pool that serves memory; `None`: the snapshot's files.
    pool: Option<PathBuf>,
    function: String,
    /// The vsock port on which the guest takes requests; `None`: the serial line.
    run_port: Option<u32>,
    with_api: bool,
    /// Additional arguments.
    more: Vec<String>,
    scratch: PathBuf,
}

impl Trial {
    /// The restore command, without a request.
    fn command(&self, policy: Policy) -> Command {
        let mut command = Command::new(&self.exe);
        command.arg("restore").arg("--snapshot").arg(&self.snapshot);
        command.args(["--policy", policy.name()]).args(&self.more);
        if let Some(profile) = self.profile.as_ref().filter(|_| policy.needs_profile()) {
            command.arg("--profile").arg(profile);
        }
        if let Some(pool) = &self.pool {
            command.arg("--pool").arg(pool);
        }
        command
    }

    /// Restores once. Returns the process's report with the time measured from outside added.
    fn run(&self, policy: Policy, cache: Cache) -> Result<Value, BoxError> {
        if cache == Cache::Evicted {
            evict(&self.snapshot)?;
        }
        let report_path = self.scratch.join("report.json");
        let mut command = self.command(policy);
        command.args(["--run", &self.function]).arg("--report").arg(&report_path);
        if let Some(port) = self.run_port {
            command.args(["--run-port", &port.to_string(), "--vsock"]).arg(self.scratch.join("v.sock"));
        }
        if self.with_api {
            command.arg("--api-sock").arg(self.scratch.join("api.sock"));
        }
        let start = clock::monotonic_ns();
        command.arg("--start-time-us").arg((start / 1000).to_string());
        let output = child::output(&mut command, guest::TIMEOUT)?;
        let end = clock::monotonic_ns();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return refuse(format!("A restore by {policy} failed: {}", said.trim()));
        }
        let mut report: Value = serde_json::from_slice(&std::fs::read(&report_path)?)?;
        report["outside_us"] = json!((end - start) as f64 / 1000.0);
        Ok(report)
    }
}

/// Records a run of `function` with tvmm in a separate process. Returns the profile's path, which is `out`.
fn record(exe: &Path, snapshot: &Path, function: &str, recorder: &str, out: &Path) -> Result<PathBuf, BoxError> {
    let mut command = Command::new(exe);
    command.args(["profile", "record", "--recorder", recorder, "--run", function]);
    command.args(["--run-timeout", &guest::TIMEOUT.as_secs().to_string()]);
    to_end(command.arg("--snapshot").arg(snapshot).arg("--out").arg(out))?;
    Ok(out.to_owned())
}

/// Adds a snapshot to a pool, laid out by its profile, with tvmm in a separate process.
fn add_to_pool(exe: &Path, pool: &Path, snapshot: &Path, profile: &Path, name: &str) -> Result<(), BoxError> {
    let mut command = Command::new(exe);
    to_end(command.args(["pool", "add", "--name", name, "--profile"]).args([profile, pool, snapshot]))
}

/// Removes a snapshot from a pool, and frees its pages.
fn remove_from_pool(exe: &Path, pool: &Path, name: &str) -> Result<(), BoxError> {
    to_end(Command::new(exe).args(["pool", "rm"]).arg(pool).arg(name))?;
    to_end(Command::new(exe).args(["pool", "gc"]).arg(pool))
}

/// Time limit of a command that packs or copies a large snapshot.
const LONG: Duration = Duration::from_secs(3600);

/// Runs a command that must succeed.
fn to_end(command: &mut Command) -> Result<(), BoxError> {
    let output = child::output(command, LONG)?;
    match output.status.success() {
        true => Ok(()),
        false => refuse(format!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// The end of a slice, µs since process start.
fn end_of(report: &Value, name: &str) -> Option<f64> {
    let slice = report["slices"].as_array()?.iter().find(|slice| slice["slice"] == name)?;
    Some(slice["start_us"].as_f64()? + slice["length_us"].as_f64()?)
}

fn median(sorted: &[f64]) -> Option<f64> {
    sorted.get((sorted.len().max(1) - 1) / 2).copied()
}

/// Brings the snapshot into a state of the page cache. Called before the first restore of a series.
fn prepare(snapshot: &Path, cache: Cache) -> Result<(), BoxError> {
    evict(snapshot)?;
    let path = snapshot.join("memory");
    let failed = |error: std::io::Error| format!("Cannot prepare {}: {error}", path.display());
    match cache {
        Cache::Evicted => Ok(()),
        Cache::Warm => load(snapshot).map_err(|error| failed(error).into()),
        Cache::AsWritten => rewrite(&path).map_err(|error| failed(error).into()),
    }
}

/// Reads the memory file in folios of 2 MiB, if it has that much data in one place, as sealing leaves it.
fn load(snapshot: &Path) -> std::io::Result<()> {
    let file = File::open(snapshot.join("memory"))?;
    for (start, end) in data(&file)? {
        let (start, end) = (start.next_multiple_of(HUGE_PAGE_SIZE), end / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE);
        if start < end {
            PageCache.load_huge(&file, start, end - start)?;
        }
    }
    Ok(())
}

/// Writes the file over itself, a page a call. Its modification time stays, because plans are bound to it.
fn rewrite(path: &Path) -> std::io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let modified = file.metadata()?.modified()?;
    // No readahead: it would bring the following pages in larger folios.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random)?;
    let mut piece = vec![0; 1 << 20];
    for (start, end) in data(&file)? {
        for at in (start..end).step_by(piece.len()) {
            let bytes = &mut piece[..(end - at).min(1 << 20) as usize];
            file.read_exact_at(bytes, at)?;
            rustix::fs::fadvise(&file, at, NonZero::new(bytes.len() as u64), rustix::fs::Advice::DontNeed)?;
            for (index, page) in bytes.chunks(PAGE_SIZE as usize).enumerate() {
                file.write_all_at(page, at + index as u64 * PAGE_SIZE)?;
            }
        }
    }
    file.sync_all()?;
    file.set_modified(modified)
}

/// The start and end offsets of the file's data, without its holes.
fn data(file: &File) -> std::io::Result<Vec<(u64, u64)>> {
    let (mut found, mut at) = (Vec::new(), 0);
    loop {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(found),
            Err(error) => return Err(error.into()),
        };
        at = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        found.push((start, at));
    }
}

/// Drops the snapshot's files, and those derived from it, from the page cache.
///
/// # Errors
/// A part of them stays: the next measurement would not be of an evicted snapshot.
fn evict(snapshot: &Path) -> Result<(), BoxError> {
    let mut paths: Vec<PathBuf> =
        ["memory", "vmstate", "pages", "manifest.json"].map(|name| snapshot.join(name)).to_vec();
    let derived = std::fs::read_dir(derived_dir(&Location::Dir(snapshot.to_path_buf())));
    paths.extend(derived.into_iter().flatten().flatten().map(|entry| entry.path()));
    paths.iter().try_for_each(|path| evict_file(path))
}

/// Number of attempts to drop a file, and the pause between them: pages being written or read at the moment stay.
const EVICTIONS: u32 = 20;
const EVICTION_PAUSE: Duration = Duration::from_millis(5);

fn evict_file(path: &Path) -> Result<(), BoxError> {
    let file = File::open(path).map_err(|error| format!("Cannot open {}: {error}", path.display()))?;
    let mut left = 0;
    for tried in 0..EVICTIONS {
        if tried > 0 {
            file.sync_data()?;
            std::thread::sleep(EVICTION_PAUSE);
        }
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        left = resident_pages(&file)?.unwrap_or_default();
        if left == 0 {
            return Ok(());
        }
    }
    refuse(format!(
        "{left} pages of {} cannot be dropped from the page cache: a VM maps them, or the file system is a tmpfs",
        path.display()
    ))
}

/// A directory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    /// Makes a directory in `parent`, or in the directory for temporary files.
    fn new(parent: Option<&Path>) -> Result<Self, BoxError> {
        let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
        let path = parent.join(format!("tvmm-bench-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|error| format!("Cannot make {}: {error}", path.display()))?;
        Ok(Scratch(path))
    }
}

impl Scratch {
    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: files left in a temporary directory do no harm.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
