//! Prints the time that planning takes: `cargo test --release --lib planning_time -- --ignored --nocapture`.

use std::time::Instant;

use super::*;
use crate::snapshot::{Content, Extent, Gfn, MemoryLayout, PAGE_SIZE, PageSource, PlacementCounts, SnapshotId};
use crate::tiering::costs::SourceCache;
use crate::tiering::profile::{Order, RecorderKind};

/// 4 GiB.
const PAGES: u64 = 1 << 20;

/// Guest memory in runs of `held` held pages and `zero` zero ones.
fn resolved(held: u64, zero: u64) -> Vec<ResolvedRun> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < PAGES {
        for (pages, is_held) in [(held, true), (zero, false)] {
            let extent = Extent { first: Gfn(at), pages: pages.min(PAGES - at) };
            if extent.is_empty() {
                continue;
            }
            let source = PageSource::layer(0, at * PAGE_SIZE);
            let content = if is_held { Content::Bytes(source) } else { Content::Zero };
            runs.push(ResolvedRun { extent, content });
            at = extent.end().0;
        }
    }
    runs
}

/// `count` runs of `pages` pages spread evenly, every third written.
fn profile(count: u64, pages: u64) -> Profile {
    let mut profile = Profile::new(SnapshotId::default(), RecorderKind::Uffd, "f");
    let mut order = Vec::new();
    for index in 0..count {
        let run = Extent { first: Gfn(index * (PAGES / count)), pages };
        if index % 3 == 0 {
            profile.written.insert_run(run)
        } else {
            profile.read.insert_run(run)
        }
        order.push(run);
    }
    profile.order = Order::Exact(order);
    profile
}

#[test]
#[ignore = "prints how long planning takes; asserts nothing about time"]
fn planning_time_of_4_gib() {
    let layout = MemoryLayout::from_gpa_ranges(&[(0, PAGES * PAGE_SIZE)]).unwrap();
    let cases = [
        ("ordinary: 4,000 runs of 8, memory in 64 stretches", resolved(16_000, 384), profile(4_000, 8)),
        ("many: 16,000 runs of 4, memory in 4,000 stretches", resolved(200, 62), profile(16_000, 4)),
        ("extreme: 65,536 runs of 1, memory in 64 stretches", resolved(16_000, 384), profile(65_536, 1)),
        ("extreme: 65,536 runs of 8, memory in 65,536 stretches", resolved(12, 20), profile(65_536, 8)),
    ];
    for (name, resolved, profile) in &cases {
        for cache in SourceCache::ALL {
            let costs = Costs::default().with_cache(cache);
            let facts = PolicyFacts::bare(&layout, 1, resolved, &costs);
            let mut times = Vec::new();
            let mut counts = (PlacementCounts::default(), 0);
            for _ in 0..9 {
                let start = Instant::now();
                let plan = Policy::Tiered.plan_on(&facts, Some(profile), &Budget::default()).unwrap();
                times.push(start.elapsed());
                counts = (plan.counts(), plan.extents.len());
            }
            times.sort_unstable();
            assert_eq!(counts.0.total(), PAGES);
            println!("{name}, {}: {:?} ({:?} least), {} extents", cache.name(), times[4], times[0], counts.1);
        }
    }
}
