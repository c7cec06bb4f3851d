//! The nouns of a restore: every page of guest memory exactly once, each with a placement.

use serde::{Deserialize, Serialize};

use super::{
    Digest, Error, Extent, Gfn, HUGE_PAGE_PAGES, MemoryLayout, PAGE_SIZE, PageOrigin, PageSource, PoolId, Result,
    SnapshotId,
};

/// The way a page gets into the guest.
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

/// The way a preloaded extent is filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fill {
    /// Its bytes are read into anonymous memory, huge pages where a whole aligned 2 MiB block is filled.
    #[default]
    Copy,
    /// The VMM reads the source file past the page cache (O_DIRECT) into a buffer in one go and installs the pages by
    /// UFFDIO_COPY without waking waiters. For extents of the userfaultfd range.
    Install,
    /// Its source is mapped private and copy-on-write is broken ahead by MADV_POPULATE_WRITE: no mapping of its own.
    BreakCow,
}

/// The way a tier's bytes get into a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TierAccess {
    /// Mapped in place; the kernel copies a page when it is written.
    MapPrivate,
    /// Mapped in place and shared, for reading only; a page is promoted before it is written.
    MapShared,
    /// Not byte-addressable: fetched.
    Fetch,
}

/// A pool that a plan takes pages from, in its state when the plan was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierSource {
    /// The pool.
    pub pool: PoolId,
    /// Digest of the pool's record of where the snapshot's pages are. Another digest means another state, and offsets
    /// may be wrong.
    pub entry: Digest,
    /// The way its bytes get into a guest.
    pub access: TierAccess,
    /// Length of its data, bytes.
    pub len: u64,
}

impl TierSource {
    /// Returns the access of the one of `tiers` that `origin` names; `None` if it names a layer or an image.
    pub fn access_of(tiers: &[TierSource], origin: PageOrigin) -> Option<TierAccess> {
        match origin {
            PageOrigin::Tier(index) => tiers.get(index).map(|tier| tier.access),
            PageOrigin::Layer(_) | PageOrigin::Image(_) => None,
        }
    }
}

/// A file derived from a snapshot: the pages of some extents, packed in this order without gaps (a working-set file).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// The pages in file order. No page twice.
    pub extents: Vec<Extent>,
}

impl ImageSpec {
    /// The length of the image in bytes.
    pub fn file_len(&self) -> u64 {
        self.extents.iter().fold(0, |len, extent| len.saturating_add(extent.bytes()))
    }
}

/// The action of a background step, carried out by a second thread while the guest already runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackgroundAction {
    /// Read the extent's source file into the page cache (FaaSnap's concurrent paging).
    ReadAhead,
    /// Fetch a lazy extent and install it by UFFDIO_COPY before it is touched.
    Install,
    /// Break copy-on-write of a private mapping ahead of the write.
    BreakCow,
}

/// One step of the second thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Background {
    /// The action.
    pub action: BackgroundAction,
    /// Its pages; they lie within one extent of the plan.
    pub extent: Extent,
}

/// Pages that are treated alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedExtent {
    /// The pages.
    pub extent: Extent,
    /// The way they get into the guest.
    pub placement: Placement,
    /// Source of the first page; the others follow it. `None` for zero pages and only for them.
    pub source: Option<PageSource>,
    /// The way they are filled, if they are preloaded.
    pub fill: Fill,
}

impl PlannedExtent {
    /// Pages that are zero.
    pub fn zero(extent: Extent) -> Self {
        PlannedExtent { extent, placement: Placement::Zero, source: None, fill: Fill::Copy }
    }

    /// Pages from `source`.
    pub fn from(extent: Extent, placement: Placement, source: PageSource) -> Self {
        PlannedExtent { extent, placement, source: Some(source), fill: Fill::Copy }
    }

    /// The source of `page`, which lies in the extent; `None` for zero pages.
    pub fn source_at(&self, page: Gfn) -> Option<PageSource> {
        let skipped = (page.0 - self.extent.first.0) * PAGE_SIZE;
        self.source.map(|source| PageSource { offset: source.offset + skipped, ..source })
    }

    /// Pages from `source`, in local memory before the guest runs.
    pub fn preload(extent: Extent, source: PageSource, fill: Fill) -> Self {
        PlannedExtent { extent, placement: Placement::Preload, source: Some(source), fill }
    }
}

/// For one restore: every page of guest memory exactly once. [`StoredPlan`](super::StoredPlan) is its form in files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestorePlan {
    /// The snapshot the plan is for.
    pub snapshot: SnapshotId,
    /// The name of the policy that made it.
    pub policy: String,
    /// Pools the plan takes pages from besides the chain's layers.
    pub tiers: Vec<TierSource>,
    /// Files the plan takes pages from besides the chain's layers. They are made from the snapshot before it is used.
    pub images: Vec<ImageSpec>,
    /// The extents, ascending.
    pub extents: Vec<PlannedExtent>,
    /// Zero memory that is to come in huge pages when it is touched: whole aligned blocks of 2 MiB.
    pub huge: Vec<Extent>,
    /// Background steps, carried out in this order while the guest runs.
    pub background: Vec<Background>,
    /// True if pages preloaded by `copy` are checked against the snapshot's checksums before the guest runs.
    pub verify: bool,
    /// True if pages preloaded by `copy` are read past the page cache (O_DIRECT): faster where none of them is cached,
    /// and leaves none there.
    pub direct: bool,
    /// Pages fetched around a fault in a lazy extent: a power of two; the aligned block, as far as the extent reaches.
    pub fault_pages: u64,
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
    /// A plan of extents alone.
    pub fn new(snapshot: SnapshotId, policy: &str, extents: Vec<PlannedExtent>) -> Self {
        let images = Vec::new();
        let background = Vec::new();
        RestorePlan {
            snapshot,
            policy: policy.to_string(),
            tiers: Vec::new(),
            images,
            extents,
            huge: Vec::new(),
            background,
            verify: false,
            direct: false,
            fault_pages: 1,
        }
    }

    /// Checks that the plan can be carried out. Extents ascend, do not overlap, do not cross the end of a range, and
    /// together are exactly the layout's pages. Each extent that is not zero has a page-aligned source within its
    /// layer's file (`layer_file_lens`, bytes, base first), a tier, or the plan's own images; a zero extent has none.
    /// The placement is one that the source's access allows. Images hold pages of the layout, each once, and an extent
    /// takes only its own pages from an image. Background steps lie within one extent that their action fits, huge
    /// pages within one that is zero.
    ///
    /// # Errors
    /// [`Error::BadPlan`] with the first rule that is broken, and where.
    pub fn validate(&self, layout: &MemoryLayout, layer_file_lens: &[u64]) -> Result<()> {
        let bad = |problem: String| Error::BadPlan { policy: self.policy.clone(), problem };
        if !self.fault_pages.is_power_of_two() || self.fault_pages > MAX_FAULT_PAGES {
            return Err(bad(format!("a fault cannot fetch {} pages", self.fault_pages)));
        }
        let images = self.images.iter().map(|image| Image::check(image, layout)).collect::<Result<Vec<_>, _>>();
        let images = images.map_err(bad)?;
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
                self.check_source(item, layer_file_lens, &images).map_err(bad)?;
                next = extent.end();
            }
        }
        if let Some(item) = planned.next() {
            return Err(bad(format!("{} is outside guest memory", item.extent)));
        }
        self.huge.iter().try_for_each(|blocks| self.check_huge(*blocks)).map_err(bad)?;
        self.background.iter().try_for_each(|step| self.check_background(step)).map_err(bad)
    }

    /// The extent that has all of `part`, which is not empty.
    fn extent_around(&self, part: Extent) -> Option<&PlannedExtent> {
        let at = self.extents.partition_point(|item| item.extent.end() <= part.first);
        let has_all = |item: &&PlannedExtent| {
            let left = item.extent.end().0.saturating_sub(part.first.0);
            item.extent.contains(part.first) && (1..=left).contains(&part.pages)
        };
        self.extents.get(at).filter(has_all)
    }

    fn check_huge(&self, blocks: Extent) -> Result<(), String> {
        let Extent { first, pages } = blocks;
        if !first.0.is_multiple_of(HUGE_PAGE_PAGES) || !pages.is_multiple_of(HUGE_PAGE_PAGES) {
            return Err(format!("{blocks} is not made of whole blocks of 2 MiB"));
        }
        match self.extent_around(blocks) {
            Some(item) if item.placement == Placement::Zero => Ok(()),
            _ => Err(format!("{blocks}, which is to come in huge pages, does not lie within one extent that is zero")),
        }
    }

    fn check_source(&self, item: &PlannedExtent, layer_file_lens: &[u64], images: &[Image]) -> Result<(), String> {
        let extent = item.extent;
        let source = match (item.placement, item.source) {
            (Placement::Zero, None) => return Ok(()),
            (Placement::Zero, Some(_)) => return Err(format!("{extent} is zero but has a source")),
            (_, None) => return Err(format!("{extent} has no source")),
            (_, Some(source)) => source,
        };
        if !source.offset.is_multiple_of(PAGE_SIZE) {
            return Err(format!("{extent} comes from offset {}, which is not page aligned", source.offset));
        }
        let end = source.offset.checked_add(extent.bytes());
        let is_within = |len: u64| end.is_some_and(|end| end <= len);
        let unknown = |kind: &str, index: usize, count: usize| {
            Err(format!("{extent} comes from {kind} {index}, there are {count}"))
        };
        match source.origin {
            PageOrigin::Layer(index) => match layer_file_lens.get(index) {
                Some(len) if is_within(*len) => Ok(()),
                Some(_) => Err(format!("{extent} comes from behind the end of layer {index}")),
                None => unknown("layer", index, layer_file_lens.len()),
            },
            PageOrigin::Tier(index) => match self.tiers.get(index) {
                Some(tier) if is_within(tier.len) => check_access(item, tier.access),
                Some(_) => Err(format!("{extent} comes from behind the end of tier {index}")),
                None => unknown("tier", index, self.tiers.len()),
            },
            PageOrigin::Image(index) => match images.get(index) {
                Some(image) if image.has(extent, source.offset) => Ok(()),
                Some(_) => Err(format!("image {index} does not have {extent} at {}", source.offset)),
                None => unknown("image", index, images.len()),
            },
        }
    }

    fn check_background(&self, step: &Background) -> Result<(), String> {
        let Background { action, extent } = *step;
        let Some(item) = self.extent_around(extent) else {
            return Err(format!("background step {extent} does not lie within one extent"));
        };
        let fits = match action {
            BackgroundAction::ReadAhead | BackgroundAction::BreakCow => {
                matches!(item.placement, Placement::CowFile | Placement::InPlace)
            }
            BackgroundAction::Install => item.placement == Placement::Lazy,
        };
        if fits { Ok(()) } else { Err(format!("{extent} is {:?}, which {action:?} does not fit", item.placement)) }
    }

    /// Joins neighbours with the same placement whose sources continue, except across the end of a range of the
    /// layout. Does not change the plan's meaning.
    pub fn coalesce(&mut self, layout: &MemoryLayout) {
        self.extents.dedup_by(|next, last| {
            let joins = last.extent.end() == next.extent.first
                && (last.placement, last.fill) == (next.placement, next.fill)
                && continues(last, next)
                && layout.range_of(last.extent.first) == layout.range_of(next.extent.first);
            if joins {
                last.extent.pages = last.extent.pages.saturating_add(next.extent.pages);
            }
            joins
        });
    }

    /// The number of pages in each placement.
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
        (Some(a), Some(b)) => a.continues_at(last.extent.bytes(), b),
        _ => false,
    }
}

/// Faults do not fetch more than a huge page.
const MAX_FAULT_PAGES: u64 = HUGE_PAGE_PAGES;

/// An image of the plan, by page: the extents sorted by guest frame, each with its offset in the image.
struct Image {
    by_gfn: Vec<(Extent, u64)>,
}

impl Image {
    fn check(spec: &ImageSpec, layout: &MemoryLayout) -> Result<Image, String> {
        let mut offset = 0_u64;
        let mut by_gfn = Vec::with_capacity(spec.extents.len());
        for extent in &spec.extents {
            if !layout.contains(*extent) {
                return Err(format!("an image has {extent}, which is not guest memory"));
            }
            by_gfn.push((*extent, offset));
            offset = offset.saturating_add(extent.bytes());
        }
        by_gfn.sort_unstable_by_key(|(extent, _)| extent.first);
        match by_gfn.windows(2).find(|pair| pair[0].0.end() > pair[1].0.first) {
            Some(pair) => Err(format!("an image has {} twice", pair[1].0.first)),
            None => Ok(Image { by_gfn }),
        }
    }

    /// True if the image has all pages of `extent`, contiguous from `offset` on.
    fn has(&self, extent: Extent, offset: u64) -> bool {
        let mut next = extent.first;
        let mut offset = offset;
        while next < extent.end() {
            let at = self.by_gfn.partition_point(|(piece, _)| piece.end() <= next);
            let Some((piece, start)) = self.by_gfn.get(at).filter(|(piece, _)| piece.contains(next)) else {
                return false;
            };
            if start.checked_add((next.0 - piece.first.0) * PAGE_SIZE) != Some(offset) {
                return false;
            }
            let end = piece.end().min(extent.end());
            offset += (end.0 - next.0) * PAGE_SIZE;
            next = end;
        }
        true
    }
}

/// Checks that a source of this kind can be placed as the extent says.
fn check_access(item: &PlannedExtent, access: TierAccess) -> Result<(), String> {
    let is_mapped = matches!(item.placement, Placement::InPlace);
    let copies_on_write =
        matches!((item.placement, item.fill), (Placement::CowFile, _) | (Placement::Preload, Fill::BreakCow));
    let fits = match access {
        TierAccess::MapPrivate => true,
        TierAccess::MapShared => !copies_on_write,
        TierAccess::Fetch => !copies_on_write && !is_mapped,
    };
    let problem = || format!("{} is {:?}, which its tier ({access:?}) cannot do", item.extent, item.placement);
    if fits { Ok(()) } else { Err(problem()) }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::Gfn;

    pub const LAYERS: [u64; 2] = [300 * PAGE_SIZE, 300 * PAGE_SIZE];

    /// Two ranges that touch, so that only the layout says where one ends, and one behind a gap.
    fn layout() -> MemoryLayout {
        let pages = |first: u64, pages: u64| (first * PAGE_SIZE, pages * PAGE_SIZE);
        MemoryLayout::from_gpa_ranges(&[pages(0, 100), pages(100, 100), pages(1 << 20, 100)]).unwrap()
    }

    /// A plan with cuts at random pages and a random placement for each piece.
    pub fn any_plan() -> impl Strategy<Value = RestorePlan> {
        let choice = (any::<prop::sample::Index>(), 0_usize..2, prop::bool::weighted(0.8));
        prop::collection::vec((0_u64..300, choice), 1..40).prop_map(|cuts| {
            let layout = layout();
            let mut plan = RestorePlan::new(SnapshotId::default(), "any", vec![]);
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
                let source = (placement != Placement::Zero).then_some(PageSource::layer(*layer, offset));
                plan.extents.push(PlannedExtent { extent, placement, source, fill: Fill::Copy });
                at = end;
            }
            plan
        })
    }

    /// Every page with its placement and source: the meaning of a plan.
    fn by_page(plan: &RestorePlan) -> Vec<(Gfn, Placement, Option<PageSource>)> {
        let pages = plan.extents.iter().flat_map(|item| {
            (0..item.extent.pages).map(move |i| {
                let source = item.source.map(|s| PageSource { offset: s.offset + i * PAGE_SIZE, ..s });
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
            7 => item.source = Some(PageSource::layer(0, 0)),
            8 => extents.push(PlannedExtent::zero(Extent { first: Gfn(5 << 20), pages: 1 })),
            _ => {
                item.placement = Placement::Lazy;
                item.source = Some(match how {
                    9 => PageSource::image(0, 0),
                    10 => PageSource::layer(0, LAYERS[0]),
                    11 => PageSource::layer(0, 1),
                    12 => PageSource::layer(1, u64::MAX - PAGE_SIZE + 1),
                    13 => PageSource::layer(2, 0),
                    _ => PageSource::tier(0, 0),
                });
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
        }

        #[test]
        fn broken_plan_is_refused(plan in any_plan(), at in any::<prop::sample::Index>(), how in 0_u8..15) {
            let mut plan = plan;
            let at = at.index(plan.extents.len());
            break_plan(&mut plan, at, how);
            let refused = matches!(plan.validate(&layout(), &LAYERS), Err(Error::BadPlan { .. }));
            prop_assert!(refused, "accepted after mutation {}", how);
        }
    }

    #[test]
    fn swapped_extents_are_refused() {
        let zero = |first, pages| PlannedExtent::zero(Extent { first: Gfn(first), pages });
        let extents = vec![zero(100, 100), zero(0, 100), zero(1 << 20, 100)];
        let plan = RestorePlan::new(SnapshotId::default(), "p", extents);
        let message = plan.validate(&layout(), &LAYERS).unwrap_err().to_string();
        assert!(message.contains("page 0x0 should come next, [0x64, 0xc8) does"), "{message}");
    }

    #[test]
    fn an_image_serves_only_the_pages_it_has_and_each_once() {
        let extent = |first, pages| Extent { first: Gfn(first), pages };
        let place = |offset: u64| {
            let mut plan = RestorePlan::new(SnapshotId::default(), "p", vec![]);
            plan.images = vec![ImageSpec { extents: vec![extent(30, 10), extent(10, 20)] }];
            let source = PageSource::image(0, offset * PAGE_SIZE);
            plan.extents = vec![
                PlannedExtent::zero(extent(0, 10)),
                PlannedExtent::from(extent(10, 20), Placement::CowFile, source),
                PlannedExtent::zero(extent(30, 70)),
                PlannedExtent::zero(extent(100, 100)),
                PlannedExtent::zero(extent(1 << 20, 100)),
            ];
            plan
        };
        place(10).validate(&layout(), &LAYERS).unwrap();
        assert!(place(9).validate(&layout(), &LAYERS).is_err());
        let mut twice = place(10);
        twice.images[0].extents.push(extent(35, 1));
        assert!(twice.validate(&layout(), &LAYERS).unwrap_err().to_string().contains("twice"));
        let mut background = place(10);
        background.background = vec![Background { action: BackgroundAction::ReadAhead, extent: extent(12, 4) }];
        background.validate(&layout(), &LAYERS).unwrap();
        background.background[0].action = BackgroundAction::Install;
        assert!(background.validate(&layout(), &LAYERS).is_err());
        background.background[0] = Background { action: BackgroundAction::ReadAhead, extent: extent(8, 4) };
        assert!(background.validate(&layout(), &LAYERS).is_err());
    }

    #[test]
    fn huge_pages_are_whole_blocks_of_zero_memory() {
        let layout = MemoryLayout::from_gpa_ranges(&[(0, 2048 * PAGE_SIZE)]).unwrap();
        let extent = |first, pages| Extent { first: Gfn(first), pages };
        let held = PlannedExtent::from(extent(0, 600), Placement::Lazy, PageSource::layer(0, 0));
        let validated = |blocks| {
            let extents = vec![held, PlannedExtent::zero(extent(600, 1448))];
            let mut plan = RestorePlan::new(SnapshotId::default(), "p", extents);
            plan.huge = vec![blocks];
            plan.validate(&layout, &[600 * PAGE_SIZE]).map_err(|error| error.to_string())
        };
        assert_eq!(validated(extent(1024, 1024)), Ok(()));
        for bad in [(512, 512), (1024, 0), (1024, 1536), (1024, 100), (1030, 512), (4096, 512), (1024, 1 << 63)] {
            let message = validated(extent(bad.0, bad.1)).unwrap_err();
            assert!(
                message.contains("whole blocks") || message.contains("within one extent that is zero"),
                "{message}"
            );
        }
    }

    #[test]
    fn a_tier_is_used_within_its_length_and_as_it_can_be() {
        let extent = |first, pages| Extent { first: Gfn(first), pages };
        let place = |placement, offset: u64, access| {
            let mut plan = RestorePlan::new(SnapshotId::default(), "p", vec![]);
            let pool = PoolId::default();
            let entry = Digest::default();
            let len = 200 * PAGE_SIZE;
            plan.tiers = vec![TierSource { pool, entry, access, len }];
            let source = PageSource::tier(0, offset * PAGE_SIZE);
            plan.extents = vec![
                PlannedExtent::from(extent(0, 100), placement, source),
                PlannedExtent::zero(extent(100, 100)),
                PlannedExtent::zero(extent(1 << 20, 100)),
            ];
            plan.validate(&layout(), &LAYERS)
        };
        use {Placement::*, TierAccess::*};
        for access in [MapPrivate, MapShared, Fetch] {
            place(Lazy, 100, access).unwrap();
            place(Preload, 100, access).unwrap();
            assert!(place(Lazy, 101, access).unwrap_err().to_string().contains("behind the end of tier 0"));
            assert_eq!(place(InPlace, 0, access).is_ok(), access != Fetch);
            assert_eq!(place(CowFile, 0, access).is_ok(), access == MapPrivate);
        }
    }
}
