//! The form of a plan in files and in JSON.
//!
//! A stored plan numbers the origins of its pages through: the layers of the chain, then the plan's tiers, then its
//! images. The number of layers is not part of a plan, so [`StoredPlan::new`] and [`StoredPlan::into_plan`] are given
//! it. The rest of the program knows the origins by kind ([`PageOrigin`]).

use serde::{Deserialize, Serialize};

use super::{
    Background, Extent, Fill, ImageSpec, PageOrigin, PageSource, Placement, PlannedExtent, RestorePlan, SnapshotId,
    TierSource,
};

/// A [`RestorePlan`], field by field, with numbered origins.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredPlan {
    snapshot: SnapshotId,
    policy: String,
    #[serde(default)]
    tiers: Vec<TierSource>,
    #[serde(default)]
    images: Vec<ImageSpec>,
    extents: Vec<StoredExtent>,
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
struct StoredExtent {
    extent: Extent,
    placement: Placement,
    source: Option<StoredSource>,
    #[serde(default)]
    fill: Fill,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredSource {
    /// The number of the origin, whatever its kind.
    layer: usize,
    offset: u64,
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

    fn store(self, source: PageSource) -> StoredSource {
        let layer = match source.origin {
            PageOrigin::Layer(index) => index,
            PageOrigin::Tier(index) => self.first_tier + index,
            PageOrigin::Image(index) => self.first_image + index,
        };
        StoredSource { layer, offset: source.offset }
    }

    fn load(self, stored: StoredSource) -> PageSource {
        let StoredSource { layer: number, offset } = stored;
        if number >= self.first_image {
            PageSource::image(number - self.first_image, offset)
        } else if number >= self.first_tier {
            PageSource::tier(number - self.first_tier, offset)
        } else {
            PageSource::layer(number, offset)
        }
    }
}

impl StoredPlan {
    /// The stored form of a plan for a chain of `layers` layers.
    pub fn new(plan: RestorePlan, layers: usize) -> Self {
        let numbering = Numbering::new(layers, plan.tiers.len());
        let store = |item: PlannedExtent| {
            let PlannedExtent { extent, placement, source, fill } = item;
            StoredExtent { extent, placement, source: source.map(|source| numbering.store(source)), fill }
        };
        let RestorePlan { snapshot, policy, tiers, images, extents, huge, background, verify, direct, fault_pages } =
            plan;
        let extents = extents.into_iter().map(store).collect();
        StoredPlan { snapshot, policy, tiers, images, extents, huge, background, verify, direct, fault_pages }
    }

    /// The plan for a chain of `layers` layers. A number behind the last image becomes an image that the plan does not
    /// have, which [`RestorePlan::validate`] refuses.
    pub fn into_plan(self, layers: usize) -> RestorePlan {
        let numbering = Numbering::new(layers, self.tiers.len());
        let load = |item: StoredExtent| {
            let StoredExtent { extent, placement, source, fill } = item;
            PlannedExtent { extent, placement, source: source.map(|stored| numbering.load(stored)), fill }
        };
        let StoredPlan { snapshot, policy, tiers, images, extents, huge, background, verify, direct, fault_pages } =
            self;
        let extents = extents.into_iter().map(load).collect();
        RestorePlan { snapshot, policy, tiers, images, extents, huge, background, verify, direct, fault_pages }
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
