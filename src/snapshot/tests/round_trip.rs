//! A reader finds exactly what the writer wrote, in every form.

use std::fs;

use proptest::prelude::*;

use super::NoCache;
use super::*;

fn names_in(path: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn full_snapshot_round_trips_in_both_forms() {
    let base = tempfile::tempdir().unwrap();
    let model = sample();
    for location in [dir(base.path(), "a"), two_files(base.path(), "b")] {
        let sealed = model.write_full(location.clone());
        let snapshot = Snapshot::open(&location).unwrap();
        assert_eq!(snapshot.id(), sealed.id);
        assert_eq!(snapshot.manifest().pages_held, sealed.pages_held);
        assert_eq!(snapshot.manifest().host, seal_input().host);
        assert_eq!(snapshot.sections().len(), 5);
        assert_eq!(snapshot.section(SectionKind::Vcpu, 1).unwrap(), [8; 301]);
        assert_eq!(snapshot.section(SectionKind::Serial, 0).unwrap(), b"");
        assert_eq!(snapshot.section_info(SectionKind::Vcpu, 0).unwrap().version, 3);
        assert!(matches!(snapshot.section(SectionKind::I8042, 0), Err(Error::MissingSection { kind: 5, .. })));
        assert_eq!(snapshot.copy_state().unwrap(), sections());
        let mut last = (0, 0);
        let report = snapshot.verify(&mut |done, total| last = (done, total)).unwrap();
        assert!(report.is_good());
        assert_eq!(report.pages, sealed.pages_held);
        assert_eq!(last, (sealed.pages_held * PAGE_SIZE, sealed.pages_held * PAGE_SIZE));
        assert!(sealed.bytes_on_disk >= sealed.pages_held * PAGE_SIZE);
        model.assert_is(&Chain::open(&location).unwrap());
    }
    assert_eq!(names_in(base.path()), ["a", "b.mem", "b.snap"]);
    assert_eq!(names_in(&base.path().join("a")), ["manifest.json", "memory", "pages", "vmstate"]);
}

#[test]
fn both_forms_have_one_identity() {
    let base = tempfile::tempdir().unwrap();
    sample().write_full(dir(base.path(), "a"));
    sample().write_full(two_files(base.path(), "b"));
    let a = Snapshot::open(&dir(base.path(), "a")).unwrap().manifest().clone();
    let mut b = Snapshot::open(&two_files(base.path(), "b")).unwrap().manifest().clone();
    b.created_unix_ms = a.created_unix_ms;
    assert_eq!(b.compute_id("b").unwrap(), a.id);
}

#[test]
fn memory_file_is_sparse_and_only_held_pages_are_in_it() {
    let base = tempfile::tempdir().unwrap();
    let layout = MemoryLayout::from_gpa_ranges(&[(0, 1 << 30), (4 << 30, 1 << 30)]).unwrap();
    let mut writer = SnapshotWriter::create(dir(base.path(), "a"), layout.clone(), SnapshotKind::Full, None).unwrap();
    writer.write_run(Gfn((4 << 30) / PAGE_SIZE), &vec![1; 3 * PAGE]).unwrap();
    let sealed = writer.seal(seal_input()).unwrap();
    assert_eq!(sealed.pages_held, 3);
    assert!(sealed.bytes_on_disk < 1 << 20, "{} bytes on disk", sealed.bytes_on_disk);
    assert_eq!(fs::metadata(base.path().join("a/memory")).unwrap().len(), 2 << 30);
}

/// Five layers over each other, each page with a history.
fn write_chain(base: &Path, history: &[Model]) -> Vec<Sealed> {
    let mut sealed: Vec<Sealed> = Vec::new();
    for (index, model) in history.iter().enumerate() {
        let target =
            if index % 2 == 0 { dir(base, &format!("s{index}")) } else { two_files(base, &format!("s{index}")) };
        sealed.push(match sealed.last() {
            None => model.write_full(target),
            Some(parent) => model.write_diff(&history[index - 1], parent, target),
        });
    }
    sealed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn chain_of_five_resolves_and_merges_to_the_last_memory(history in prop::collection::vec(any_pages(), 5)) {
        let base = tempfile::tempdir().unwrap();
        let history: Vec<_> = history.into_iter().map(Model::new).collect();
        let last = history.last().unwrap();
        let sealed = write_chain(base.path(), &history);
        let chain = Chain::open(&sealed[4].location).unwrap();
        prop_assert_eq!(chain.layers().len(), 5);
        prop_assert_eq!(chain.tip().id(), sealed[4].id);
        last.assert_is(&chain);

        let direct = last.write_full(dir(base.path(), "direct"));
        let direct = Chain::open(&direct.location).unwrap();
        let merged = merge(&chain, dir(base.path(), "merged"),
        &NoCache, &mut |done, total| assert!(done <= total)).unwrap();
        let merged = Chain::open(&merged.location).unwrap();
        last.assert_is(&merged);
        prop_assert_eq!(merged.tip().page_map().unwrap(), direct.tip().page_map().unwrap());
        prop_assert_eq!(merged.tip().copy_state().unwrap(), sections());
        let digests = [&chain, &direct, &merged].map(|chain| page_digest(chain).unwrap());
        prop_assert!(digests[0] == digests[1] && digests[1] == digests[2]);
        if history[3] != *last {
            let before = Chain::open(&sealed[3].location).unwrap();
            prop_assert!(page_digest(&before).unwrap() != digests[0]);
        }
    }
}

#[test]
fn resolved_runs_are_maximal() {
    let base = tempfile::tempdir().unwrap();
    let before = Model::new(vec![1; 130]);
    let mut after = before.clone();
    after.pages[10..20].fill(0);
    after.pages[20..30].fill(2);
    let parent = before.write_full(dir(base.path(), "p"));
    let child = after.write_diff(&before, &parent, dir(base.path(), "c"));
    let chain = Chain::open(&child.location).unwrap();
    let runs: Vec<_> = chain.resolve().unwrap().iter().map(|run| (run.extent.pages, run.content)).collect();
    let from = |layer, page: u64| Content::Bytes(PageSource::layer(layer, page * PAGE_SIZE));
    let expected = [(10, from(0, 0)), (10, Content::Zero), (10, from(1, 20)), (70, from(0, 30)), (30, from(0, 100))];
    assert_eq!(runs, expected);
}

#[test]
fn held_zero_page_does_not_change_the_digest_and_is_dropped_by_merge() {
    let base = tempfile::tempdir().unwrap();
    let layout = small_layout();
    let write = |name: &str, bytes: &[u8]| {
        let target = dir(base.path(), name);
        let mut writer = SnapshotWriter::create(target.clone(), layout.clone(), SnapshotKind::Full, None).unwrap();
        writer.write_run(Gfn(4), bytes).unwrap();
        writer.seal(seal_input()).unwrap();
        Chain::open(&target).unwrap()
    };
    let lean = write("lean", &[1; PAGE]);
    let fat = write("fat", &[[1; PAGE], [0; PAGE]].concat());
    assert_eq!(page_digest(&lean).unwrap(), page_digest(&fat).unwrap());
    assert_eq!(merge(&fat, two_files(base.path(), "merged"), &NoCache, &mut |_, _| {}).unwrap().pages_held, 1);
}

#[test]
fn directories_moved_together_still_open() {
    let base = tempfile::tempdir().unwrap();
    fs::create_dir_all(base.path().join("old/deep")).unwrap();
    let before = sample();
    let mut after = sample();
    after.pages[3] ^= 1;
    let parent = before.write_full(dir(&base.path().join("old"), "p"));
    let child = after.write_diff(&before, &parent, dir(&base.path().join("old/deep"), "c"));
    let manifest = Snapshot::open(&child.location).unwrap().manifest().clone();
    assert_eq!(manifest.parent.unwrap().location, Location::Dir("../../p".into()));
    fs::rename(base.path().join("old"), base.path().join("new")).unwrap();
    let chain = Chain::open(&dir(base.path(), "new/deep/c")).unwrap();
    after.assert_is(&chain);

    // Moved apart, they are a chain only if the caller names the directories.
    fs::rename(base.path().join("new/deep/c"), base.path().join("c")).unwrap();
    assert!(matches!(Chain::open(&dir(base.path(), "c")), Err(Error::Parent { .. })));
    after.assert_is(&Chain::from_dirs(&[base.path().join("new/p"), base.path().join("c")]).unwrap());
}

#[test]
fn dropped_writer_leaves_nothing() {
    let base = tempfile::tempdir().unwrap();
    for target in [dir(base.path(), "a"), two_files(base.path(), "b")] {
        let mut writer = SnapshotWriter::create(target, small_layout(), SnapshotKind::Full, None).unwrap();
        writer.write_run(Gfn(0), &[1; PAGE]).unwrap();
        drop(writer);
    }
    assert!(names_in(base.path()).is_empty());
}

#[test]
fn abandoned_work_directories_are_swept_but_not_those_in_use() {
    let base = tempfile::tempdir().unwrap();
    let in_use = SnapshotWriter::create(dir(base.path(), "a"), small_layout(), SnapshotKind::Full, None).unwrap();
    let used = names_in(base.path());
    for name in [".a.partial-999999-0", ".ab.partial-999999-0", ".a.partial-mine", "a.partial-1-1"] {
        fs::create_dir(base.path().join(name)).unwrap();
        fs::write(base.path().join(name).join("memory"), "x").unwrap();
    }
    let other = SnapshotWriter::create(dir(base.path(), "a"), small_layout(), SnapshotKind::Full, None).unwrap();
    let names = names_in(base.path());
    assert!(!names.iter().any(|name| name.ends_with("partial-999999-0")));
    assert!(used.iter().all(|name| names.contains(name)));
    assert_eq!(names.len(), 4);
    drop((in_use, other));
}

#[test]
fn existing_directory_is_never_overwritten() {
    let base = tempfile::tempdir().unwrap();
    let model = sample();
    let late = SnapshotWriter::create(dir(base.path(), "a"), small_layout(), SnapshotKind::Full, None).unwrap();
    let first = model.write_full(dir(base.path(), "a"));
    let created = SnapshotWriter::create(dir(base.path(), "a"), small_layout(), SnapshotKind::Full, None);
    assert!(matches!(created, Err(Error::TargetExists { .. })));
    assert!(matches!(late.seal(seal_input()), Err(Error::TargetExists { .. })));
    assert_eq!(Snapshot::open(&first.location).unwrap().id(), first.id);
    assert_eq!(names_in(base.path()), ["a"]);

    // Not even an empty directory, which plain rename(2) would replace.
    let late = SnapshotWriter::create(dir(base.path(), "e"), small_layout(), SnapshotKind::Full, None).unwrap();
    fs::create_dir(base.path().join("e")).unwrap();
    assert!(matches!(late.seal(seal_input()), Err(Error::TargetExists { .. })));
}

#[test]
fn two_files_are_replaced_but_never_the_own_parent() {
    let base = tempfile::tempdir().unwrap();
    let target = two_files(base.path(), "a");
    let first = sample().write_full(target.clone());
    let mut changed = sample();
    changed.pages[0] = 77;
    let second = changed.write_full(target.clone());
    assert_ne!(first.id, second.id);
    changed.assert_is(&Chain::open(&target).unwrap());

    let parent = Parent { id: second.id, location: target.clone() };
    let created = SnapshotWriter::create(target.clone(), small_layout(), SnapshotKind::Diff, Some(parent));
    assert!(matches!(created, Err(Error::BadTarget { .. })));
    let merged = merge(&Chain::open(&target).unwrap(), target.clone(), &NoCache, &mut |_, _| {});
    assert!(matches!(merged, Err(Error::BadTarget { .. })));
    let same = Location::Files { snapshot: base.path().join("x"), memory: base.path().join("./x") };
    let created = SnapshotWriter::create(same, small_layout(), SnapshotKind::Full, None);
    assert!(matches!(created, Err(Error::BadTarget { .. })));
}

#[test]
fn later_passes_replace_pages_and_make_them_zero() {
    let base = tempfile::tempdir().unwrap();
    let parent = Model::new(vec![7; 130]).write_full(dir(base.path(), "p"));
    let history: Vec<Model> =
        [[1, 2, 0, 0, 5], [1, 3, 4, 0, 0], [0, 3, 0, 6, 8]].map(|five| Model::new(five.repeat(26))).into();
    for kind in [SnapshotKind::Full, SnapshotKind::Diff] {
        let told = Parent { id: parent.id, location: parent.location.clone() };
        let told = Some(told).filter(|_| kind == SnapshotKind::Diff);
        let target = dir(base.path(), &format!("{kind:?}"));
        let mut writer = SnapshotWriter::create(target.clone(), small_layout(), kind, told).unwrap();
        for (pass, model) in history.iter().enumerate() {
            for index in 0..model.pages.len() {
                if model.pages[index] == 0 {
                    writer.set_zero(Extent::new(model.gfn(index), 1)).unwrap();
                } else if pass == 0 || model.pages[index] != history[pass - 1].pages[index] {
                    writer.write_run(model.gfn(index), &model.page(index)).unwrap();
                }
            }
            writer.next_pass();
        }
        let sealed = writer.seal(seal_input()).unwrap();
        let last = &history[2];
        last.assert_is(&Chain::open(&target).unwrap());
        assert_eq!(sealed.pages_held, last.pages.iter().filter(|byte| **byte != 0).count() as u64, "{kind:?}");
    }
}

#[test]
fn writer_invalid_use_is_refused() {
    let base = tempfile::tempdir().unwrap();
    let parent = sample().write_full(dir(base.path(), "p"));
    let parent = Parent { id: parent.id, location: parent.location };
    let create = |kind, parent| SnapshotWriter::create(dir(base.path(), "a"), small_layout(), kind, parent);
    assert!(matches!(create(SnapshotKind::Diff, None), Err(Error::BadParentage { .. })));
    assert!(matches!(create(SnapshotKind::Full, Some(parent.clone())), Err(Error::BadParentage { .. })));
    let missing = SnapshotWriter::create(dir(base.path(), "no/a"), small_layout(), SnapshotKind::Full, None);
    assert!(matches!(missing, Err(Error::Io { .. })));

    let mut writer = create(SnapshotKind::Diff, Some(parent)).unwrap();
    let refused = |result: Result<()>| assert!(matches!(result, Err(Error::BadRun { .. })));
    refused(writer.write_run(Gfn(0), &[0; 100]));
    refused(writer.write_run(Gfn(0), &[]));
    refused(writer.write_run(Gfn(99), &[0; 2 * PAGE]));
    refused(writer.write_run(Gfn(u64::MAX), &[0; PAGE]));
    writer.write_run(Gfn(5), &[1; PAGE]).unwrap();
    refused(writer.write_run(Gfn(5), &[1; PAGE]));
    refused(writer.mark_zero(Extent::new(Gfn(4), 2)));
    refused(writer.mark_zero(Extent::new(Gfn(0), u64::MAX)));
    writer.mark_zero(Extent::new(Gfn(7), 2)).unwrap();
    refused(writer.write_run(Gfn(8), &[1; PAGE]));
    let mut input = seal_input();
    input.state.push(Section { kind: SectionKind::PagesHeld, instance: 0, version: 1, payload: vec![] });
    assert!(matches!(writer.seal(input), Err(Error::BadSection { kind: 32, .. })));
    assert_eq!(names_in(base.path()), ["p"]);
}
