//! All policies over random chains and profiles, and the papers' plans on examples small enough to read.

use proptest::prelude::*;

use super::estimate::estimate;
use super::touches::expected;
use super::*;
use crate::snapshot::{
    BackgroundAction, Content, Extent, Fill, Gfn, MemoryLayout, PAGE_SIZE, PageOrigin, PageSet, PageSource, Placement,
    PlannedExtent, SnapshotId,
};
use crate::tiering::costs::SourceCache;
use crate::tiering::profile::{Order, RecorderKind};

const FIRST: u64 = 1900;
const SECOND: u64 = 700;
const HIGH: u64 = 1 << 20;

fn extent(first: u64, pages: u64) -> Extent {
    Extent { first: Gfn(first), pages }
}

/// Three blocks and a bit, and behind the gap one block and a bit that do not start where a block does in the file.
fn layout() -> MemoryLayout {
    let pages = |first: u64, pages: u64| (first * PAGE_SIZE, pages * PAGE_SIZE);
    MemoryLayout::from_gpa_ranges(&[pages(0, FIRST), pages(HIGH, SECOND)]).unwrap()
}

/// The state of each page in each layer, by place in the file.
#[derive(Clone, Debug)]
struct World {
    layout: MemoryLayout,
    base: Vec<bool>,
    /// `None`: there is one layer. Else held, zero, or the base's.
    tip: Option<Vec<Option<bool>>>,
}

impl World {
    fn layers(&self) -> usize {
        1 + usize::from(self.tip.is_some())
    }

    fn gfn(&self, page: usize) -> Gfn {
        self.layout.gfn_at(page as u64 * PAGE_SIZE).unwrap()
    }

    /// The content of a page of a layer's file; 0 is a hole.
    fn in_file(&self, layer: usize, page: usize) -> u64 {
        let held = match (layer, &self.tip) {
            (0, _) => self.base[page],
            (_, Some(tip)) => tip[page] == Some(true),
            _ => false,
        };
        if held { 1 + page as u64 * 2 + layer as u64 } else { 0 }
    }

    fn decided(&self, page: usize) -> Content {
        let from = |layer| Content::Bytes(PageSource::layer(layer, page as u64 * PAGE_SIZE));
        match self.tip.as_ref().and_then(|tip| tip[page]) {
            Some(true) => from(1),
            Some(false) => Content::Zero,
            None if self.base[page] => from(0),
            None => Content::Zero,
        }
    }

    fn content(&self, page: usize) -> u64 {
        self.decided(page).layer().map_or(0, |layer| self.in_file(layer, page))
    }

    fn resolved(&self) -> Vec<ResolvedRun> {
        let mut runs: Vec<ResolvedRun> = Vec::new();
        for page in 0..self.base.len() {
            let gfn = self.gfn(page);
            let content = self.decided(page);
            if let Some(last) = runs.last_mut()
                && last.extent.end() == gfn
                && match (last.content, content) {
                    (Content::Zero, Content::Zero) => true,
                    (Content::Bytes(a), Content::Bytes(b)) => a.origin == b.origin,
                    _ => false,
                }
            {
                last.extent.pages += 1;
            } else {
                runs.push(ResolvedRun { extent: Extent { first: gfn, pages: 1 }, content });
            }
        }
        runs
    }

    /// Every page of the plan, read from where the plan says.
    fn check(&self, plan: &RestorePlan) {
        let lens = vec![self.layout.file_len(); self.layers()];
        plan.validate(&self.layout, &lens).unwrap();
        let mut page = 0;
        for item in &plan.extents {
            for index in 0..item.extent.pages {
                let found = item.source.map_or(0, |source| self.read(plan, source, index));
                assert_eq!(found, self.content(page), "{} page {index} of {item:?}", plan.policy);
                page += 1;
            }
        }
        assert_eq!(page, self.base.len(), "{}", plan.policy);
    }

    fn read(&self, plan: &RestorePlan, source: PageSource, index: u64) -> u64 {
        let mut page = source.offset / PAGE_SIZE + index;
        let image = match source.origin {
            PageOrigin::Layer(layer) => return self.in_file(layer, page as usize),
            PageOrigin::Tier(_) => panic!("the plan has no tiers"),
            PageOrigin::Image(image) => image,
        };
        for extent in &plan.images[image].extents {
            if page < extent.pages {
                let offset = self.layout.file_offset(Gfn(extent.first.0 + page)).unwrap();
                return self.content((offset / PAGE_SIZE) as usize);
            }
            page -= extent.pages;
        }
        panic!("behind the end of the image");
    }
}

/// Runs of pages with one of `kinds` kinds each, up to the end of memory.
fn any_runs(kinds: u8) -> impl Strategy<Value = Vec<u8>> {
    let run = (prop_oneof![3 => 1_usize..40, 2 => 200_usize..900], 0..kinds);
    prop::collection::vec(run, 1..60).prop_map(|runs| {
        let mut pages: Vec<u8> = Vec::new();
        for (len, kind) in runs.iter().cycle() {
            pages.extend(std::iter::repeat_n(*kind, *len));
            if pages.len() as u64 >= FIRST + SECOND {
                break;
            }
        }
        pages.truncate((FIRST + SECOND) as usize);
        pages
    })
}

fn any_world() -> impl Strategy<Value = World> {
    (any_runs(2), prop::option::of(any_runs(4))).prop_map(|(base, tip)| {
        let tip = tip.map(|tip| tip.into_iter().map(|kind| [Some(true), Some(false), None, None][usize::from(kind)]));
        World { layout: layout(), base: base.iter().map(|kind| *kind == 1).collect(), tip: tip.map(Iterator::collect) }
    })
}

/// Classes 0 and 1 are untouched, 2 and 3 read, 4 written, 5 unclassified, 6 sometimes written, 7 sometimes touched.
fn any_profile() -> impl Strategy<Value = Profile> {
    (any_runs(8), 0_u8..3).prop_map(|(classes, order)| {
        let mut profile = Profile::new(SnapshotId::default(), RecorderKind::Merged, "f");
        profile.runs = 4;
        let mut sometimes = PageSet::new();
        let mut seldom = PageSet::new();
        for (page, class) in classes.iter().enumerate() {
            let gfn = layout().gfn_at(page as u64 * PAGE_SIZE).unwrap();
            match class {
                2 | 3 => profile.read.insert(gfn),
                4 => profile.written.insert(gfn),
                5 => profile.unclassified.insert(gfn),
                6 => {
                    profile.written.insert(gfn);
                    sometimes.insert(gfn);
                }
                7 => {
                    profile.read.insert(gfn);
                    seldom.insert(gfn);
                }
                _ => {}
            }
        }
        profile.frequency.written = vec![(2, sometimes)];
        profile.frequency.touched = vec![(1, seldom)];
        let set = profile.working_set();
        let half: PageSet = set.iter().filter(|gfn| gfn.0 % 3 == 0).collect();
        profile.order = match order {
            0 => Order::Unknown,
            1 => Order::Layers(vec![half.clone(), set.difference(&half)]),
            _ => Order::Exact(half.runs().chain(set.difference(&half).runs()).collect()),
        };
        profile
    })
}

fn any_costs() -> impl Strategy<Value = Costs> {
    (0_usize..3, 1_u64..40).prop_map(|(cache, vma)| {
        let mut costs = Costs::default().with_cache(SourceCache::ALL[cache]);
        costs.vma_ns = vma * 1000;
        costs
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_policy_restores_the_snapshot(world in any_world(), profile in any_profile(), costs in any_costs()) {
        let resolved = world.resolved();
        let facts = PolicyFacts::bare(&world.layout, world.layers(), &resolved, &costs);
        let touches = expected(&profile, &resolved);
        let mut total = f64::INFINITY;
        for policy in Policy::ALL {
            let plan = policy.plan_on(&facts, Some(&profile), &Budget::default()).unwrap();
            world.check(&plan);
            prop_assert_eq!(&plan.policy, policy.name());
            let expects = estimate(&plan, &facts, &touches);
            prop_assert!(expects.total_ns().is_finite() && expects.vmas > 0);
            // `tiered` comes last.
            if policy == Policy::Tiered {
                prop_assert!(expects.total_ns() <= total * 1.05, "{:?} over {total}", expects);
            }
            total = total.min(expects.total_ns());
        }
    }

    #[test]
    fn tiered_keeps_within_its_budget(world in any_world(), profile in any_profile(), costs in any_costs(),
    spare in 0_u64..1000) {
        let resolved = world.resolved();
        let facts = PolicyFacts::bare(&world.layout, world.layers(), &resolved, &costs);
        let touches = expected(&profile, &resolved);
        let written: u64 = touches.iter().filter(|t| t.written > 0.0).map(|t| t.extent.pages).sum();
        let budget = Budget { dram_pages: Some(written + spare), cxl_pages: None, ..Budget::default() };
        let plan = Policy::Tiered.plan_on(&facts, Some(&profile), &budget).unwrap();
        world.check(&plan);
        prop_assert!(estimate(&plan, &facts, &touches).pages_preloaded_unwritten <= spare);
        if written > 0 {
            let budget = Budget { dram_pages: Some(written - 1), cxl_pages: None, ..Budget::default() };
            let refused = Policy::Tiered.plan_on(&facts, Some(&profile), &budget);
            let refused = matches!(refused, Err(Error::BudgetTooSmall { least, .. }) if least == written);
            prop_assert!(refused);
        }
    }
}

/// 4 MiB of which pages [0, 300) and [310, 700) are held, in one layer.
struct Small {
    layout: MemoryLayout,
    resolved: Vec<ResolvedRun>,
    costs: Costs,
    profile: Profile,
}

fn small(pages: u64, held: &[(u64, u64)]) -> Small {
    let layout = MemoryLayout::from_gpa_ranges(&[(0, pages * PAGE_SIZE)]).unwrap();
    let held: PageSet = held.iter().map(|(first, pages)| extent(*first, *pages)).collect();
    let all: PageSet = layout.extents().collect();
    let layer = |run: Extent| Content::Bytes(PageSource::layer(0, run.gpa()));
    let runs = held.runs().map(|run| ResolvedRun { extent: run, content: layer(run) });
    let zero = all.difference(&held);
    let mut resolved: Vec<_> =
        runs.chain(zero.runs().map(|extent| ResolvedRun { extent, content: Content::Zero })).collect();
    resolved.sort_unstable_by_key(|run| run.extent.first);
    let profile = Profile::new(SnapshotId::default(), RecorderKind::Uffd, "f");
    Small { layout, resolved, costs: Costs::default(), profile }
}

impl Small {
    fn facts(&self) -> PolicyFacts<'_> {
        PolicyFacts::bare(&self.layout, 1, &self.resolved, &self.costs)
    }

    fn plan(&self, policy: Policy) -> RestorePlan {
        let plan = policy.plan_on(&self.facts(), Some(&self.profile), &Budget::default()).unwrap();
        plan.validate(&self.layout, &[self.layout.file_len()]).unwrap();
        plan
    }
}

/// The example of the papers' plans: pages 10 and 12 read, 400 written first of all, and 305, which is zero.
fn example() -> Small {
    let mut small = small(1024, &[(0, 300), (310, 390)]);
    small.profile.read.insert_run(extent(10, 1));
    small.profile.read.insert_run(extent(12, 1));
    small.profile.written.insert_run(extent(400, 1));
    small.profile.written.insert_run(extent(305, 1));
    small.profile.order = Order::Exact(vec![extent(400, 1), extent(305, 1), extent(12, 1), extent(10, 1)]);
    small
}

fn from(first: u64, pages: u64, placement: Placement, origin: PageOrigin, page: u64) -> PlannedExtent {
    PlannedExtent::from(extent(first, pages), placement, PageSource { origin, offset: page * PAGE_SIZE })
}

fn preload(first: u64, pages: u64, fill: Fill, page: u64) -> PlannedExtent {
    PlannedExtent::preload(extent(first, pages), PageSource::image(0, page * PAGE_SIZE), fill)
}

#[test]
fn reap_installs_every_page_that_faulted_from_one_file_by_address() {
    let plan = example().plan(Policy::Reap);
    assert_eq!(plan.images[0].extents, [extent(10, 1), extent(12, 1), extent(305, 1), extent(400, 1)]);
    let lazy = |first, pages| from(first, pages, Placement::Lazy, PageOrigin::Layer(0), first);
    let expected = [
        lazy(0, 10),
        preload(10, 1, Fill::Install, 0),
        lazy(11, 1),
        preload(12, 1, Fill::Install, 1),
        lazy(13, 292),
        preload(305, 1, Fill::Install, 2),
        lazy(306, 94),
        preload(400, 1, Fill::Install, 3),
        lazy(401, 623),
    ];
    assert_eq!(plan.extents, expected);
    assert_eq!((plan.fault_pages, plan.background.len()), (1, 0));
}

#[test]
fn faasnap_maps_its_loading_set_over_its_nonzero_regions() {
    let mut example = example();
    let plan = example.plan(Policy::Faasnap);
    // Ten zero pages lie within one region, and page 11 within one of the loading set.
    let cow = |first, pages, origin, page| from(first, pages, Placement::CowFile, origin, page);
    let layer = PageOrigin::Layer(0);
    let image = PageOrigin::Image(0);
    let expected = [
        cow(0, 10, layer, 0),
        cow(10, 3, image, 0),
        cow(13, 387, layer, 13),
        cow(400, 1, image, 3),
        cow(401, 299, layer, 401),
        PlannedExtent::zero(extent(700, 324)),
    ];
    assert_eq!(plan.extents, expected);
    assert_eq!(plan.images[0].extents, [extent(10, 3), extent(400, 1)]);
    let steps: Vec<_> = plan.background.iter().map(|step| (step.action, step.extent)).collect();
    assert_eq!(steps, [(BackgroundAction::ReadAhead, extent(10, 3)), (BackgroundAction::ReadAhead, extent(400, 1))]);
    // Groups come before addresses.
    let early: PageSet = [extent(400, 1), extent(12, 1)].into_iter().collect();
    let late: PageSet = [extent(10, 1), extent(305, 1)].into_iter().collect();
    example.profile.order = Order::Layers(vec![early, late]);
    assert_eq!(example.plan(Policy::Faasnap).images[0].extents, [extent(12, 1), extent(400, 1), extent(10, 1)]);
}

#[test]
fn aquifer_copies_hot_pages_and_fetches_cold_ones_in_the_background() {
    let plan = example().plan(Policy::Aquifer);
    assert_eq!(plan.images[0].extents, [extent(10, 1), extent(12, 1), extent(400, 1)]);
    let lazy = |first, pages| from(first, pages, Placement::Lazy, PageOrigin::Layer(0), first);
    let expected = [
        lazy(0, 10),
        preload(10, 1, Fill::Copy, 0),
        lazy(11, 1),
        preload(12, 1, Fill::Copy, 1),
        lazy(13, 287),
        PlannedExtent::zero(extent(300, 10)),
        lazy(310, 90),
        preload(400, 1, Fill::Copy, 2),
        lazy(401, 299),
        PlannedExtent::zero(extent(700, 324)),
    ];
    assert_eq!(plan.extents, expected);
    assert!(plan.background.iter().all(|step| step.action == BackgroundAction::Install));
    assert_eq!((plan.background.len(), plan.fault_pages), (5, 16));
}

#[test]
fn catalyzer_and_trenv_map_held_pages_and_copy_none() {
    for policy in [Policy::Catalyzer, Policy::Trenv] {
        let placed: Vec<_> =
            example().plan(policy).extents.iter().map(|item| (item.extent.first.0, item.placement)).collect();
        let expected =
            [(0, Placement::InPlace), (300, Placement::Zero), (310, Placement::InPlace), (700, Placement::Zero)];
        assert_eq!(placed, expected);
    }
}

#[test]
fn policy_without_its_profile_says_how_to_record_one() {
    let example = example();
    for policy in Policy::ALL {
        let plan = policy.plan_on(&example.facts(), None, &Budget::default());
        assert_eq!(plan.is_err(), policy.needs_profile(), "{policy}");
        if let Err(error) = plan {
            assert!(error.to_string().contains("tvmm profile record"), "{error}");
        }
    }
}

#[test]
fn tiered_maps_a_read_set_in_one_piece() {
    let mut small = small(16 * 512, &[(600, 4000), (5000, 10), (5030, 1000)]);
    small.profile.read.insert_run(extent(700, 3000));
    let plan = small.plan(Policy::Tiered);
    assert!(plan.extents.len() <= 2, "{:?}", plan.extents);
    assert!(plan.extents.iter().all(|item| matches!(item.placement, Placement::InPlace | Placement::Zero)));
}

#[test]
fn tiered_breaks_copy_on_write_of_sparse_writes_under_one_mapping() {
    let mut small = small(8 * 512, &[(0, 8 * 512)]);
    for page in (3..8 * 512).step_by(100) {
        small.profile.written.insert_run(extent(page, 1));
    }
    let plan = small.plan(Policy::Tiered);
    let broken: PageSet =
        plan.extents.iter().filter(|item| item.fill == Fill::BreakCow).map(|item| item.extent).collect();
    assert_eq!(broken, small.profile.written);
    assert_eq!(estimate(&plan, &small.facts(), &[]).vmas, 1);
}

#[test]
fn tiered_copies_blocks_for_a_few_pages_only_where_local_memory_costs_nothing() {
    let mut small = small(8 * 512, &[(0, 8 * 512)]);
    for page in (0..8 * 512).step_by(16) {
        small.profile.written.insert_run(extent(page, 1));
        small.profile.read.insert_run(extent(page + 8, 1));
    }
    let preloaded = |dram_page_ns| {
        let budget = Budget { dram_page_ns, ..Budget::default() };
        let plan = Policy::Tiered.plan_on(&small.facts(), Some(&small.profile), &budget).unwrap();
        plan.validate(&small.layout, &[small.layout.file_len()]).unwrap();
        plan.counts().preload
    };
    assert_eq!(preloaded(0), 8 * 512, "whole blocks are the fastest way");
    assert!(preloaded(100_000) <= 512, "{}", preloaded(100_000));
}

#[test]
fn tiered_copies_whole_blocks_where_writes_are_dense() {
    let mut small = small(8 * 512, &[(0, 8 * 512)]);
    for page in (512..1536).step_by(2) {
        small.profile.written.insert_run(extent(page, 1));
        small.profile.read.insert_run(extent(page + 1, 1));
    }
    let plan = small.plan(Policy::Tiered);
    let expected = [(0, 512, Placement::InPlace), (512, 1024, Placement::Preload), (1536, 2560, Placement::InPlace)];
    let placed: Vec<_> =
        plan.extents.iter().map(|item| (item.extent.first.0, item.extent.pages, item.placement)).collect();
    assert_eq!(placed, expected);
    assert_eq!(plan.extents[1].fill, Fill::Copy);
    // With no memory to spare only written pages are preloaded.
    let budget = Budget { dram_pages: Some(512), cxl_pages: None, ..Budget::default() };
    let plan = Policy::Tiered.plan_on(&small.facts(), Some(&small.profile), &budget).unwrap();
    assert!(plan.counts().preload <= 512, "{:?}", plan.counts());
}

#[test]
fn tiered_reads_a_scattered_cold_set_from_an_image() {
    let mut small = small(64 * 512, &[(0, 64 * 512)]);
    for page in (0..64 * 512).step_by(64) {
        small.profile.read.insert_run(extent(page, 1));
    }
    small.costs = small.costs.with_cache(SourceCache::Cold);
    let plan = small.plan(Policy::Tiered);
    assert_eq!(plan.images.len(), 1);
    assert_eq!(plan.images[0].file_len(), 512 * PAGE_SIZE);
}
