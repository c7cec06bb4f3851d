//! A profile and what its snapshot adds, as named facts.

use crate::snapshot::{PAGE_SIZE, PageSet};
use crate::tiering::profile::{Buckets, Order, Profile};

/// A profile, and facts from its snapshot.
pub struct ProfileView {
    pub profile: Profile,
    pub file_bytes: u64,
    pub of_snapshot: Option<SnapshotFacts>,
}

pub struct SnapshotFacts {
    pub loading_set: PageSet,
    pub buckets: Buckets,
    /// Pages of the guest.
    pub pages: u64,
}

pub fn order_name(order: &Order) -> &'static str {
    match order {
        Order::Exact(_) => "exact",
        Order::Layers(_) => "layers",
        Order::Unknown => "unknown",
    }
}

fn size(pages: u64) -> String {
    format!("{pages} pages, {:.1} MiB", pages as f64 * PAGE_SIZE as f64 / f64::from(1 << 20))
}

/// The facts to print, by name.
pub fn facts(shown: &ProfileView) -> Vec<(&'static str, String)> {
    let profile = &shown.profile;
    let working_set = profile.working_set();
    let pages = working_set.len();
    let mut facts = vec![
        ("function", profile.function.clone()),
        ("snapshot", profile.snapshot.to_string()),
        ("recorder", format!("{}, {} run(s)", profile.recorder, profile.runs)),
        ("working set", format!("{}, {} runs of pages", size(pages), working_set.runs().count())),
    ];
    let read = if profile.sees_reads { size(profile.read.len()) } else { "not seen by this recorder".to_string() };
    facts.push(("read", read));
    facts.push(("written", size(profile.written.len())));
    if !profile.unclassified.is_empty() {
        let what = "read or written, this recorder cannot tell";
        facts.push(("unclassed", format!("{} ({what})", size(profile.unclassified.len()))));
    }
    let order = match &profile.order {
        Order::Exact(extents) => format!("exact, {} runs", extents.len()),
        Order::Layers(layers) => format!("{} layers, unknown within a layer", layers.len()),
        Order::Unknown => "unknown".to_string(),
    };
    facts.push(("order", order));
    if let (Some(last), true) = (profile.times_ns.last(), pages > 0) {
        facts.push(("touched in", format!("{:.1} ms while recording", *last as f64 / 1e6)));
    }
    if profile.runs > 1 {
        let some = |counts: &[(u32, PageSet)]| counts.iter().map(|(_, pages)| pages.len()).sum::<u64>();
        let touched = some(&profile.frequency.touched);
        let written = some(&profile.frequency.written);
        facts.push(("disagree", format!("{touched} pages touched and {written} written in some runs only")));
    }
    if let Some(of) = &shown.of_snapshot {
        let share = pages as f64 * 100.0 / of.pages.max(1) as f64;
        facts.push((
            "loading set",
            format!("{}; the working set is {share:.1} % of memory", size(of.loading_set.len())),
        ));
        let buckets = &of.buckets;
        let runtime = buckets.runtime.len();
        let init = buckets.init.len();
        let execution = buckets.execution.len();
        facts.push(("buckets", format!("runtime {runtime}, init {init}, execution {execution} pages")));
    }
    let per_page = shown.file_bytes as f64 / pages.max(1) as f64;
    facts.push(("file", format!("{} bytes, {per_page:.2} per touched page", shown.file_bytes)));
    facts
}
