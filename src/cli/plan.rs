//! `tvmm plan`: shows the plan that a policy makes for a snapshot, in numbers and drawn, or writes it to a file.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::identify::{InputPath, Role};
use super::units::{mib, mib_of_pages};
use crate::session::planning::planner;
use crate::session::sources;
use crate::snapshot::{
    Chain, ColdSpec, Extent, Fill, Gfn, ImageSpec, JsonPlan, Location, MemoryLayout, PAGE_SIZE, Placement, RestorePlan,
};
use crate::sys::errors::BoxError;
use crate::tiering::costs::SourceCache;
use crate::tiering::fit::Fit;
use crate::tiering::plan_file::PlanFile;
use crate::tiering::planner::PlanRequest;
use crate::tiering::policy::{Budget, DRAM_PRICE_US, Estimate, Policy};
use crate::tiering::profile::Profile;

/// The caching of the snapshot's memory when the plan is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Cache {
    /// In folios of 2 MiB, as tvmm leaves a snapshot
    Huge,
    /// In small folios, like files that were just written
    Small,
    /// Not at all
    Cold,
}

impl From<Cache> for SourceCache {
    fn from(cache: Cache) -> SourceCache {
        match cache {
            Cache::Huge => SourceCache::Huge,
            Cache::Small => SourceCache::Small,
            Cache::Cold => SourceCache::Cold,
        }
    }
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    /// The snapshot directory
    #[arg(long, value_name = "DIR")]
    snapshot: PathBuf,
    /// Profile of a recorded run (`tvmm profile record`), for policies that need one; without --policy it means tiered
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// The policy that makes the plan [default: tiered with --profile, else firecracker]
    #[arg(long, value_name = "NAME")]
    policy: Option<Policy>,
    /// Local memory for preloaded pages and pages that the guest will write, MiB
    #[arg(long, value_name = "MIB")]
    dram: Option<u64>,
    /// Latency to trade for memory: additional µs per request that saving 1 MiB of preloaded local memory is worth (0
    /// optimises latency only); only `tiered` weighs it
    #[arg(long, default_value_t = DRAM_PRICE_US, value_name = "US")]
    dram_price: u64,
    /// Memory in the CXL tier, MiB
    #[arg(long, value_name = "MIB")]
    cxl: Option<u64>,
    /// Take pages from this pool instead of the snapshot's files; several: from the first that has the snapshot
    #[arg(long, value_name = "POOL")]
    pool: Vec<PathBuf>,
    /// Take pages from this cold pool, as `tvmm restore --cold` does; repeatable, nearest first, the next stands by
    #[arg(long, value_name = "POOL")]
    cold: Vec<ColdSpec>,
    /// Costs of this host (`tvmm calibrate`); default: its last measurement, else built-in numbers
    #[arg(long, value_name = "FILE")]
    costs: Option<PathBuf>,
    /// Caching of the snapshot's memory; default: as a restore would find it now
    #[arg(long, value_enum)]
    cache: Option<Cache>,
    /// Profile of a run to compare the plan with: counts pages that it brings ahead and this run does not touch, and
    /// pages that it leaves out and this run touches
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Print JSON, which `tvmm restore --plan` takes, too
    #[arg(long)]
    json: bool,
    /// Write the plan to this file, for `tvmm restore --plan`
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl PlanArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        let profiles = self.profile.iter().chain(&self.against).map(|path| InputPath::new(path, Role::Profile));
        let cold = self.cold.iter().filter_map(ColdSpec::dir).map(|dir| InputPath::new(dir, Role::Pool));
        let pools = self.pool.iter().map(|path| InputPath::new(path, Role::Pool)).chain(cold);
        std::iter::once(InputPath::new(&self.snapshot, Role::Snapshot)).chain(profiles).chain(pools).collect()
    }
}

pub fn run(args: &PlanArgs) -> Result<ExitCode, BoxError> {
    let sources = sources::look(&Location::Dir(args.snapshot.clone()), &args.pool, &args.cold)?;
    let chain = &sources.chain;
    let file = planner(&sources).describe(&PlanRequest {
        policy: args.policy.unwrap_or_else(|| Policy::default_for(args.profile.as_deref())),
        profile: args.profile.as_deref(),
        costs: args.costs.as_deref(),
        budget: Budget::of_mib(args.dram, args.cxl, args.dram_price),
        cache: args.cache.map(SourceCache::from),
    })?;
    let against = args.against.as_deref().map(|path| against(path, &file.plan, chain)).transpose()?;
    if let Some(path) = &args.out {
        write(&file, path)?;
    }
    if args.json {
        out!("{:#}", to_json(&file, against.as_ref()));
    } else {
        print(&file);
        if let Some(fit) = against.as_ref().or(file.fit.as_ref()) {
            print_fit(fit);
        }
        draw(&file.plan, chain.layout());
    }
    Ok(ExitCode::SUCCESS)
}

fn write(file: &PlanFile, path: &Path) -> Result<(), BoxError> {
    let bytes = file.save(path)?;
    say!("{}: {bytes} bytes", path.display());
    Ok(())
}

/// Compares the plan with the run of the profile in `path`.
fn against(path: &Path, plan: &RestorePlan, chain: &Chain) -> Result<Fit, BoxError> {
    let profile = Profile::load(path)?;
    profile.check_for(chain.tip())?;
    Ok(Fit::of(plan, &profile))
}

/// The groups of extents in a drawn plan: name, symbol, placement and fill.
const GROUPS: [(&str, char, Placement, Option<Fill>); 7] = [
    ("preload, copied", '█', Placement::Preload, Some(Fill::Copy)),
    ("preload, installed", '▓', Placement::Preload, Some(Fill::Install)),
    ("preload, copy-on-write broken", '▒', Placement::Preload, Some(Fill::BreakCow)),
    ("in place", '=', Placement::InPlace, None),
    ("cow-file", '-', Placement::CowFile, None),
    ("lazy", '.', Placement::Lazy, None),
    ("zero", ' ', Placement::Zero, None),
];

fn group_of(placement: Placement, fill: Fill) -> usize {
    let fits = |(_, _, p, f): &(&str, char, Placement, Option<Fill>)| *p == placement && f.is_none_or(|f| f == fill);
    GROUPS.iter().position(fits).unwrap_or(GROUPS.len() - 1)
}

/// Pages and extents of each group.
fn grouped(plan: &RestorePlan) -> [(u64, u64); 7] {
    let mut groups = [(0, 0); 7];
    for item in &plan.extents {
        let (pages, extents) = &mut groups[group_of(item.placement, item.fill)];
        *pages += item.extent.pages;
        *extents += 1;
    }
    groups
}

fn to_json(file: &PlanFile, against: Option<&Fit>) -> Value {
    let plan = &file.plan;
    let mut groups = Vec::new();
    for ((what, ..), (pages, extents)) in GROUPS.iter().zip(grouped(plan)) {
        groups.push(json!({ "what": what, "pages": pages, "extents": extents }));
    }
    let image = |image: &ImageSpec| json!({ "bytes": image.file_len(), "extents": image.extents.len() });
    json!({
        "policy": plan.policy,
        "snapshot": plan.snapshot,
        "costs": file.costs,
        "groups": groups,
        "expected": file.expected,
        "fit_expected": file.fit,
        "fit_against": against,
        "images": plan.images.iter().map(image).collect::<Vec<_>>(),
        "background_steps": plan.background.len(),
        "fault_pages": plan.fault_pages,
        "plan": JsonPlan::from(plan.clone()),
        "sources": file.sources,
    })
}

fn print(file: &PlanFile) {
    let plan = &file.plan;
    out!("policy     {}", plan.policy);
    out!("snapshot   {}", plan.snapshot);
    if let Some(costs) = &file.costs {
        out!("costs      {costs}");
    }
    out!("{}", table(plan));
    for (index, image) in plan.images.iter().enumerate() {
        let mib = mib(image.file_len());
        out!("image {index}    {mib:.1} MiB in {} extents", image.extents.len());
    }
    if !plan.huge.is_empty() {
        let mib: u64 = plan.huge.iter().map(|blocks| blocks.bytes() >> 20).sum();
        out!("huge pages for {mib} MiB of zero memory, if it is touched");
    }
    if !plan.background.is_empty() {
        out!("background {} steps", plan.background.len());
    }
    if plan.fault_pages > 1 {
        out!("faults     fetch up to {} pages", plan.fault_pages);
    }
    expected(&file.expected, file.fit.is_some());
}

fn expected(expected: &Estimate, has_profile: bool) {
    let ms = |ns: f64| ns / 1e6;
    out!("mappings   {}", expected.vmas);
    out!(
        "expected   {:.2} ms: mapping {:.2}, preloading {:.2}, faults {}",
        ms(expected.total_ns()),
        ms(expected.map_ns),
        ms(expected.preload_ns),
        if has_profile { format!("{:.2}", ms(expected.fault_ns)) } else { "unknown without a profile".to_string() },
    );
}

fn table(plan: &RestorePlan) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(["", "placement", "pages", "MiB", "extents"]);
    for ((name, symbol, ..), (pages, extents)) in GROUPS.iter().zip(grouped(plan)) {
        if extents > 0 {
            let mib = format!("{:.1}", mib_of_pages(pages));
            table.add_row([symbol.to_string(), (*name).to_string(), pages.to_string(), mib, extents.to_string()]);
        }
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Prints the use that a profile's run makes of each placement's pages.
fn print_fit(fit: &Fit) {
    let runs = if fit.runs == 1 { "one run".to_string() } else { format!("any of {} runs", fit.runs) };
    out!("against    {runs} of `{}`, recorded by {}:", fit.function, fit.recorder);
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    let untouched = if fit.sees_reads { "untouched" } else { "not written" };
    table.set_header(["pages", "all", "read", "written", "read or written", untouched]);
    for (name, row) in fit.rows().into_iter().filter(|(_, row)| row.pages > 0) {
        let counts = [row.pages, row.read, row.written, row.unclassified, row.untouched];
        table.add_row([name.to_string()].into_iter().chain(counts.map(|count| count.to_string())));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    out!("{table}");
}

const COLUMNS: u64 = 64;
const ROWS: u64 = 16;

/// Draws guest memory by placement: each cell shows the placement of most of its pages, but any preloaded page shows.
fn draw(plan: &RestorePlan, layout: &MemoryLayout) {
    let cell = layout.pages().div_ceil(COLUMNS * ROWS).next_power_of_two();
    out!(
        "memory     (each cell {} KiB: what most of its pages are, preloaded ones before all others)",
        cell * PAGE_SIZE / 1024
    );
    let mut at = 0;
    for range in layout.extents() {
        for row in range.chunks(COLUMNS * cell) {
            let cells: String = row.chunks(cell).map(|part| symbol(plan, part, &mut at)).collect();
            out!("{:#13x} |{cells}|", Gfn(row.first.0).gpa());
        }
    }
}

/// The symbol of one cell. `at` is the first extent that may reach into it.
fn symbol(plan: &RestorePlan, part: Extent, at: &mut usize) -> char {
    let mut pages = [0; 7];
    while let Some(item) = plan.extents.get(*at) {
        if let Some(shared) = item.extent.intersection(&part) {
            pages[group_of(item.placement, item.fill)] += shared.pages;
        }
        if item.extent.end() > part.end() {
            break;
        }
        *at += 1;
    }
    // Preloaded pages are few, and the main subject of a plan.
    let first_preloaded = pages[..3].iter().position(|pages| *pages > 0);
    let most = || (0..pages.len()).rev().max_by_key(|group| pages[*group]).unwrap_or(pages.len() - 1);
    GROUPS[first_preloaded.unwrap_or_else(most)].1
}
