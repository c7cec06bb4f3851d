//! The nouns of a restore: every page of guest memory exactly once, each with a placement.

use serde::{Deserialize, Serialize};

use super::{Error, Extent, MemoryLayout, PAGE_SIZE, Result, SnapshotId};

/// How a page gets into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// Anonymous memory; nothing is stored, nothing is read.
    Zero,
    /// The tier's own bytes are mapped.
    InPlace,
    /// Local memory, filled before the vCPU needs it.
    Preload,
    /// A private mapping of the layer's file, read on demand.
    CowFile,
    /// Fetched when it is touched.
    Lazy,
}

impl Placement {
    /// All placements.
    pub const ALL: [Placement; 5] =
        [Placement::Zero, Placement::InPlace, Placement::Preload, Placement::CowFile, Placement::Lazy];
}

/// Where the bytes of a page are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageSource {
    /// Index in the chain; the base is 0.
    pub layer: usize,
    /// Offset in that layer's memory file, bytes.
    pub offset: u64,
}

/// Pages that are treated alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedExtent {
    /// The pages.
    pub extent: Extent,
    /// How they get into the guest.
    pub placement: Placement,
    /// Where the first of them comes from, the others following it; `None` for zero pages and only for them.
    pub source: Option<PageSource>,
}

/// For one restore: every page of guest memory exactly once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestorePlan {
    /// The snapshot the plan is for.
    pub snapshot: SnapshotId,
    /// The name of the policy that made it.
    pub policy: String,
    /// The extents, ascending.
    pub extents: Vec<PlannedExtent>,
}

/// Pages per placement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PlacementCounts {
    /// Pages placed [`Placement::Zero`].
    pub zero: u64,
    /// Pages placed [`Placement::InPlace`].
    pub in_place: u64,
    /// Pages placed [`Placement::Preload`].
    pub preload: u64,
    /// Pages placed [`Placement::CowFile`].
    pub cow_file: u64,
    /// Pages placed [`Placement::Lazy`].
    pub lazy: u64,
}

impl PlacementCounts {
    /// Pages in all placements.
    pub fn total(&self) -> u64 {
        [self.zero, self.in_place, self.preload, self.cow_file, self.lazy].iter().fold(0, |a, b| a.saturating_add(*b))
    }

    fn of(&mut self, placement: Placement) -> &mut u64 {
        match placement {
            Placement::Zero => &mut self.zero,
            Placement::InPlace => &mut self.in_place,
            Placement::Preload => &mut self.preload,
            Placement::CowFile => &mut self.cow_file,
            Placement::Lazy => &mut self.lazy,
        }
    }
}

impl RestorePlan {
    /// Checks that the plan can be carried out: extents ascend, do not overlap, do not cross the end of a range, and
    /// together are exactly the layout's pages; each has a source within its layer's file (`layer_file_lens`, bytes,
    /// base first), page aligned, unless it is zero, and none if it is.
    ///
    /// # Errors
    /// [`Error::BadPlan`] with the first rule that is broken, and where.
    pub fn validate(&self, layout: &MemoryLayout, layer_file_lens: &[u64]) -> Result<()> {
        let bad = |problem: String| Error::BadPlan { policy: self.policy.clone(), problem };
        let mut planned = self.extents.iter();
        for range in layout.extents() {
            let mut next = range.first;
            while next < range.end() {
                let Some(item) = planned.next() else {
                    return Err(bad(format!("nothing is planned from page {next} on")));
                };
                let extent = item.extent;
                if extent.first != next {
                    return Err(bad(format!("page {next} should come next, {extent} does")));
                }
                if extent.pages == 0 || extent.pages > range.end().0 - next.0 {
                    return Err(bad(format!("{extent} is empty or crosses the end of its range")));
                }
                check_source(item, layer_file_lens).map_err(bad)?;
                next = extent.end();
            }
        }
        match planned.next() {
            Some(item) => Err(bad(format!("{} is outside guest memory", item.extent))),
            None => Ok(()),
        }
    }

    /// Joins neighbours with the same placement whose sources continue, except across the end of a range of the
    /// layout. Does not change what the plan means.
    pub fn coalesce(&mut self, layout: &MemoryLayout) {
        self.extents.dedup_by(|next, last| {
            let joins = last.extent.end() == next.extent.first
                && last.placement == next.placement
                && continues(last, next)
                && layout.range_of(last.extent.first) == layout.range_of(next.extent.first);
            if joins {
                last.extent.pages = last.extent.pages.saturating_add(next.extent.pages);
            }
            joins
        });
    }

    /// How many pages each placement has.
    pub fn counts(&self) -> PlacementCounts {
        let mut counts = PlacementCounts::default();
        for item in &self.extents {
            let count = counts.of(item.placement);
            *count = count.saturating_add(item.extent.pages);
        }
        counts
    }
}

fn continues(last: &PlannedExtent, next: &PlannedExtent) -> bool {
    match (last.source, next.source) {
        (None, None) => true,
        (Some(a), Some(b)) => a.layer == b.layer && a.offset.checked_add(last.extent.bytes()) == Some(b.offset),
        _ => false,
    }
}

fn check_source(item: &PlannedExtent, layer_file_lens: &[u64]) -> Result<(), String> {
    let extent = item.extent;
    let source = match (item.placement, item.source) {
        (Placement::Zero, None) => return Ok(()),
        (Placement::Zero, Some(_)) => return Err(format!("{extent} is zero but has a source")),
        (_, None) => return Err(format!("{extent} has no source")),
        (_, Some(source)) => source,
    };
    let Some(len) = layer_file_lens.get(source.layer) else {
        return Err(format!("{extent} comes from layer {}, there are {}", source.layer, layer_file_lens.len()));
    };
    if !source.offset.is_multiple_of(PAGE_SIZE) {
        return Err(format!("{extent} comes from offset {}, which is not page aligned", source.offset));
    }
    match source.offset.checked_add(extent.bytes()) {
        Some(end) if end <= *len => Ok(()),
        _ => Err(format!("{extent} comes from behind the end of layer {}", source.layer)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::Gfn;

    const LAYERS: [u64; 2] = [300 * PAGE_SIZE, 300 * PAGE_SIZE];

    /// Two ranges that touch, so that only the layout says where one ends, and one behind a gap.
    fn layout() -> MemoryLayout {
        let pages = |first: u64, pages: u64| (first * PAGE_SIZE, pages * PAGE_SIZE);
        MemoryLayout::from_gpa_ranges(&[pages(0, 100), pages(100, 100), pages(1 << 20, 100)]).unwrap()
    }

    /// A plan with cuts at random pages and a random placement for each piece.
    fn any_plan() -> impl Strategy<Value = RestorePlan> {
        let choice = (any::<prop::sample::Index>(), 0_usize..2, prop::bool::weighted(0.8));
        prop::collection::vec((0_u64..300, choice), 1..40).prop_map(|cuts| {
            let layout = layout();
            let mut plan = RestorePlan { snapshot: SnapshotId::default(), policy: "any".to_string(), extents: vec![] };
            let mut at = 0;
            let mut ends: Vec<u64> = cuts.iter().map(|(cut, _)| *cut).chain([100, 200, 300]).collect();
            ends.sort_unstable();
            for (end, (_, (placement, layer, in_order))) in ends.into_iter().zip(cuts.iter().cycle()) {
                if end == at {
                    continue;
                }
                let extent = Extent { first: layout.gfn_at(at * PAGE_SIZE).unwrap(), pages: end - at };
                let placement = *placement.get(&Placement::ALL);
                let offset = if *in_order { at * PAGE_SIZE } else { 0 };
                let source = (placement != Placement::Zero).then_some(PageSource { layer: *layer, offset });
                plan.extents.push(PlannedExtent { extent, placement, source });
                at = end;
            }
            plan
        })
    }

    /// Every page with its placement and source: what a plan means.
    fn by_page(plan: &RestorePlan) -> Vec<(Gfn, Placement, Option<PageSource>)> {
        let pages = plan.extents.iter().flat_map(|item| {
            (0..item.extent.pages).map(move |i| {
                let source = item.source.map(|s| PageSource { layer: s.layer, offset: s.offset + i * PAGE_SIZE });
                (Gfn(item.extent.first.0 + i), item.placement, source)
            })
        });
        pages.collect()
    }

    fn break_plan(plan: &mut RestorePlan, at: usize, how: u8) {
        let extents = &mut plan.extents;
        let item = &mut extents[at];
        match how {
            0 => drop(extents.remove(at)),
            1 => extents.insert(at, extents[at]),
            2 => item.extent.first.0 += 1,
            3 => item.extent.pages += 1,
            4 => item.extent.pages -= 1,
            5 => item.extent.pages = u64::MAX,
            6 => item.extent.first.0 = u64::MAX,
            7 if item.source.is_some() => item.source = None,
            7 => item.source = Some(PageSource { layer: 0, offset: 0 }),
            8 => extents.push(PlannedExtent {
                extent: Extent { first: Gfn(5 << 20), pages: 1 },
                placement: Placement::Zero,
                source: None,
            }),
            _ => {
                item.placement = Placement::Lazy;
                let (layer, offset) = match how {
                    9 => (2, 0),
                    10 => (0, LAYERS[0]),
                    11 => (0, 1),
                    _ => (1, u64::MAX - PAGE_SIZE + 1),
                };
                item.source = Some(PageSource { layer, offset });
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn valid_plan_validates_and_coalescing_keeps_its_meaning(plan in any_plan()) {
            plan.validate(&layout(), &LAYERS).unwrap();
            prop_assert_eq!(plan.counts().total(), 300);
            let mut joined = plan.clone();
            joined.coalesce(&layout());
            joined.validate(&layout(), &LAYERS).unwrap();
            prop_assert_eq!(by_page(&joined), by_page(&plan));
            prop_assert_eq!(joined.counts(), plan.counts());
            prop_assert!(joined.extents.len() <= plan.extents.len());
            let once = joined.clone();
            joined.coalesce(&layout());
            prop_assert_eq!(&joined, &once);
            let json = serde_json::to_string(&plan).unwrap();
            prop_assert_eq!(serde_json::from_str::<RestorePlan>(&json).unwrap(), plan);
        }

        #[test]
        fn broken_plan_is_refused(plan in any_plan(), at in any::<prop::sample::Index>(), how in 0_u8..13) {
            let mut plan = plan;
            let at = at.index(plan.extents.len());
            break_plan(&mut plan, at, how);
            let refused = matches!(plan.validate(&layout(), &LAYERS), Err(Error::BadPlan { .. }));
            prop_assert!(refused, "accepted after mutation {}", how);
        }
    }

    #[test]
    fn swapped_extents_are_refused() {
        let zero = |first, pages| PlannedExtent {
            extent: Extent { first: Gfn(first), pages },
            placement: Placement::Zero,
            source: None,
        };
        let extents = vec![zero(100, 100), zero(0, 100), zero(1 << 20, 100)];
        let plan = RestorePlan { snapshot: SnapshotId::default(), policy: "p".to_string(), extents };
        let message = plan.validate(&layout(), &LAYERS).unwrap_err().to_string();
        assert!(message.contains("page 0x0 should come next, [0x64, 0xc8) does"), "{message}");
    }
}
