//! Costs of a restore and of its guest, measured by restores with special plans. Each plan does one thing to many
//! pages. The ordinary restore engine carries it out in a separate process, and the guest then touches the pages.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::guest_pages::{FILLED, PAGES, guest_us, per};
use crate::bench::child;
use crate::bench::guest;
use crate::bench::host_costs;
use crate::snapshot::{
    Chain, Content, Extent, Fill, Gfn, HUGE_PAGE_PAGES, ImageSpec, Location, PAGE_SIZE, PageOrigin, PageSource,
    Placement, PlannedExtent, ResolvedRun, RestorePlan,
};
use crate::sys::errors::{BoxError, refuse};
use crate::sys::page_cache::PageCache;
use crate::tiering::costs::Costs;
use crate::tiering::planner::Planner;

/// One restore that is measured repeatedly.
pub struct Trial<'a> {
    exe: &'a Path,
    snapshot: &'a Path,
    /// The option of `tvmm restore` that chooses the plan, and its value.
    plan_option: [String; 2],
    function: String,
    report: PathBuf,
    rounds: Vec<Round>,
}

/// Times of one restore, µs.
#[derive(Clone, Copy, Default)]
struct Round {
    map: f64,
    preload: f64,
    guest: f64,
}

impl<'a> Trial<'a> {
    /// A restore of `snapshot` by a policy that needs no profile.
    pub fn by_policy(exe: &'a Path, snapshot: &'a Path, policy: &str, function: String, dir: &Path) -> Trial<'a> {
        Trial::new(exe, snapshot, ["--policy".to_string(), policy.to_string()], function, dir)
    }

    fn new(exe: &'a Path, snapshot: &'a Path, plan_option: [String; 2], function: String, dir: &Path) -> Trial<'a> {
        Trial { exe, snapshot, plan_option, function, report: dir.join("report.json"), rounds: Vec::new() }
    }

    /// Restores once more.
    pub fn run(&mut self) -> Result<(), BoxError> {
        let mut restore = Command::new(self.exe);
        restore.arg("restore").arg("--snapshot").arg(self.snapshot).args(&self.plan_option);
        restore.args(["--run", &self.function]).arg("--report").arg(&self.report);
        let output = child::output(&mut restore, guest::TIMEOUT)?;
        let text = String::from_utf8_lossy(&output.stdout);
        let Some(answer) = text.lines().find(|line| line.starts_with("ok ")) else {
            let said = String::from_utf8_lossy(&output.stderr);
            return refuse(format!("{} by {}: {}", self.function, self.plan_option[1], said.trim()));
        };
        let report: Value = serde_json::from_slice(&std::fs::read(&self.report)?)?;
        let slice = |name: &str| -> f64 {
            let slices = report["slices"].as_array().into_iter().flatten();
            slices.filter(|slice| slice["slice"] == name).filter_map(|slice| slice["length_us"].as_f64()).sum()
        };
        self.rounds.push(Round { map: slice("map"), preload: slice("preload"), guest: guest_us(answer)? });
        Ok(())
    }

    /// Drops all measurements.
    pub fn forget(&mut self) {
        self.rounds.clear();
    }

    fn median(&self, of: impl Fn(&Round) -> f64) -> f64 {
        host_costs::median(self.rounds.iter().map(of).collect())
    }

    /// The function, by the guest's clock: µs, median.
    pub fn guest(&self) -> f64 {
        self.median(|round| round.guest)
    }

    fn preload(&self) -> f64 {
        self.median(|round| round.preload)
    }

    fn map(&self) -> f64 {
        self.median(|round| round.map)
    }
}

/// The order of runs in an image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ImageOrder {
    /// Their order in guest memory.
    OfGuest,
    /// The same, but each two neighbours have changed places.
    Swapped,
}

/// Plans made by hand over the pages that the guest filled.
struct HandMade {
    chain: Chain,
    resolved: Vec<ResolvedRun>,
    /// Offset of the first filled page in the memory file.
    offset: u64,
}

impl HandMade {
    fn new(snapshot: &Path) -> Result<HandMade, BoxError> {
        let chain = Chain::open(&Location::Dir(snapshot.to_path_buf()))?;
        let resolved = chain.resolve()?;
        let Some(offset) = chain.layout().file_offset(FILLED.first) else {
            return refuse("The guest's filled pages are not where they should be");
        };
        Ok(HandMade { chain, resolved, offset })
    }

    fn in_file(&self, extent: Extent) -> PageSource {
        PageSource::layer(0, self.offset + (extent.gpa() - FILLED.gpa()))
    }

    /// A plan for filled pages in runs of `run`, one every `step`, each placed by `place`; all others are mapped from
    /// the file.
    fn plan(&self, run: u64, step: u64, place: impl Fn(Extent) -> PlannedExtent) -> RestorePlan {
        let mut plan = RestorePlan::new(self.chain.tip().id(), "calibrate", Vec::new());
        let mapped = |extent: Extent| PlannedExtent::from(extent, Placement::CowFile, self.in_file(extent));
        let between = |first: Gfn, end: Gfn| Extent { first, pages: end.0 - first.0 };
        for part in &self.resolved {
            let Content::Bytes(source) = part.content else {
                plan.extents.push(PlannedExtent::zero(part.extent));
                continue;
            };
            let Some(filled) = part.extent.intersection(&FILLED) else {
                plan.extents.push(PlannedExtent::from(part.extent, Placement::CowFile, source));
                continue;
            };
            let around = [between(part.extent.first, filled.first), between(filled.end(), part.extent.end())];
            let outside = |extent: Extent| {
                let offset = source.offset + (extent.gpa() - part.extent.gpa());
                PlannedExtent::from(extent, Placement::CowFile, PageSource { offset, ..source })
            };
            plan.extents.extend((!around[0].is_empty()).then(|| outside(around[0])));
            for stretch in filled.chunks(step) {
                let first = Extent { first: stretch.first, pages: run.min(stretch.pages) };
                plan.extents.push(place(first));
                let rest = between(first.end(), stretch.end());
                plan.extents.extend((!rest.is_empty()).then(|| mapped(rest)));
            }
            plan.extents.extend((!around[1].is_empty()).then(|| outside(around[1])));
        }
        plan
    }

    fn out_of_file(&self, run: u64, step: u64, fill: Fill) -> RestorePlan {
        self.plan(run, step, |extent| PlannedExtent::preload(extent, self.in_file(extent), fill))
    }

    /// As [`out_of_file`](Self::out_of_file), from an image.
    fn out_of_image(&self, run: u64, step: u64, fill: Fill, order: ImageOrder) -> RestorePlan {
        let place = |extent: Extent| {
            let index = ((extent.first.0 - FILLED.first.0) / step) ^ u64::from(order == ImageOrder::Swapped);
            let offset = index * run * PAGE_SIZE;
            PlannedExtent::preload(extent, PageSource::image(0, offset), fill)
        };
        let mut plan = self.plan(run, step, place);
        let is_packed = |item: &&PlannedExtent| item.source.is_some_and(|source| source.origin == PageOrigin::Image(0));
        let image = plan.extents.iter().filter(is_packed);
        let mut items: Vec<PlannedExtent> = image.copied().collect();
        items.sort_unstable_by_key(|item| item.source.map(|source| source.offset));
        plan.images = vec![ImageSpec { extents: items.iter().map(|item| item.extent).collect() }];
        plan
    }

    fn save(&self, plan: RestorePlan, path: &Path) -> Result<(), BoxError> {
        let planner = Planner { chain: &self.chain, tiers: &[], cold: None, page_cache: &PageCache };
        planner.own(plan)?.save(path)?;
        Ok(())
    }
}

/// Distance of single pages: with each in a group of its own, too few would be left to measure.
const STEP: u64 = 2;
/// Length of long runs, and the distance of their starts.
const RUN: u64 = 16;
const RUN_STEP: u64 = RUN * STEP;

/// The trials, and the costs that follow from them.
pub struct Engine<'a> {
    copied_alone: Trial<'a>,
    copied_from_file: Trial<'a>,
    copied_groups: Trial<'a>,
    copied_blocks: Trial<'a>,
    broken_alone: Trial<'a>,
    broken_runs: Trial<'a>,
    installed_alone: Trial<'a>,
    installed_runs: Trial<'a>,
}

impl<'a> Engine<'a> {
    pub fn new(exe: &'a Path, snapshot: &'a Path, dir: &Path) -> Result<Engine<'a>, BoxError> {
        let plans = HandMade::new(snapshot)?;
        let trial = |name: &str, plan: RestorePlan, function: String| -> Result<Trial<'a>, BoxError> {
            let path = dir.join(format!("{name}.plan"));
            plans.save(plan, &path)?;
            let plan_option = ["--plan".to_string(), path.display().to_string()];
            Ok(Trial::new(exe, snapshot, plan_option, function, dir))
        };
        let one = || "touch pages=1".to_string();
        let every_second = format!("touch pages={} stride={STEP}", PAGES / STEP);
        let half = HUGE_PAGE_PAGES / 2;
        Ok(Engine {
            copied_alone: trial(
                "copied-alone",
                plans.out_of_image(1, STEP, Fill::Copy, ImageOrder::OfGuest),
                every_second,
            )?,
            copied_from_file: trial("copied-from-file", plans.out_of_file(1, STEP, Fill::Copy), one())?,
            // Halves of blocks that are not adjacent in the image stay small pages.
            copied_groups: trial(
                "copied-groups",
                plans.out_of_image(half, half, Fill::Copy, ImageOrder::Swapped),
                format!("touch pages={PAGES}"),
            )?,
            copied_blocks: trial(
                "copied-blocks",
                plans.out_of_file(HUGE_PAGE_PAGES, HUGE_PAGE_PAGES, Fill::Copy),
                one(),
            )?,
            broken_alone: trial("broken-alone", plans.out_of_file(1, STEP, Fill::BreakCow), one())?,
            broken_runs: trial("broken-runs", plans.out_of_file(RUN, RUN_STEP, Fill::BreakCow), one())?,
            installed_alone: trial(
                "installed-alone",
                plans.out_of_image(1, STEP, Fill::Install, ImageOrder::OfGuest),
                one(),
            )?,
            installed_runs: trial(
                "installed-runs",
                plans.out_of_image(RUN, RUN_STEP, Fill::Install, ImageOrder::OfGuest),
                one(),
            )?,
        })
    }

    fn trials(&mut self) -> [&mut Trial<'a>; 8] {
        [
            &mut self.copied_alone,
            &mut self.copied_from_file,
            &mut self.copied_groups,
            &mut self.copied_blocks,
            &mut self.broken_alone,
            &mut self.broken_runs,
            &mut self.installed_alone,
            &mut self.installed_runs,
        ]
    }

    /// Runs each trial once.
    pub fn run(&mut self) -> Result<(), BoxError> {
        self.trials().into_iter().try_for_each(Trial::run)
    }

    /// Drops the measurements of all trials.
    pub fn forget(&mut self) {
        self.trials().into_iter().for_each(Trial::forget);
    }

    /// Writes the measured costs to `costs`. `one_us`: the time of a function that touches one page.
    pub fn note(&self, costs: &mut Costs, one_us: f64) {
        let mut set = |name: &str, us: f64, count: u64| costs.set_measured(name, per(us, count));
        let singles = PAGES / STEP;
        let runs = PAGES / RUN_STEP;
        set("read_small_page_ns", self.copied_alone.preload(), singles);
        set("call_ns", self.copied_from_file.preload() - self.copied_alone.preload(), singles);
        // Each copied page is a mapping between two others.
        set("vma_ns", self.copied_from_file.map(), 2 * singles);
        set("read_huge_page_ns", self.copied_blocks.preload(), PAGES);
        set("populated_alone_ns", self.copied_alone.guest() - one_us, singles);
        set("populated_touch_ns", self.copied_groups.guest() - one_us, PAGES);
        let calls = singles - runs;
        let broken_call = (self.broken_alone.preload() - self.broken_runs.preload()) / calls as f64;
        set("populate_write_call_ns", broken_call, 1);
        set("populate_write_page_ns", self.broken_runs.preload() - broken_call * runs as f64, runs * RUN);
        set("uffd_call_ns", self.installed_alone.preload() - self.installed_runs.preload(), calls);
    }
}
