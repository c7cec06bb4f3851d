//! `tvmm bench crossover`: is it better to copy the read set to local memory, or to read it in place? The answer
//! depends on how often each page is read again, and on the latency of the far tier.
//!
//! The guest emulates far memory: after each load from a page in place it waits for the additional latency of such a
//! load; loads from copied pages do not wait. This models loads that depend on each other and miss the CPU's caches
//! (following pointers), not a stream, of which a CPU has many loads under way at once.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use indicatif::ProgressBar;
use serde_json::json;

use super::cache::{Cache, prepare};
use super::commands::record;
use super::guest::{Guest, snapshot_to};
use super::report::chart::{Lines, Series};
use super::scratch::Scratch;
use super::study::stats::Summary;
use super::trial::{Trial, end_of};
use crate::sys::api_client::Client;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::policy::Policy;

#[derive(Debug, Args)]
pub struct CrossoverArgs {
    /// The read set, MiB
    #[arg(long, default_value_t = 64, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=65_536))]
    set: u64,
    /// Loads from each page of it; each from a cache line of its own up to 64, then all lines again and again
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64,256", value_name = "NUMBERS")]
    loads: Vec<u32>,
    /// Additional latency of a load from the far tier, ns
    #[arg(long, value_delimiter = ',', default_value = "0,150,300", value_name = "NS",
        value_parser = clap::value_parser!(u32).range(0..=100_000))]
    far_ns: Vec<u32>,
    /// Restores of each kind; one more comes first and is not counted
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Draw the result
    #[arg(long, value_name = "FILE.svg")]
    svg: Option<PathBuf>,
    /// Keep all numbers in this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A placement of the read set: copied, or in place at a distance.
struct Way {
    name: String,
    policy: Policy,
    far_ns: u32,
}

const PER_MIB: u64 = 256;
/// Cache lines of a page.
const LINES: u32 = 64;
const MOST_LOADS: u32 = 1 << 16;
/// Guest memory in addition to the set, MiB.
const REST_MIB: u64 = 64;

pub fn run(args: &CrossoverArgs) -> Result<ExitCode, BoxError> {
    if let Some(loads) = args.loads.iter().find(|loads| !loads.is_power_of_two() || **loads > MOST_LOADS) {
        return refuse(format!("{loads} loads per page are not a power of two up to {MOST_LOADS}"));
    }
    let scratch = Scratch::new(None)?;
    let trial = ready(args, scratch.path())?;
    let copied = Way { name: "copied first".into(), policy: Policy::Aquifer, far_ns: 0 };
    let in_place =
        |far_ns: &u32| Way { name: format!("in place, +{far_ns} ns"), policy: Policy::Trenv, far_ns: *far_ns };
    let ways: Vec<Way> = std::iter::once(copied).chain(args.far_ns.iter().map(in_place)).collect();
    prepare(&trial.snapshot, Cache::Warm)?;
    let bar = ProgressBar::new(ways.len() as u64 * args.loads.len() as u64 * u64::from(args.runs + 1));
    let mut results: Vec<Vec<Summary>> = Vec::new();
    for &loads in &args.loads {
        let mut times: Vec<Vec<f64>> = vec![Vec::new(); ways.len()];
        for round in 0..=args.runs {
            for (way, times) in ways.iter().zip(&mut times) {
                let lines = loads.min(LINES);
                let passes = loads.div_ceil(LINES);
                let pages = args.set * PER_MIB;
                let function = format!("scan pages={pages} lines={lines} passes={passes} line_ns={}", way.far_ns);
                let report = Trial { function, ..trial.clone() }.run(way.policy, Cache::Warm)?;
                bar.inc(1);
                let Some(us) = end_of(&report, "execute") else { return refuse("A report has no answer") };
                if round > 0 {
                    times.push(us / 1000.0);
                }
            }
        }
        results.push(times.into_iter().filter_map(Summary::of).collect());
    }
    bar.finish_and_clear();
    out!("{}", table(args, &ways, &results));
    for (index, way) in ways.iter().enumerate().skip(1) {
        out!("{}: {}", way.name, crossing(args, &results, index));
    }
    keep(args, &ways, &results)?;
    Ok(ExitCode::SUCCESS)
}

/// A snapshot of a guest with the set in memory, and a profile of one pass over it.
fn ready(args: &CrossoverArgs, dir: &Path) -> Result<Trial, BoxError> {
    let exe = std::env::current_exe()?;
    let config = json!({
        "boot-source": {},
        "machine-config": { "vcpu_count": 1, "mem_size_mib": args.set + REST_MIB },
    });
    let config_path = dir.join("vm.json");
    let socket = dir.join("api.sock");
    std::fs::write(&config_path, config.to_string())?;
    let mut guest = Guest::boot(&exe, &config_path, &socket)?;
    guest.call(&format!("fill pages={} seed=1", args.set * PER_MIB))?;
    let snapshot_dir = dir.join("snapshot");
    snapshot_to(&Client::new(&socket), &snapshot_dir)?;
    drop(guest);
    let function = format!("scan pages={}", args.set * PER_MIB);
    let profile = record(&exe, &snapshot_dir, &function, "uffd", &dir.join("run.profile"))?;
    Ok(Trial {
        exe,
        snapshot: snapshot_dir,
        profile: Some(profile),
        pool: None,
        function,
        run_port: None,
        with_api: false,
        more: Vec::new(),
        scratch: dir.to_owned(),
    })
}

/// The number of loads from which on a copy pays.
fn crossing(args: &CrossoverArgs, results: &[Vec<Summary>], way: usize) -> String {
    let pays =
        |row: &Vec<Summary>| row.first().zip(row.get(way)).is_some_and(|(copy, place)| copy.median < place.median);
    match results.iter().position(pays) {
        Some(0) => format!("a copy pays from {} load(s) per page on", args.loads[0]),
        Some(at) => format!("a copy pays from between {} and {} loads per page on", args.loads[at - 1], args.loads[at]),
        None => format!("a copy does not pay up to {} loads per page", args.loads.last().unwrap_or(&0)),
    }
}

fn table(args: &CrossoverArgs, ways: &[Way], results: &[Vec<Summary>]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    let first = format!("ms to the answer, median (least–most) of {}; {} MiB read", args.runs, args.set);
    table.set_header(std::iter::once(first).chain(ways.iter().map(|way| way.name.clone())));
    for (loads, row) in args.loads.iter().zip(results) {
        let cells = row.iter().map(|all| format!("{:.1} ({:.1}–{:.1})", all.median, all.min, all.max));
        table.add_row(std::iter::once(format!("{loads} loads per page")).chain(cells));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn keep(args: &CrossoverArgs, ways: &[Way], results: &[Vec<Summary>]) -> Result<(), BoxError> {
    let write = |path: &Path, text: String| {
        std::fs::write(path, text).map_err(|error| format!("Cannot write {}: {error}", path.display()))
    };
    if let Some(path) = &args.svg {
        let points: Vec<String> = args.loads.iter().map(ToString::to_string).collect();
        let series: Vec<Series> =
            ways.iter().enumerate().map(|(colour, way)| Series { name: way.name.clone(), colour }).collect();
        let median = |index: usize| results.iter().map(|row| row.get(index).map(|all| all.median)).collect();
        let lines = Lines {
            title: "Copying the read set against reading it in place",
            x_unit: "loads per page",
            y_unit: "ms",
            points: &points,
            series: &series,
            values: (0..ways.len()).map(median).collect(),
        };
        write(path, lines.svg().ok_or("There is nothing to draw")?)?;
    }
    if let Some(path) = &args.json {
        let rows = args.loads.iter().zip(results).map(|(loads, row)| {
            let ways = ways.iter().zip(row).map(|(way, all)| {
                json!({ "way": way.name, "far_ns": way.far_ns, "median_ms": all.median, "min_ms": all.min,
                "max_ms": all.max })
            });
            json!({ "loads_per_page": loads, "ways": ways.collect::<Vec<_>>() })
        });
        let all = json!({ "set_mib": args.set, "runs": args.runs, "rows": rows.collect::<Vec<_>>() });
        write(path, format!("{all:#}\n"))?;
    }
    Ok(())
}
