//! `tvmm bench restore`: measures restores policy by policy, each in a fresh process.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::cache::Cache;
use super::scratch::Scratch;
use super::trial::{Trial, end_of, median, policies};
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::plan_file::CostsUsed;
use crate::tiering::policy::Policy;

#[derive(Debug, Args)]
pub struct RestoreBenchArgs {
    /// The snapshot to restore
    #[arg(long, value_name = "DIR")]
    snapshot: PathBuf,
    /// Policies to compare, or `all`
    #[arg(long, value_delimiter = ',', default_value = "eager,firecracker", value_name = "NAMES")]
    policies: Vec<String>,
    /// Profile of a recorded run, for policies that need one
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Take memory from this pool, which has the snapshot
    #[arg(long, value_name = "POOL")]
    pool: Option<PathBuf>,
    /// The function each restored guest runs
    #[arg(long, default_value = "hello", value_name = "FUNCTION")]
    run: String,
    /// Make the request on this vsock port of the guest, instead of on its serial line
    #[arg(long, value_name = "PORT")]
    run_port: Option<u32>,
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

/// Rows of the table: the name, and the number's place in a report.
const ROWS: [(&str, Row); 20] = [
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
    ("  not expected to be touched", Row::Fit("preload")),
    ("in place, not expected to be read", Row::Fit("in_place")),
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
    /// Pages of a placement that the profile did not expect to be touched.
    Fit(&'static str),
    /// The end of a slice since process start.
    End(&'static str),
}

pub fn run(args: &RestoreBenchArgs) -> Result<ExitCode, BoxError> {
    let policies = policies(&args.policies)?;
    if policies.is_empty() || args.runs == 0 {
        return refuse("Nothing to measure: give at least one policy and one run");
    }
    let scratch = Scratch::new(None)?;
    if args.cache == Cache::AsWritten {
        return refuse(
            "The memory file would be written over itself: `tvmm bench grid` does that to snapshots of its own",
        );
    }
    let trial = Trial {
        exe: std::env::current_exe()?,
        snapshot: args.snapshot.clone(),
        profile: args.profile.clone(),
        pool: args.pool.clone(),
        function: args.run.clone(),
        run_port: args.run_port,
        with_api: args.with_api,
        more: Vec::new(),
        scratch: scratch.path().to_owned(),
    };
    let mut reports: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    let bar = ProgressBar::new(u64::from(args.runs + 1) * policies.len() as u64);
    for round in 0..=args.runs {
        for &policy in &policies {
            let report = trial.run(policy, args.cache)?;
            if round > 0 {
                reports.entry(policy.name()).or_default().push(report);
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    out!("{}", table(args, &policies, &reports));
    if let Some(costs) = costs(&reports) {
        out!("costs: {costs}");
    }
    if let Some(path) = &args.json {
        let all = json!({ "cache": args.cache.name(), "run": args.run, "reports": reports });
        std::fs::write(path, format!("{all:#}\n"))
            .map_err(|error| format!("Cannot write {}: {error}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The cost numbers used for plans, if a policy used any.
fn costs(reports: &BTreeMap<&str, Vec<Value>>) -> Option<CostsUsed> {
    let used = reports.values().flatten().map(|report| report["restore"]["costs"].clone());
    used.filter_map(|costs| serde_json::from_value(costs).ok()?).next()
}

fn value(report: &Value, row: Row) -> Option<f64> {
    let slices = || report["slices"].as_array().into_iter().flatten();
    let number = |slice: &Value, key: &str| slice[key].as_f64();
    match row {
        Row::Since(name) => report[name].as_f64(),
        Row::Count(part, name) => report[part][name].as_f64(),
        Row::Fit(placement) => report["restore"]["fit_expected"][placement]["untouched"].as_f64(),
        Row::Slice(name) => {
            let lengths: Vec<f64> = slices()
                .filter(|slice| slice["slice"] == name)
                .filter_map(|slice| number(slice, "length_us"))
                .collect();
            (!lengths.is_empty()).then(|| lengths.iter().sum())
        }
        Row::End(name) => end_of(report, name),
    }
}

fn table(args: &RestoreBenchArgs, policies: &[Policy], reports: &BTreeMap<&str, Vec<Value>>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    let cache = args.cache.name();
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
            // More columns than a terminal is wide: the ranges are in the JSON.
            cells.push(if policies.len() > WIDE {
                median(&values).map_or("–".to_string(), |value| format!("{value:.0}"))
            } else {
                spread(&values)
            });
        }
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// With more policies than this their ranges are not shown.
const WIDE: usize = 3;

/// "median (p5–p95)" of sorted values.
fn spread(sorted: &[f64]) -> String {
    let at = |quantile: f64| sorted[((sorted.len() - 1) as f64 * quantile).round() as usize];
    if sorted.is_empty() {
        return "–".to_string();
    }
    format!("{:.0} ({:.0}–{:.0})", at(0.5), at(0.05), at(0.95))
}
