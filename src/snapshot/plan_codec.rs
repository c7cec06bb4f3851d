//! The forms of a plan in files and in JSON. They differ in how they write the origin of an extent's pages.
//!
//! A [`StoredPlan`] numbers the origins through: the layers of the chain, then the plan's tiers, then its images. The
//! number of layers is not part of a plan, so [`StoredPlan::new`] and [`StoredPlan::into_plan`] are given it. A
//! [`JsonPlan`] writes the origins by kind, as the rest of the program knows them ([`PageOrigin`]).

use serde::{Deserialize, Serialize};

use super::{
    Background, Extent, Fill, ImageSpec, PageOrigin, PageSource, Placement, PlannedExtent, RestorePlan, SnapshotId,
    TierSource,
};

/// A [`RestorePlan`] with numbered origins.
pub type StoredPlan = PlanForm<NumberedSource>;

/// A [`RestorePlan`] with origins by kind.
pub type JsonPlan = PlanForm<NamedSource>;

/// A [`RestorePlan`], field by field. `S`: the form of a page's source.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanForm<S> {
    snapshot: SnapshotId,
    policy: String,
    #[serde(default)]
    tiers: Vec<TierSource>,
    #[serde(default)]
    images: Vec<ImageSpec>,
    extents: Vec<ExtentForm<S>>,
    #[serde(default)]
    huge: Vec<Extent>,
    #[serde(default)]
    background: Vec<Background>,
    #[serde(default)]
    verify: bool,
    #[serde(default)]
    direct: bool,
    #[serde(default = "one")]
    fault_pages: u64,
}

fn one() -> u64 {
    1
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExtentForm<S> {
    extent: Extent,
    placement: Placement,
    source: Option<S>,
    #[serde(default)]
    fill: Fill,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NumberedSource {
    /// The number of the origin, whatever its kind.
    layer: usize,
    offset: u64,
}

/// A source with one of `layer`, `tier` and `image`: the index of the origin among those of its kind.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(try_from = "SourceFields", into = "SourceFields")]
pub struct NamedSource(PageSource);

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SourceFields {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layer: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tier: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    image: Option<usize>,
    offset: u64,
}

impl From<NamedSource> for SourceFields {
    fn from(NamedSource(source): NamedSource) -> SourceFields {
        let mut fields = SourceFields { layer: None, tier: None, image: None, offset: source.offset };
        match source.origin {
            PageOrigin::Layer(index) => fields.layer = Some(index),
            PageOrigin::Tier(index) => fields.tier = Some(index),
            PageOrigin::Image(index) => fields.image = Some(index),
        }
        fields
    }
}

impl TryFrom<SourceFields> for NamedSource {
    type Error = String;

    fn try_from(fields: SourceFields) -> Result<NamedSource, String> {
        let SourceFields { layer, tier, image, offset } = fields;
        let origin = match (layer, tier, image) {
            (Some(index), None, None) => PageOrigin::Layer(index),
            (None, Some(index), None) => PageOrigin::Tier(index),
            (None, None, Some(index)) => PageOrigin::Image(index),
            _ => return Err("a source has one of `layer`, `tier` and `image`".to_owned()),
        };
        Ok(NamedSource(PageSource { origin, offset }))
    }
}

/// The numbers at which tiers and images begin.
#[derive(Clone, Copy)]
struct Numbering {
    first_tier: usize,
    first_image: usize,
}

impl Numbering {
    fn new(layers: usize, tiers: usize) -> Self {
        Numbering { first_tier: layers, first_image: layers.saturating_add(tiers) }
    }

    fn store(self, source: PageSource) -> NumberedSource {
        let layer = match source.origin {
            PageOrigin::Layer(index) => index,
            PageOrigin::Tier(index) => self.first_tier + index,
            PageOrigin::Image(index) => self.first_image + index,
        };
        NumberedSource { layer, offset: source.offset }
    }

    fn load(self, stored: NumberedSource) -> PageSource {
        let NumberedSource { layer: number, offset } = stored;
        if number >= self.first_image {
            PageSource::image(number - self.first_image, offset)
        } else if number >= self.first_tier {
            PageSource::tier(number - self.first_tier, offset)
        } else {
            PageSource::layer(number, offset)
        }
    }
}

impl<S> PlanForm<S> {
    fn of(plan: RestorePlan, store: impl Fn(PageSource) -> S) -> Self {
        let of_extent = |item: PlannedExtent| {
            let PlannedExtent { extent, placement, source, fill } = item;
            ExtentForm { extent, placement, source: source.map(&store), fill }
        };
        let RestorePlan { snapshot, policy, tiers, images, extents, huge, background, verify, direct, fault_pages } =
            plan;
        let extents = extents.into_iter().map(of_extent).collect();
        PlanForm { snapshot, policy, tiers, images, extents, huge, background, verify, direct, fault_pages }
    }

    fn read(self, load: impl Fn(S) -> PageSource) -> RestorePlan {
        let to_extent = |item: ExtentForm<S>| {
            let ExtentForm { extent, placement, source, fill } = item;
            PlannedExtent { extent, placement, source: source.map(&load), fill }
        };
        let PlanForm { snapshot, policy, tiers, images, extents, huge, background, verify, direct, fault_pages } = self;
        let extents = extents.into_iter().map(to_extent).collect();
        RestorePlan { snapshot, policy, tiers, images, extents, huge, background, verify, direct, fault_pages }
    }
}

impl StoredPlan {
    /// The stored form of a plan for a chain of `layers` layers.
    pub fn new(plan: RestorePlan, layers: usize) -> Self {
        let numbering = Numbering::new(layers, plan.tiers.len());
        PlanForm::of(plan, |source| numbering.store(source))
    }

    /// The plan for a chain of `layers` layers. A number behind the last image becomes an image that the plan does not
    /// have, which [`RestorePlan::validate`] refuses.
    pub fn into_plan(self, layers: usize) -> RestorePlan {
        let numbering = Numbering::new(layers, self.tiers.len());
        self.read(|stored| numbering.load(stored))
    }
}

impl From<RestorePlan> for JsonPlan {
    fn from(plan: RestorePlan) -> JsonPlan {
        PlanForm::of(plan, NamedSource)
    }
}

impl From<JsonPlan> for RestorePlan {
    fn from(json: JsonPlan) -> RestorePlan {
        json.read(|NamedSource(source)| source)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::plan::tests::{LAYERS, any_plan};
    use super::*;
    use crate::snapshot::{Digest, Gfn, PoolId, TierAccess};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn plan_survives_its_stored_form(plan in any_plan()) {
            let json = serde_json::to_string(&StoredPlan::new(plan.clone(), LAYERS.len())).unwrap();
            prop_assert_eq!(serde_json::from_str::<StoredPlan>(&json).unwrap().into_plan(LAYERS.len()), plan);
        }

        #[test]
        fn plan_survives_its_json(plan in any_plan()) {
            let json = serde_json::to_string(&JsonPlan::from(plan.clone())).unwrap();
            prop_assert_eq!(RestorePlan::from(serde_json::from_str::<JsonPlan>(&json).unwrap()), plan);
        }
    }

    #[test]
    fn layers_tiers_and_images_are_numbered_through() {
        let tier = TierSource {
            pool: PoolId::default(),
            entry: Digest::default(),
            access: TierAccess::MapPrivate,
            len: 1 << 20,
        };
        let sources = [
            PageSource::layer(0, 0),
            PageSource::layer(2, 4096),
            PageSource::tier(0, 8192),
            PageSource::tier(1, 0),
            PageSource::image(0, 0),
            PageSource::image(1, 4096),
        ];
        let mut plan = RestorePlan::new(SnapshotId::default(), "p", Vec::new());
        plan.tiers = vec![tier, tier];
        plan.extents = (0..)
            .zip(sources)
            .map(|(first, source)| PlannedExtent::from(Extent { first: Gfn(first), pages: 1 }, Placement::Lazy, source))
            .collect();
        let json = serde_json::to_value(StoredPlan::new(plan.clone(), 3)).unwrap();
        let stored: Vec<_> = json["extents"].as_array().unwrap().iter().map(|item| &item["source"]).collect();
        let expected = [(0, 0), (2, 4096), (3, 8192), (4, 0), (5, 0), (6, 4096)];
        let expected = expected.map(|(layer, offset)| serde_json::json!({ "layer": layer, "offset": offset }));
        assert_eq!(stored, expected.iter().collect::<Vec<_>>());
        assert_eq!(serde_json::from_value::<StoredPlan>(json).unwrap().into_plan(3), plan);
    }
}
