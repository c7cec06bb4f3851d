//! `tvmm bench grid`: policies over working sets of many shapes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::cache::{self, Cache};
use super::commands::{add_to_pool, record, remove_from_pool};
use super::guest::{self, Guest};
use super::scratch::Scratch;
use super::trial::{Trial, end_of, median, policies};
use crate::sys::api_client::Client;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::policy::Policy;

#[derive(Debug, Args)]
pub struct GridArgs {
    /// Policies to compare, or `all`
    #[arg(long, value_delimiter = ',', default_value = "all", value_name = "NAMES")]
    policies: Vec<String>,
    /// Guest memory, MiB
    #[arg(long, default_value_t = 512, value_name = "MIB")]
    mem: u64,
    /// Working sets, MiB; default: 8,64, with --full 8,32,64,128
    #[arg(long, value_delimiter = ',', value_name = "MIB")]
    sets: Vec<u64>,
    /// Share of the set's pages that the function writes, percent; default: 0,50, with --full 0,10,30,50
    #[arg(long, value_delimiter = ',', value_name = "PERCENT")]
    written: Vec<u64>,
    /// Page cache states; default: warm,evicted, with --full all
    #[arg(long, value_enum, value_delimiter = ',')]
    caches: Vec<Cache>,
    /// Scattered sets are spread over so many times their size, as far as memory reaches
    #[arg(long, default_value_t = 4, value_name = "TIMES", value_parser = clap::value_parser!(u64).range(1..))]
    spread: u64,
    /// The whole grid; takes most of an hour with all policies
    #[arg(long)]
    full: bool,
    /// The guest's own page tables: 2m or 4k
    #[arg(long, default_value = "2m", value_parser = ["2m", "4k"])]
    tables: String,
    /// Restores per policy and case; one more comes first and is not counted
    #[arg(long, default_value_t = 10, value_name = "N")]
    runs: u32,
    /// Show the least and the most beside each median
    #[arg(long)]
    spans: bool,
    /// Add each snapshot to this pool, with its profile, and take memory from there; it is removed again
    #[arg(long, value_name = "POOL")]
    pool: Option<PathBuf>,
    /// Directory for the snapshots; default: the directory for temporary files
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Keep all numbers in this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Pages per MiB.
const PER_MIB: u64 = 256;
/// The guest's own memory, MiB, rounded up generously.
const GUEST_OWN: u64 = 16;

/// One working set.
struct Case {
    set: u64,
    written: u64,
    scattered: bool,
}

impl Case {
    fn name(&self) -> String {
        let shape = if self.scattered { "scattered" } else { "dense" };
        format!("{} MiB {shape}, {} % written", self.set, self.written)
    }

    /// Pages filled before the snapshot.
    fn filled(&self, args: &GridArgs) -> u64 {
        let spread = if self.scattered { args.spread } else { 1 };
        self.set.saturating_mul(spread).min(args.mem.saturating_sub(GUEST_OWN)) * PER_MIB
    }

    fn function(&self) -> String {
        // With a seed the guest visits pages in random order over the whole filled range; without, one after the other.
        let seed = if self.scattered { " seed=7" } else { "" };
        format!("touch pages={} write={}{seed}", self.set * PER_MIB, self.written)
    }
}

pub fn run(args: &GridArgs) -> Result<ExitCode, BoxError> {
    let policies = policies(&args.policies)?;
    if policies.is_empty() || args.runs == 0 {
        return refuse("Nothing to measure: give at least one policy and one run");
    }
    let Axes { sets, written, caches } = axes(args);
    if let Some(set) = sets.iter().find(|&&set| set == 0 || set + GUEST_OWN > args.mem) {
        return refuse(format!("A working set of {set} MiB does not fit a guest of {} MiB", args.mem));
    }
    let scratch = Scratch::new(args.dir.as_deref())?;
    let mut cases = Vec::new();
    for &set in &sets {
        for &written in &written {
            cases.extend([false, true].map(|scattered| Case { set, written, scattered }));
        }
    }
    let per_case = u64::from(args.runs + 1) * policies.len() as u64 * caches.len() as u64;
    let bar = ProgressBar::new(per_case * cases.len() as u64);
    let mut results: Vec<(String, Numbers)> = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        let dir = scratch.path().join(format!("case{index}"));
        std::fs::create_dir(&dir)?;
        let trial = prepare(args, case, &dir)?;
        for &cache in &caches {
            let numbers = measure(args, &policies, &trial, cache, &bar)?;
            results.push((format!("{}, {}", case.name(), cache.name()), numbers));
        }
        if let Some(pool) = &args.pool {
            remove_from_pool(&trial.exe, pool, &name_in_pool(&dir))?;
        }
        std::fs::remove_dir_all(&dir)?;
    }
    bar.finish_and_clear();
    out!("{}", table(args, &policies, &results));
    if let Some(path) = &args.json {
        let all: Vec<Value> =
            results.iter().map(|(case, numbers)| json!({ "case": case, "policies": numbers })).collect();
        let all = json!({ "mem_mib": args.mem, "tables": args.tables, "runs": args.runs, "cases": all });
        std::fs::write(path, format!("{all:#}\n"))
            .map_err(|error| format!("Cannot write {}: {error}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The axes of the grid.
struct Axes {
    sets: Vec<u64>,
    written: Vec<u64>,
    caches: Vec<Cache>,
}

fn axes(args: &GridArgs) -> Axes {
    fn or<T: Copy>(given: &[T], full: bool, short: &[T], long: &[T]) -> Vec<T> {
        match (given, full) {
            ([], true) => long.to_vec(),
            ([], false) => short.to_vec(),
            _ => given.to_vec(),
        }
    }
    Axes {
        sets: or(&args.sets, args.full, &[8, 64], &[8, 32, 64, 128]),
        written: or(&args.written, args.full, &[0, 50], &[0, 10, 30, 50]),
        caches: or(&args.caches, args.full, &[Cache::Warm, Cache::Evicted], Cache::value_variants()),
    }
}

/// Per policy: each run's time to the answer in µs, and fault-ins, of the last run, by reads and by writes.
type Numbers = BTreeMap<&'static str, Value>;

/// Boots a guest, lets it fill memory, snapshots it, and records a run of the function.
fn prepare(args: &GridArgs, case: &Case, dir: &Path) -> Result<Trial, BoxError> {
    let exe = std::env::current_exe()?;
    let config = json!({
        "boot-source": { "boot_args": format!("pt={}", args.tables) },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": args.mem },
    });
    let config_path = dir.join("vm.json");
    let socket = dir.join("api.sock");
    std::fs::write(&config_path, config.to_string())?;
    let mut guest = Guest::boot(&exe, &config_path, &socket)?;
    guest.call(&format!("fill pages={} seed=1", case.filled(args)))?;
    let snapshot = dir.join("snapshot");
    guest::snapshot_to(&Client::new(&socket), &snapshot)?;
    drop(guest);
    let profile = dir.join("run.profile");
    let function = case.function();
    record(&exe, &snapshot, &function, "uffd", &profile)?;
    if let Some(pool) = &args.pool {
        add_to_pool(&exe, pool, &snapshot, &profile, &name_in_pool(dir))?;
    }
    Ok(Trial {
        exe,
        snapshot,
        profile: Some(profile),
        pool: args.pool.clone(),
        function,
        run_port: None,
        with_api: false,
        more: Vec::new(),
        scratch: dir.to_owned(),
    })
}

/// A name that differs between benchmarks and between cases: it comes from the scratch directory.
fn name_in_pool(dir: &Path) -> String {
    dir.components().rev().take(2).map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("-")
}

fn measure(
    args: &GridArgs,
    policies: &[Policy],
    trial: &Trial,
    cache: Cache,
    bar: &ProgressBar,
) -> Result<Numbers, BoxError> {
    cache::prepare(&trial.snapshot, cache)?;
    let mut times: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    let mut numbers = Numbers::new();
    let mut order = policies.to_vec();
    for round in 0..=args.runs {
        // Forth and back: a restore leaves a state behind (free memory in huge or in small pages) that the next one
        // finds.
        order.reverse();
        for &policy in &order {
            let report = trial.run(policy, cache)?;
            bar.inc(1);
            if round == 0 {
                continue;
            }
            let Some(answered) = end_of(&report, "execute") else { return refuse("A report has no answer") };
            times.entry(policy.name()).or_default().push(answered);
            numbers.insert(policy.name(), json!({ "fault_ins": report["fault_ins"], "memory": report["memory"] }));
        }
    }
    for (policy, mut times) in times {
        times.sort_by(f64::total_cmp);
        if let Some(entry) = numbers.get_mut(policy) {
            entry["answer_us"] = json!(times);
        }
    }
    Ok(numbers)
}

/// A policy's times, ascending.
fn times_us(numbers: &Numbers, policy: Policy) -> Option<Vec<f64>> {
    Some(numbers.get(policy.name())?["answer_us"].as_array()?.iter().filter_map(Value::as_f64).collect())
}

fn answer_ms(numbers: &Numbers, policy: Policy) -> Option<f64> {
    median(&times_us(numbers, policy)?).map(|us| us / 1000.0)
}

fn span_ms(numbers: &Numbers, policy: Policy) -> Option<(f64, f64)> {
    let times = times_us(numbers, policy)?;
    Some((times.first()? / 1000.0, times.last()? / 1000.0))
}

fn table(args: &GridArgs, policies: &[Policy], results: &[(String, Numbers)]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    let mut header =
        vec![format!("ms to the answer, median of {}; {} MiB guest, {} tables", args.runs, args.mem, args.tables)];
    header.extend(policies.iter().map(|policy| policy.name().to_string()));
    table.set_header(header);
    let mut logs: BTreeMap<&str, (f64, u32)> = BTreeMap::new();
    for (case, numbers) in results {
        let mut cells = vec![case.clone()];
        for &policy in policies {
            let ms = answer_ms(numbers, policy);
            if let Some(ms) = ms {
                let (sum, count) = logs.entry(policy.name()).or_default();
                (*sum, *count) = (*sum + ms.ln(), *count + 1);
            }
            let span = if args.spans { span_ms(numbers, policy) } else { None };
            let span = span.map_or(String::new(), |(least, most)| format!(" ({least:.1}–{most:.1})"));
            cells.push(ms.map_or("–".to_string(), |ms| format!("{ms:.1}{span}")));
        }
        table.add_row(cells);
    }
    let mut cells = vec!["geometric mean".to_string()];
    cells.extend(policies.iter().map(|policy| {
        let (sum, count) = logs.get(policy.name()).copied().unwrap_or_default();
        if count == 0 { "–".to_string() } else { format!("{:.1}", (sum / f64::from(count)).exp()) }
    }));
    table.add_row(cells);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
