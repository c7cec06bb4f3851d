//! Diffs from which pages are taken out that are as they were, and memory that is read back after it was acknowledged.

use std::os::unix::fs::FileExt;

use tempfile::tempdir;

use super::*;

/// A diff of `parent`, whose memory is `before`, that holds or marks `candidates` of `now` and doubts `doubtful`.
fn sealed_diff(
    [before, now]: [&Model; 2],
    parent: &Sealed,
    target: Location,
    [candidates, doubtful]: [&[bool]; 2],
) -> Chain {
    let told = Parent { id: parent.id, location: parent.location.clone() };
    let mut writer =
        SnapshotWriter::create(target.clone(), now.layout.clone(), SnapshotKind::Diff, Some(told)).unwrap();
    let is_candidate = |i: usize| candidates[i] || now.pages[i] != before.pages[i];
    for run in now.runs(|i| is_candidate(i) && now.pages[i] != 0) {
        writer.write_run(run.first, &now.bytes(run)).unwrap();
    }
    for run in now.runs(|i| is_candidate(i) && now.pages[i] == 0) {
        writer.mark_zero(run).unwrap();
    }
    let pages: PageSet = now.runs(|i| doubtful[i]).into_iter().collect();
    let chain = Chain::open(&parent.location).unwrap();
    writer.drop_unchanged(Doubtful { parent: &chain, pages: &pages }).unwrap();
    let (_, read_back) = writer.seal_unproven(seal_input()).unwrap();
    read_back.run(&NoCache).unwrap();
    Chain::open(&target).unwrap()
}

fn memories() -> impl Strategy<Value = Vec<Vec<u8>>> {
    proptest::collection::vec(proptest::collection::vec(0u8..3, 130), 3)
}

fn flags() -> impl Strategy<Value = Vec<bool>> {
    proptest::collection::vec(any::<bool>(), 130)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn diff_without_unchanged_doubtful_pages_restores_the_same_memory(
        memories in memories(), candidates in flags(), doubtful in flags(), two_files in any::<bool>(),
    ) {
        let dir = tempdir().unwrap();
        let [base, middle, now] = [0, 1, 2].map(|i| Model::new(memories[i].clone()));
        let full = base.write_full(Location::Dir(dir.path().join("full")));
        let parent = middle.write_diff(&base, &full, Location::Dir(dir.path().join("middle")));
        let target = if two_files {
            Location::Files { snapshot: dir.path().join("s"), memory: dir.path().join("m") }
        } else {
            Location::Dir(dir.path().join("diff"))
        };
        let chain = sealed_diff([&middle, &now], &parent, target, [&candidates, &doubtful]);
        now.assert_is(&chain);
        let is_good = chain.tip().verify(&mut |_, _| {}).unwrap().is_good();
        prop_assert!(is_good);
        let map = chain.tip().page_map().unwrap();
        for i in 0..130 {
            let has_changed = now.pages[i] != middle.pages[i];
            let expected = has_changed || candidates[i] && !doubtful[i];
            let page = Extent { first: now.gfn(i), pages: 1 };
            prop_assert_eq!(map.held().len_in(page) + map.zero().len_in(page) == 1, expected, "page {}", i);
            if map.held().len_in(page) == 0 {
                let mut bytes = vec![1; PAGE];
                chain.tip().memory().read_exact_at(&mut bytes, (i * PAGE) as u64).unwrap();
                let is_hole = bytes.iter().all(|byte| *byte == 0);
                prop_assert!(is_hole, "nothing is left of page {}", i);
            }
        }
    }
}

#[test]
fn parent_that_cannot_be_read_leaves_all_pages_in_the_diff() {
    let dir = tempdir().unwrap();
    let base = Model::new(vec![1; 130]);
    let parent = base.write_full(Location::Dir(dir.path().join("full")));
    let chain = Chain::open(&parent.location).unwrap();
    std::fs::OpenOptions::new().write(true).open(dir.path().join("full/memory")).unwrap().set_len(0).unwrap();
    let told = Parent { id: parent.id, location: parent.location.clone() };
    let target = Location::Dir(dir.path().join("diff"));
    let mut writer = SnapshotWriter::create(target, base.layout.clone(), SnapshotKind::Diff, Some(told)).unwrap();
    let run = Extent { first: base.gfn(0), pages: 20 };
    writer.write_run(run.first, &base.bytes(run)).unwrap();
    writer.drop_unchanged(Doubtful { parent: &chain, pages: &[run].into_iter().collect() }).unwrap();
    assert_eq!(writer.seal(seal_input()).unwrap().pages_held, 20);
}

#[test]
fn snapshot_is_whole_before_it_is_read_back_and_damage_is_found_afterwards() {
    let dir = tempdir().unwrap();
    let model = Model::new((0..130).map(|i| i as u8).collect());
    let target = Location::Dir(dir.path().join("full"));
    let mut writer = SnapshotWriter::create(target.clone(), model.layout.clone(), SnapshotKind::Full, None).unwrap();
    for run in model.runs(|i| model.pages[i] != 0) {
        writer.write_run(run.first, &model.bytes(run)).unwrap();
    }
    let (sealed, read_back) = writer.seal_unproven(seal_input()).unwrap();
    assert_eq!(sealed.pages_held, 129);
    model.assert_is(&Chain::open(&target).unwrap());
    let memory = std::fs::OpenOptions::new().write(true).open(dir.path().join("full/memory")).unwrap();
    memory.write_all_at(b"?", (7 * PAGE + 100) as u64).unwrap();
    memory.sync_all().unwrap();
    let said = read_back.run(&NoCache).unwrap_err().to_string();
    assert!(said.contains(&dir.path().join("full/memory").display().to_string()), "{said}");
}
