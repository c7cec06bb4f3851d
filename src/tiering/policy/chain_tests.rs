//! Every policy, on random chains: plans can be carried out, and describe exactly the snapshot.

use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::snapshot::tests::{Model, any_pages, dir, two_files};
use crate::snapshot::{Chain, Content, Gfn, PAGE_SIZE, Placement, PlannedExtent, Sealed};

/// A chain of snapshots in both forms, each the memory after one more change.
fn write_chain(base: &Path, history: &[Model]) -> Sealed {
    let mut last: Option<Sealed> = None;
    for (index, model) in history.iter().enumerate() {
        let name = format!("s{index}");
        let target = if index % 2 == 0 { dir(base, &name) } else { two_files(base, &name) };
        last = Some(match last {
            None => model.write_full(target),
            Some(parent) => model.write_diff(&history[index - 1], &parent, target),
        });
    }
    last.unwrap()
}

/// The bytes a plan puts into the guest, by page.
fn contents(chain: &Chain, item: &PlannedExtent) -> Vec<(Gfn, Vec<u8>)> {
    let mut bytes = vec![0; item.extent.bytes() as usize];
    if let Some(source) = item.source {
        chain.layer_of(Content::Bytes(source)).unwrap().memory().read_exact_at(&mut bytes, source.offset).unwrap();
    }
    let page = |(index, bytes): (usize, &[u8])| (Gfn(item.extent.first.0 + index as u64), bytes.to_vec());
    bytes.chunks(PAGE_SIZE as usize).enumerate().map(page).collect()
}

/// The plan of a policy that needs no profile.
fn planned(policy: Policy, chain: &Chain) -> RestorePlan {
    let resolved = chain.resolve().unwrap();
    let costs = Costs::default();
    let budget = Budget::default();
    policy.plan(&PolicyInput { chain, resolved: &resolved, tiers: &[], profile: None, costs: &costs, budget }).unwrap()
}

fn assert_reproduces(policy: Policy, chain: &Chain, expected: &Model) {
    let plan = planned(policy, chain);
    assert_eq!((plan.snapshot, plan.policy.as_str()), (chain.tip().id(), policy.name()));
    plan.validate(chain.layout(), &chain.layer_file_lens()).unwrap();
    assert_eq!(plan.counts().total(), chain.layout().pages());
    let mut planned: Vec<(Gfn, Vec<u8>)> = plan.extents.iter().flat_map(|item| contents(chain, item)).collect();
    planned.sort();
    let wanted: Vec<(Gfn, Vec<u8>)> = (0..expected.pages.len()).map(|i| (expected.gfn(i), expected.page(i))).collect();
    assert!(planned == wanted, "{policy} does not reproduce the snapshot");
    // The placements that each policy promises by its name.
    for item in &plan.extents {
        let kept = match policy {
            Policy::Eager => matches!(item.placement, Placement::Zero | Placement::Preload),
            Policy::Firecracker => matches!(item.placement, Placement::Zero | Placement::CowFile),
            Policy::FirecrackerUffd => matches!(item.placement, Placement::Zero | Placement::Lazy),
            _ => matches!(item.placement, Placement::Zero | Placement::InPlace),
        };
        assert!(kept, "{policy} places {} {:?}", item.extent, item.placement);
    }
    // No two neighbours that could be one: each extent is a system call at restore.
    let mut joined = plan.clone();
    joined.coalesce(chain.layout());
    assert_eq!(joined, plan);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_policy_reproduces_random_chains(history in prop::collection::vec(any_pages(), 1..5)) {
        let base = tempfile::tempdir().unwrap();
        let history: Vec<Model> = history.into_iter().map(Model::new).collect();
        let tip = write_chain(base.path(), &history);
        let chain = Chain::open(&tip.location).unwrap();
        for policy in Policy::ALL.into_iter().filter(|policy| !policy.needs_profile()) {
            assert_reproduces(policy, &chain, history.last().unwrap());
        }
    }
}

#[test]
fn eager_reads_no_zero_page() {
    let base = tempfile::tempdir().unwrap();
    let model = Model::new((0..130).map(|index| u8::from(index % 3 == 0)).collect());
    let chain = Chain::open(&model.write_full(dir(base.path(), "a")).location).unwrap();
    let counts = planned(Policy::Eager, &chain).counts();
    let nonzero = model.pages.iter().filter(|&&page| page != 0).count() as u64;
    assert_eq!((counts.preload, counts.zero), (nonzero, 130 - nonzero));
}

#[test]
fn firecracker_maps_a_full_snapshot_with_one_mapping_per_range() {
    let base = tempfile::tempdir().unwrap();
    let chain = Chain::open(&crate::snapshot::tests::sample().write_full(dir(base.path(), "a")).location).unwrap();
    let plan = planned(Policy::Firecracker, &chain);
    assert_eq!(plan.extents.len(), chain.layout().ranges().len());
}

#[test]
fn policies_are_found_by_their_names_and_others_are_told_which_there_are() {
    for policy in Policy::ALL {
        assert_eq!(policy.to_string().parse::<Policy>().unwrap(), policy);
    }
    let message = "fastest".parse::<Policy>().unwrap_err().to_string();
    assert!(Policy::ALL.iter().all(|policy| message.contains(policy.name())), "{message}");
}
