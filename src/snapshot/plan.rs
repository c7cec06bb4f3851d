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
