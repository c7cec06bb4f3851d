use proptest::prelude::*;

use super::*;
use crate::snapshot::{
    Content, Extent, Gfn, PAGE_SIZE, PageSet, PageSource, ResolvedRun, SectionKind, SnapshotId, write_container,
};

const ID: SnapshotId = SnapshotId([7; 32]);

fn extent(first: u64, pages: u64) -> Extent {
    Extent::new(Gfn(first), pages)
}

fn set(extents: &[(u64, u64)]) -> PageSet {
    extents.iter().map(|&(first, pages)| extent(first, pages)).collect()
}

/// Pages one by one, joined where the next follows: the one way to write an order.
fn order_of(pages: impl IntoIterator<Item = u64>) -> Order {
    let mut extents: Vec<Extent> = Vec::new();
    for page in pages {
        match extents.last_mut() {
            Some(last) if last.end() == Gfn(page) => last.pages += 1,
            _ => extents.push(extent(page, 1)),
        }
    }
    Order::Exact(extents)
}

/// A recorded run: distinct pages in order of their first touch, each read (0), written (1) or unclassified (2).
fn profile_of(touches: &[(u64, u8)]) -> Profile {
    let mut profile = Profile::new(ID, RecorderKind::Uffd, "touch pages=1");
    for &(page, class) in touches {
        let class = match class {
            0 => &mut profile.read,
            1 => &mut profile.written,
            _ => &mut profile.unclassified,
        };
        class.insert(Gfn(page));
    }
    profile.order = order_of(touches.iter().map(|(page, _)| *page));
    profile
}

fn any_touches() -> impl Strategy<Value = Vec<(u64, u8)>> {
    let page = prop_oneof![0_u64..300, 65_500_u64..65_600, Just(u64::from(u32::MAX))];
    prop::collection::btree_map(page, 0_u8..3, 0..200)
        .prop_map(|pages| pages.into_iter().collect::<Vec<_>>())
        .prop_shuffle()
}

fn any_profile() -> impl Strategy<Value = Profile> {
    (any_touches(), 0_u8..4, any::<bool>(), 1_u32..5).prop_map(|(touches, order, sees_reads, runs)| {
        let mut profile = profile_of(&touches);
        (profile.sees_reads, profile.runs) = (sees_reads, runs);
        let pages = profile.working_set();
        match order {
            0 => {}
            1 => profile.times_ns = (0..pages.len().div_ceil(PAGES_PER_TIME)).map(|i| i * i * 1000).collect(),
            2 => profile.order = Order::Unknown,
            _ => {
                let layer = |part: &[(u64, u8)]| part.iter().map(|(page, _)| Gfn(*page)).collect();
                profile.order = Order::Layers(touches.chunks(30).map(layer).collect());
            }
        }
        if let Some(first) = pages.first().filter(|_| runs > 1) {
            profile.frequency.touched = vec![(runs - 1, [first].into_iter().collect())];
        }
        profile
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn profile_comes_back_from_its_file(profile in any_profile()) {
        let bytes = profile.to_bytes().unwrap();
        prop_assert_eq!(&Profile::from_bytes(bytes.clone()).unwrap(), &profile);
        prop_assert_eq!(Profile::from_bytes(bytes).unwrap().in_order(), profile.in_order());
        let in_order: PageSet = profile.in_order().into_iter().collect();
        prop_assert_eq!(in_order, profile.working_set());
    }

    #[test]
    fn damaged_profile_is_refused_without_panic(
        profile in any_profile(), at in any::<prop::sample::Index>(),
        bit in 0_u8..8, cut in any::<prop::sample::Index>(),
    ) {
        let bytes = profile.to_bytes().unwrap();
        let mut flipped = bytes.clone();
        flipped[at.index(bytes.len())] ^= 1 << bit;
        prop_assert!(Profile::from_bytes(flipped).is_err());
        prop_assert!(Profile::from_bytes(bytes[..cut.index(bytes.len())].to_vec()).is_err());
    }

    /// Checksums are no defence against an attacker, who can compute them: payloads are hostile too.
    #[test]
    fn hostile_payloads_are_read_or_refused_without_panic(
        profile in any_profile(), which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(),
        with in any::<u8>(), how in 0_u8..4, random in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut sections = super::file::sections_of(&profile);
        let section = &mut sections[which.index(usize::MAX) % 4];
        let payload = &mut section.payload;
        match how {
            0 => *payload = random,
            1 => payload.truncate(at.index(payload.len() + 1)),
            2 => payload.push(with),
            _ if payload.is_empty() => {}
            _ => { let at = at.index(payload.len()); payload[at] = with; }
        }
        if let Ok(read) = Profile::from_bytes(write_container(&sections)) {
            read.check().unwrap();
            prop_assert_eq!(Profile::from_bytes(read.to_bytes().unwrap()).unwrap(), read);
        }
    }

    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Profile::from_bytes(bytes).is_err());
    }

    #[test]
    fn each_merge_kind_keeps_its_pages(parts in prop::collection::vec(any_touches(), 1..6)) {
        let profiles: Vec<Profile> = parts.iter().map(|touches| profile_of(touches)).collect();
        let runs = profiles.len() as u32;
        for kind in MergeKind::ALL {
            let (merged, agreement) = merge(&profiles, kind).unwrap();
            merged.check().unwrap();
            prop_assert_eq!(merged.runs, runs);
            prop_assert_eq!(agreement.pairs.len() as u32, runs * (runs - 1) / 2);
            for page in profiles.iter().flat_map(|p| p.working_set().iter().collect::<Vec<_>>()) {
                let touched = profiles.iter().filter(|p| p.working_set().contains(page)).count() as u32;
                let written = profiles.iter().filter(|p| p.written.contains(page)).count() as u32;
                let kept = match kind {
                    MergeKind::Union => true,
                    MergeKind::Intersection => touched == runs,
                    MergeKind::Majority => touched * 2 > runs,
                };
                prop_assert_eq!(merged.working_set().contains(page), kept);
                if kept {
                    prop_assert_eq!(merged.touch_probability(page), f64::from(touched) / f64::from(runs));
                    prop_assert_eq!(merged.write_probability(page), f64::from(written) / f64::from(runs));
                }
            }
            prop_assert_eq!(Profile::from_bytes(merged.to_bytes().unwrap()).unwrap(), merged);
        }
    }
}

#[test]
fn order_of_a_merge_is_by_mean_rank() {
    let read = |pages: &[u64]| profile_of(&pages.iter().map(|page| (*page, 0)).collect::<Vec<_>>());
    let a = read(&[5, 6, 7, 1, 2]);
    let b = read(&[6, 7, 5, 2, 1, 9]);
    let (merged, agreement) = merge(&[a, b], MergeKind::Union).unwrap();
    // Ranks: 5 → 1, 6 and 7 (one piece, together in both) → 0.5, 1 → 3.5, 2 → 3.5, 9 → 5.
    assert_eq!(merged.order, order_of([6, 7, 5, 1, 2, 9]));
    assert_eq!(agreement.mean(), (5.0 / 6.0, 1.0));
    assert_eq!(merged.frequency.touched, [(1, set(&[(9, 1)]))]);
}

#[test]
fn order_of_a_merge_is_no_better_than_its_parts() {
    let exact = profile_of(&[(1, 0), (2, 0)]);
    let mut layered = profile_of(&[(2, 2), (3, 2)]);
    layered.order = Order::Layers(vec![set(&[(3, 1)]), set(&[(2, 1)])]);
    let mut unknown = profile_of(&[(4, 1)]);
    unknown.order = Order::Unknown;
    let (merged, _) = merge(&[exact.clone(), layered.clone()], MergeKind::Union).unwrap();
    assert_eq!(merged.order, Order::Layers(vec![set(&[(1, 3)])]));
    assert!(!merged.knows_order());
    let (merged, _) = merge(&[exact, layered, unknown], MergeKind::Union).unwrap();
    assert_eq!(merged.order, Order::Unknown);
    assert_eq!(merged.in_order(), [extent(1, 4)]);
}

#[test]
fn profiles_of_two_snapshots_are_not_merged() {
    let mut other = profile_of(&[(1, 0)]);
    other.snapshot = SnapshotId([9; 32]);
    let message = merge(&[profile_of(&[(1, 0)]), other], MergeKind::Union).unwrap_err().to_string();
    assert!(message.contains(&"07".repeat(32)) && message.contains(&"09".repeat(32)), "{message}");
    assert!(merge(&[], MergeKind::Union).is_err());
}

#[test]
fn contradictions_are_not_written() {
    let good = || profile_of(&[(1, 0), (2, 1)]);
    good().to_bytes().unwrap();
    let spoil: [fn(&mut Profile); 8] = [
        |p| p.read.insert(Gfn(2)),
        |p| p.runs = 0,
        |p| p.runs = MAX_RUNS + 1,
        |p| p.function = "a\nb".to_string(),
        |p| p.order = Order::Exact(vec![]),
        |p| p.order = Order::Exact(vec![extent(1, 2), extent(1, 1)]),
        |p| p.times_ns = vec![1, 2],
        |p| p.frequency.touched = vec![(1, set(&[(1, 1)]))],
    ];
    for (index, spoil) in spoil.iter().enumerate() {
        let mut profile = good();
        spoil(&mut profile);
        assert!(profile.to_bytes().is_err(), "{index}");
    }
}

#[test]
fn a_file_of_another_kind_is_refused() {
    let mut sections = super::file::sections_of(&profile_of(&[(1, 0)]));
    sections[1].version = 2;
    assert!(Profile::from_bytes(write_container(&sections)).unwrap_err().to_string().contains("version 2"));
    sections[1].version = 1;
    sections.push(crate::snapshot::Section { kind: SectionKind::Vcpu, instance: 0, version: 1, payload: vec![] });
    assert!(Profile::from_bytes(write_container(&sections)).unwrap_err().to_string().contains("kind 3"));
}

#[test]
fn a_touched_page_takes_less_than_a_byte_and_two_if_the_order_is_random() {
    let pages = 16_384_u64;
    // Dense; every fourth page; runs of three; and all of a 64 MiB region in random order, half of it written.
    let hash = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let mut random: Vec<u64> = (0..pages).collect();
    random.sort_by_key(|page| hash(*page));
    let shuffled = |i: u64| random[i as usize];
    type Pattern<'a> = (&'a str, f64, Box<dyn Fn(u64) -> (u64, u8) + 'a>);
    let patterns: [Pattern<'_>; 5] = [
        ("dense", 0.2, Box::new(|i| (1000 + i, 0))),
        ("stride 4, 30 % written", 0.6, Box::new(move |i| (i * 4 % pages + i * 4 / pages, u8::from(i % 10 < 3)))),
        ("one page in four, 30 % written", 1.0, Box::new(|i| (i * 4, u8::from(i % 10 < 3)))),
        ("runs of three", 1.0, Box::new(|i| (i / 3 * 7 + i % 3, u8::from(i % 2 == 0)))),
        ("random, 50 % written", 2.1, Box::new(|i| (shuffled(i), (hash(i) >> 40 & 1) as u8))),
    ];
    for (name, most, touch) in patterns {
        let mut profile = profile_of(&(0..pages).map(touch).collect::<Vec<_>>());
        profile.times_ns = (0..pages / PAGES_PER_TIME).map(|i| i * 2_500_000).collect();
        let per_page = profile.to_bytes().unwrap().len() as f64 / pages as f64;
        println!("{name}: {per_page:.3} bytes per touched page");
        assert!(per_page <= most, "{name}: {per_page}");
    }
}

#[test]
fn a_saved_profile_replaces_the_old_one_and_leaves_nothing_beside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.profile");
    for profile in [profile_of(&[(1, 0)]), profile_of(&[(1, 0), (9, 1)])] {
        let size = profile.save(&path).unwrap();
        assert_eq!(size, std::fs::metadata(&path).unwrap().len());
        assert_eq!(Profile::load(&path).unwrap(), profile);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    assert!(profile_of(&[]).save(&dir.path().join("no/where")).is_err());
}

#[test]
fn buckets_follow_the_layers() {
    let layer = |layer| Content::Bytes(PageSource::layer(layer, 8 * PAGE_SIZE));
    let run = |first, pages, content| ResolvedRun { extent: extent(first, pages), content };
    let runs = [run(0, 10, layer(0)), run(10, 5, Content::Zero), run(15, 5, layer(2)), run(20, 5, layer(1))];
    let buckets = Buckets::of(&runs).within(&set(&[(5, 12)]));
    assert_eq!(buckets.runtime, set(&[(5, 5)]));
    assert_eq!(buckets.execution, set(&[(10, 5)]));
    assert_eq!(buckets.init, set(&[(15, 2)]));
    assert_eq!(nonzero(&runs), set(&[(0, 10), (15, 10)]));
    let profile = profile_of(&[(9, 0), (10, 1)]);
    assert_eq!(profile.loading_set(&nonzero(&runs)), set(&[(9, 1)]));
}
