//! `tvmm bench restore`: how long restores take, policy by policy, each in a fresh process.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::{Args, Subcommand, ValueEnum};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::{BoxError, refuse};
use crate::snapshot::{Location, derived_dir};
use crate::tiering::policy::Policy;
use crate::vmm::sys::clock;

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Restore a snapshot again and again, policies interleaved, and show where the time goes
    Restore(RestoreBenchArgs),
}

/// What is done to the page cache before each restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Cache {
    /// Nothing: after the first run the snapshot is cached.
    Warm,
    /// The snapshot's files are dropped from it.
    Evicted,
}

#[derive(Debug, Args)]
struct RestoreBenchArgs {
    /// The snapshot to restore
    #[arg(long, value_name = "DIR")]
    snapshot: PathBuf,
    /// Policies to compare, or `all`
    #[arg(long, value_delimiter = ',', default_value = "eager,firecracker", value_name = "NAMES")]
    policies: Vec<String>,
    /// What a recorded run did to each page, for policies that need it
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// The function each restored guest runs
    #[arg(long, default_value = "hello", value_name = "FUNCTION")]
    run: String,
    /// Restores per policy; one more comes first and is not counted
    #[arg(long, default_value_t = 20, value_name = "N")]
    runs: u32,
    /// The page cache before each restore
    #[arg(long, value_enum, default_value = "warm")]
    cache: Cache,
    /// Open the control socket in each restore, as a platform would
    #[arg(long)]
    with_api: bool,
    /// Keep all reports in this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(args: &BenchArgs) -> Result<ExitCode, BoxError> {
    match &args.command {
        BenchCommand::Restore(args) => restore(args),
    }
}

/// Rows of the table: the name, and where the number is in a report.
const ROWS: [(&str, Row); 18] = [
    ("spawn", Row::Slice("spawn")),
    ("setup", Row::Slice("setup")),
    ("state_load", Row::Slice("state_load")),
    ("map", Row::Slice("map")),
    ("preload", Row::Slice("preload")),
    ("vm_create", Row::Slice("vm_create")),
    ("resume", Row::Slice("resume")),
    ("→ first exit", Row::Since("first_exit_us")),
    ("→ first response", Row::Since("first_output_us")),
    ("→ answer", Row::End("execute")),
    ("stop", Row::Slice("stop")),
    ("process, outside", Row::Since("outside_us")),
    ("pages in by reads", Row::Count("fault_ins", "by_read")),
    ("pages in by writes", Row::Count("fault_ins", "by_write")),
    ("pages preloaded", Row::Count("fault_ins", "preloaded")),
    ("vCPU page faults", Row::Count("fault_ins", "minor_faults")),
    ("local DRAM, KiB", Row::Count("memory", "guest_private_kib")),
    ("mappings (VMAs)", Row::Count("memory", "guest_vmas")),
];

#[derive(Clone, Copy)]
enum Row {
    /// The length of a slice (the sum, if it occurs more than once).
    Slice(&'static str),
    /// Time since process start, by name.
    Since(&'static str),
    /// A number of a part of the report.
    Count(&'static str, &'static str),
    /// The end of a slice since process start.
    End(&'static str),
}

fn restore(args: &RestoreBenchArgs) -> Result<ExitCode, BoxError> {
    let policies: Vec<Policy> = match args.policies.as_slice() {
        [all] if all == "all" => Policy::ALL.to_vec(),
        names => names.iter().map(|name| name.parse()).collect::<Result<_, _>>()?,
    };
    if policies.is_empty() || args.runs == 0 {
        return refuse("Nothing to measure: give at least one policy and one run");
    }
    let exe = std::env::current_exe()?;
    let scratch = Scratch::new()?;
    let mut reports: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    let bar = ProgressBar::new(u64::from(args.runs + 1) * policies.len() as u64);
    for round in 0..=args.runs {
        for &policy in &policies {
            if args.cache == Cache::Evicted {
                evict(&args.snapshot)?;
            }
            let report = one(&exe, args, policy, &scratch.0)?;
            if round > 0 {
                reports.entry(policy.name()).or_default().push(report);
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    println!("{}", table(args, &policies, &reports));
    if let Some(path) = &args.json {
        let all = json!({ "cache": format!("{:?}", args.cache).to_lowercase(), "run": args.run, "reports": reports });
        std::fs::write(path, format!("{all:#}\n"))
            .map_err(|error| format!("Cannot write {}: {error}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One restore in a process of its own. Its report, with the time measured from outside added.
fn one(exe: &Path, args: &RestoreBenchArgs, policy: Policy, scratch: &Path) -> Result<Value, BoxError> {
    let report_path = scratch.join("report.json");
    let mut command = Command::new(exe);
    command.arg("restore").arg("--snapshot").arg(&args.snapshot).args(["--policy", policy.name(), "--run", &args.run]);
    command.arg("--report").arg(&report_path);
    if let Some(profile) = args.profile.as_ref().filter(|_| policy.needs_profile()) {
        command.arg("--profile").arg(profile);
    }
    if args.with_api {
        command.arg("--api-sock").arg(scratch.join("api.sock"));
    }
    let start = clock::monotonic_ns();
    command.arg("--start-time-us").arg((start / 1000).to_string());
    let output = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output()?;
    let end = clock::monotonic_ns();
    if !output.status.success() {
        return refuse(format!("A restore by {policy} failed: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    let mut report: Value = serde_json::from_slice(&std::fs::read(&report_path)?)?;
    report["outside_us"] = json!((end - start) as f64 / 1000.0);
    Ok(report)
}

/// Drops the snapshot's clean pages from the page cache.
fn evict(snapshot: &Path) -> Result<(), BoxError> {
    let mut paths: Vec<PathBuf> =
        ["memory", "vmstate", "pages", "manifest.json"].map(|name| snapshot.join(name)).to_vec();
    let derived = std::fs::read_dir(derived_dir(&Location::Dir(snapshot.to_path_buf())));
    paths.extend(derived.into_iter().flatten().flatten().map(|entry| entry.path()));
    for path in paths {
        let file = File::open(&path).map_err(|error| format!("Cannot open {}: {error}", path.display()))?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}

fn value(report: &Value, row: Row) -> Option<f64> {
    let slices = || report["slices"].as_array().into_iter().flatten();
    let number = |slice: &Value, key: &str| slice[key].as_f64();
    match row {
        Row::Since(name) => report[name].as_f64(),
        Row::Count(part, name) => report[part][name].as_f64(),
        Row::Slice(name) => {
            let lengths: Vec<f64> = slices()
                .filter(|slice| slice["slice"] == name)
                .filter_map(|slice| number(slice, "length_us"))
                .collect();
            (!lengths.is_empty()).then(|| lengths.iter().sum())
        }
        Row::End(name) => {
            let slice = slices().find(|slice| slice["slice"] == name)?;
            Some(number(slice, "start_us")? + number(slice, "length_us")?)
        }
    }
}

fn table(args: &RestoreBenchArgs, policies: &[Policy], reports: &BTreeMap<&str, Vec<Value>>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    let cache = if args.cache == Cache::Warm { "warm" } else { "evicted" };
    let what = if policies.len() > WIDE { "median" } else { "median (p5–p95)" };
    let title = format!("µs, {what} of {}; `{}`; page cache {cache}", args.runs, args.run);
    let mut header = vec![title];
    header.extend(policies.iter().map(|policy| policy.name().to_string()));
    table.set_header(header);
    for (name, row) in ROWS {
        let mut cells = vec![name.to_string()];
        for policy in policies {
            let all = reports.get(policy.name()).into_iter().flatten();
            let mut values: Vec<f64> = all.filter_map(|report| value(report, row)).collect();
            values.sort_by(f64::total_cmp);
            // More columns than a terminal is wide: the spread is in the JSON.
            cells.push(if policies.len() > WIDE { median(&values) } else { spread(&values) });
        }
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// The most policies whose spread is shown.
const WIDE: usize = 3;

fn median(sorted: &[f64]) -> String {
    sorted.get((sorted.len().max(1) - 1) / 2).map_or("–".to_string(), |value| format!("{value:.0}"))
}

/// "median (p5–p95)" of sorted values.
fn spread(sorted: &[f64]) -> String {
    let at = |quantile: f64| sorted[((sorted.len() - 1) as f64 * quantile).round() as usize];
    if sorted.is_empty() {
        return "–".to_string();
    }
    format!("{:.0} ({:.0}–{:.0})", at(0.5), at(0.05), at(0.95))
}

/// A directory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, BoxError> {
        let path = std::env::temp_dir().join(format!("tvmm-bench-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|error| format!("Cannot make {}: {error}", path.display()))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left in a temporary directory does no harm.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
