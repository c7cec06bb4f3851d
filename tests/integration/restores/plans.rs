//! Any valid plan restores the snapshot: random plans through the real engine, and plans that must be refused.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tvmm::snapshot::{
    Background, BackgroundAction, Chain, Content, Extent, Fill, Gfn, ImageSpec, Location, PageSource, Placement,
    PlannedExtent, RestorePlan,
};
use tvmm::tiering::costs::Costs;
use tvmm::tiering::plan_file::PlanFile;
use tvmm::tiering::policy::{Budget, PolicyInput};
use tvmm::tiering::profile::Profile;

use crate::skip::skip;
use crate::support::cached::cached_as;
use crate::support::{Random, Vm, config, finish, rounds, run_err, run_ok, scratch, text, tvmm};

/// A plan with random cuts, placements, fills, an image in random order, and background work.
fn random_plan(chain: &Chain, random: &mut Random) -> RestorePlan {
    let mut plan = RestorePlan::new(chain.tip().id(), "random", Vec::new());
    plan.fault_pages = 1 << random.below(7);
    plan.verify = random.below(2) == 0;
    plan.direct = random.below(4) == 0;
    let mut packed: Vec<usize> = Vec::new();
    for run in chain.resolve().unwrap() {
        let mut at = run.extent.first.0;
        while at < run.extent.end().0 {
            let longest = [3, 40, 700][random.below(3) as usize];
            let pages = (1 + random.below(longest)).min(run.extent.end().0 - at);
            let extent = Extent { first: Gfn(at), pages };
            let Content::Bytes(source) = run.content else {
                plan.extents.push(PlannedExtent::zero(extent));
                at += pages;
                continue;
            };
            let source = PageSource { offset: source.offset + (at - run.extent.first.0) * 4096, ..source };
            let item = match random.below(8) {
                0 => PlannedExtent::from(extent, Placement::CowFile, source),
                1 => PlannedExtent::from(extent, Placement::InPlace, source),
                2 => PlannedExtent::from(extent, Placement::Lazy, source),
                3 => PlannedExtent::preload(extent, source, Fill::Copy),
                4 => PlannedExtent::preload(extent, source, Fill::BreakCow),
                other => {
                    packed.push(plan.extents.len());
                    // The offset follows when the order of the image is known.
                    let source = PageSource::image(0, 0);
                    match other {
                        5 => PlannedExtent::preload(extent, source, Fill::Install),
                        6 => PlannedExtent::preload(extent, source, Fill::Copy),
                        _ => PlannedExtent::from(extent, Placement::CowFile, source),
                    }
                }
            };
            plan.extents.push(item);
            at += pages;
        }
    }
    pack(&mut plan, packed, random);
    background(&mut plan, random);
    huge(&mut plan, random);
    plan
}

/// Some of the zero blocks come in huge pages.
fn huge(plan: &mut RestorePlan, random: &mut Random) {
    for item in plan.extents.iter().filter(|item| item.placement == Placement::Zero) {
        let first = item.extent.first.0.next_multiple_of(512);
        let end = item.extent.end().0 / 512 * 512;
        if first < end && random.below(2) == 0 {
            let skip = random.below((end - first) / 512) * 512;
            plan.huge.push(Extent { first: Gfn(first + skip), pages: end - first - skip });
        }
    }
}

fn pack(plan: &mut RestorePlan, mut packed: Vec<usize>, random: &mut Random) {
    let mut spec = ImageSpec::default();
    while !packed.is_empty() {
        let index = packed.swap_remove(random.below(packed.len() as u64) as usize);
        let offset = spec.file_len();
        spec.extents.push(plan.extents[index].extent);
        if let Some(source) = &mut plan.extents[index].source {
            source.offset = offset;
        }
    }
    if !spec.extents.is_empty() {
        plan.images.push(spec);
    }
}

fn background(plan: &mut RestorePlan, random: &mut Random) {
    for item in &plan.extents {
        let action = match (item.placement, random.below(3)) {
            (Placement::Lazy, 0) => BackgroundAction::Install,
            (Placement::CowFile | Placement::InPlace, 0) => BackgroundAction::BreakCow,
            (Placement::CowFile | Placement::InPlace, 1) => BackgroundAction::ReadAhead,
            _ => continue,
        };
        let skip = random.below(item.extent.pages);
        let extent = Extent { first: Gfn(item.extent.first.0 + skip), pages: item.extent.pages - skip };
        plan.background.push(Background { action, extent });
    }
    if random.below(2) == 0 {
        plan.background.reverse();
    }
}

fn save(chain: &Chain, plan: RestorePlan, path: &Path) {
    let resolved = chain.resolve().unwrap();
    let costs = Costs::default();
    let budget = Budget::default();
    let input = PolicyInput { chain, resolved: &resolved, tiers: &[], profile: None, costs: &costs, budget };
    let expected = input.estimate(&plan);
    PlanFile::new(plan, expected, chain).unwrap().save(path).unwrap();
}

/// A chain of two: 1,000 filled pages, then some of them changed and some gone. Its digest.
fn chain_of_two(dir: &Path) -> String {
    chain_of_two_with(dir, &config(1, 64))
}

fn chain_of_two_with(dir: &Path, config: &Value) -> String {
    let mut vm = Vm::boot(config);
    vm.call("fill pages=1000 seed=3");
    vm.snapshot(&dir.join("base"), &[]);
    vm.call("touch pages=300 write=50 seed=8");
    let digest = vm.call("check").digest;
    vm.snapshot(&dir.join("tip"), &["--diff"]);
    digest
}

#[test]
fn a_thousand_random_plans_restore_the_snapshot() {
    let dir = scratch();
    let digest = chain_of_two(dir.path());
    let tip = dir.path().join("tip");
    let chain = Chain::open(&Location::Dir(tip.clone())).unwrap();
    let plan_path = dir.path().join("random.plan");
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let report = dir.path().join("report.json");
    for round in 0..rounds(1000) {
        save(&chain, random_plan(&chain, &mut random), &plan_path);
        let args = ["restore", "--snapshot", text(&tip), "--plan", text(&plan_path), "--run", "check"];
        let answer = run_ok(&[&args[..], &["--report", text(&report)]].concat());
        assert_eq!(answer.split(' ').nth(2), Some(digest.as_str()), "plan {round}: {answer}");
        let report: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
        let expected = PlanFile::load(&plan_path).unwrap().expected;
        assert_eq!(report["restore"]["engine"]["mmap_calls"], expected.vmas, "plan {round}");
        // Images are as random as their plans: none is used twice.
        fs::remove_dir_all(tip.join("plan")).ok();
    }
}

/// Gives the filled pages back, by report, page numbers or hints: they must be zero, then and in a diff and its
/// restore.
fn give_back(mut vm: Vm, way: &str, zeros: &str, diff: &Path, what: &str) {
    vm.call("balloon op=status");
    if way == "hint" {
        vm.api_ok("PATCH", "/balloon/hinting/start", None);
    }
    vm.call(&format!("balloon op={way} filled=1"));
    assert_eq!(vm.call("check").digest, zeros, "{what}, {way}");
    vm.call("touch pages=200 write=100 seed=4");
    let digest = vm.call("check").digest;
    vm.snapshot(diff, &["--diff"]);
    assert_eq!(Vm::restore(diff, "eager").call("check").digest, digest, "{what}, {way}");
    fs::remove_dir_all(diff).unwrap();
}

#[test]
fn pages_given_back_are_zero_under_every_policy_and_random_plans() {
    let dir = scratch();
    let mut config = config(1, 64);
    config["balloon"] = serde_json::json!({
        "amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true, "free_page_hinting": true,
    });
    chain_of_two_with(dir.path(), &config);
    let tip = dir.path().join("tip");
    let profile = dir.path().join("p.profile");
    let diff = dir.path().join("diff");
    let zeros = {
        let mut vm = Vm::restore(&tip, "eager");
        vm.call("balloon op=report filled=1");
        vm.call("check").digest
    };
    let record = ["profile", "record", "--recorder", "uffd", "--run", "touch pages=600 write=40 seed=5"];
    run_ok(&[&record[..], &["--snapshot", text(&tip), "--out", text(&profile)]].concat());
    let mut ways = ["report", "inflate", "hint"].into_iter().cycle();
    for policy in tvmm::tiering::policy::Policy::ALL {
        let more: &[&str] = if policy.needs_profile() { &["--profile", text(&profile)] } else { &[] };
        let vm = Vm::restore_with(&tip, policy.name(), &[more, &["--track-dirty-pages"]].concat());
        give_back(vm, ways.next().unwrap(), &zeros, &diff, policy.name());
    }
    let chain = Chain::open(&Location::Dir(tip.clone())).unwrap();
    let plan_path = dir.path().join("random.plan");
    let mut random = Random(0x1234_5678_9abc_def1);
    for round in 0..rounds(60) {
        save(&chain, random_plan(&chain, &mut random), &plan_path);
        let args = ["restore", "--snapshot", text(&tip), "--plan", text(&plan_path), "--track-dirty-pages"];
        let vm = Vm::spawn(scratch(), &args);
        give_back(vm, ways.next().unwrap(), &zeros, &diff, &format!("plan {round}"));
        fs::remove_dir_all(tip.join("plan")).ok();
    }
}

/// Every second held page of `chain` copied out of an image, the others lazy.
fn alternating_plan(chain: &Chain) -> RestorePlan {
    let mut plan = RestorePlan::new(chain.tip().id(), "alternating", Vec::new());
    let mut spec = ImageSpec::default();
    for run in chain.resolve().unwrap() {
        let Content::Bytes(source) = run.content else {
            plan.extents.push(PlannedExtent::zero(run.extent));
            continue;
        };
        for (index, extent) in run.extent.chunks(1).enumerate() {
            let source = PageSource { offset: source.offset + index as u64 * 4096, ..source };
            if index % 2 == 0 {
                let packed = PageSource::image(0, spec.file_len());
                spec.extents.push(extent);
                plan.extents.push(PlannedExtent::preload(extent, packed, Fill::Copy));
            } else {
                plan.extents.push(PlannedExtent::from(extent, Placement::Lazy, source));
            }
        }
    }
    plan.images.push(spec);
    plan
}

#[test]
fn pages_of_one_image_are_copied_by_one_call_and_need_no_mappings_of_their_own() {
    let dir = scratch();
    let digest = chain_of_two(dir.path());
    let tip = dir.path().join("tip");
    let plan_path = dir.path().join("alternating.plan");
    let report = dir.path().join("report.json");
    let chain = Chain::open(&Location::Dir(tip.clone())).unwrap();
    let held = chain.resolve().unwrap().iter().filter(|run| run.content != Content::Zero).count() as u64;
    for direct in [false, true] {
        let mut plan = alternating_plan(&chain);
        plan.direct = direct;
        save(&chain, plan, &plan_path);
        let restore = ["restore", "--snapshot", text(&tip), "--plan", text(&plan_path), "--run", "check"];
        let answer = run_ok(&[&restore[..], &["--report", text(&report)]].concat());
        assert_eq!(answer.split(' ').nth(2), Some(digest.as_str()), "{answer}");
        let report: serde_json::Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
        let engine = &report["restore"]["engine"];
        let calls = |name: &str| engine[name].as_u64().unwrap();
        assert!(calls("extents") > 500 && calls("bytes_preloaded") > 400 * 4096, "{engine}");
        // At least one more if the file system cannot read past the cache.
        assert!(calls("read_calls") <= 2 && calls("mmap_calls") <= 2, "{engine}");
        assert!(calls("uffd_calls") <= held, "{engine}");
    }
}

fn is_tmpfs(path: &Path) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    rustix::fs::statfs(path).unwrap().f_type == TMPFS_MAGIC
}

#[test]
fn tiered_tells_how_the_memory_file_is_cached() {
    let dir = scratch();
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=8192 seed=3");
    let base = dir.path().join("base");
    let profile = dir.path().join("p.profile");
    let report = dir.path().join("r.json");
    vm.snapshot(&base, &[]);
    let function = "touch pages=2048";
    run_ok(&["profile", "record", "--snapshot", text(&base), "--run", function, "--out", text(&profile)]);
    let told = || {
        let tiered = ["restore", "--snapshot", text(&base), "--policy", "tiered", "--profile", text(&profile)];
        run_ok(&[&tiered[..], &["--run", function, "--report", text(&report)]].concat());
        let report: serde_json::Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
        report["restore"]["source_cache"].as_str().unwrap().to_string()
    };
    // Kernels before 6.7 do not tell tvmm (PAGEMAP_SCAN), which then takes it to be in huge folios.
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let numbers: Vec<u32> = release.split(['.', '-', '\n']).map_while(|word| word.parse().ok()).take(2).collect();
    if numbers < vec![6, 7] {
        assert_eq!(told(), "huge");
        return skip!("pagemap-scan", "the kernel {} has no PAGEMAP_SCAN", release.trim());
    }
    // On a file system that has no folios of 2 MiB it is small from the start.
    assert_eq!(told(), cached_as(&base.join("memory")));
    // The same bytes, written page by page.
    let path = base.join("memory");
    let bytes = fs::read(&path).unwrap();
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    fs::remove_file(&path).unwrap();
    let file = fs::File::create_new(&path).unwrap();
    for (index, page) in bytes.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|byte| *byte != 0)) {
        std::os::unix::fs::FileExt::write_all_at(&file, page, index as u64 * 4096).unwrap();
    }
    file.set_len(bytes.len() as u64).unwrap();
    file.set_modified(modified).unwrap();
    assert_eq!((told().as_str(), cached_as(&path)), ("small", "small"));
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    // A tmpfs keeps it.
    let now = cached_as(&path);
    assert_eq!((told().as_str(), now == "cold"), (now, !is_tmpfs(&path)));
}

#[test]
fn a_plan_for_another_snapshot_or_of_a_changed_one_is_refused() {
    let dir = scratch();
    chain_of_two(dir.path());
    let base = dir.path().join("base");
    let tip = dir.path().join("tip");
    let plan = dir.path().join("a.plan");
    run_ok(&["plan", "--snapshot", text(&base), "--policy", "trenv", "--out", text(&plan)]);
    let said = run_err(&["restore", "--snapshot", text(&tip), "--plan", text(&plan), "--run", "check"]);
    assert!(said.contains("plan") && said.contains("snapshot"), "{said}");
    run_ok(&["restore", "--snapshot", text(&base), "--plan", text(&plan), "--run", "hello"]);
    // Same bytes, another time of change: the file may have been written.
    let memory = fs::File::options().write(true).open(base.join("memory")).unwrap();
    memory.set_modified(std::time::SystemTime::now()).unwrap();
    let said = run_err(&["restore", "--snapshot", text(&base), "--plan", text(&plan), "--run", "hello"]);
    assert!(said.contains("changed"), "{said}");
}

#[test]
fn a_damaged_plan_is_refused_wherever_it_is_damaged() {
    let dir = scratch();
    chain_of_two(dir.path());
    let tip = dir.path().join("tip");
    let plan = dir.path().join("a.plan");
    run_ok(&["plan", "--snapshot", text(&tip), "--policy", "trenv", "--out", text(&plan)]);
    let good = fs::read(&plan).unwrap();
    for at in (0..good.len()).step_by(good.len() / 40 + 1) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(&plan, &bad).unwrap();
        run_err(&["restore", "--snapshot", text(&tip), "--plan", text(&plan), "--run", "hello"]);
        fs::write(&plan, &good[..at]).unwrap();
        run_err(&["restore", "--snapshot", text(&tip), "--plan", text(&plan), "--run", "hello"]);
    }
}

#[test]
fn every_policy_restores_and_a_budget_too_small_is_told_the_least_that_works() {
    let dir = scratch();
    let digest = chain_of_two(dir.path());
    let tip = dir.path().join("tip");
    let profile = dir.path().join("p.profile");
    let record = ["profile", "record", "--recorder", "uffd", "--run", "touch pages=600 write=40 seed=5"];
    run_ok(&[&record[..], &["--snapshot", text(&tip), "--out", text(&profile)]].concat());
    for policy in tvmm::tiering::policy::Policy::ALL {
        // Twice: the plan is made, then found beside the snapshot.
        for _ in 0..2 {
            let mut args = vec!["restore", "--snapshot", text(&tip), "--policy", policy.name(), "--run", "check"];
            if policy.needs_profile() {
                args.extend(["--profile", text(&profile)]);
            }
            let answer = run_ok(&args);
            assert_eq!(answer.split(' ').nth(2), Some(digest.as_str()), "{policy}: {answer}");
        }
    }
    let tiered = ["restore", "--snapshot", text(&tip), "--policy", "tiered", "--profile", text(&profile)];
    let said = run_err(&[&tiered[..], &["--dram", "0", "--run", "check"]].concat());
    assert!(said.contains("at least") || said.contains("least"), "{said}");
    run_ok(&[&tiered[..], &["--dram", "4", "--run", "check"]].concat());
    let said = run_err(&["restore", "--snapshot", text(&tip), "--policy", "reap", "--run", "check"]);
    assert!(said.contains("profile record"), "{said}");
}

#[test]
fn a_source_that_fails_under_a_lazy_guest_ends_it_with_the_page() {
    let dir = scratch();
    chain_of_two(dir.path());
    let base = dir.path().join("base");
    let mut vm = Vm::restore(&base, "firecracker-uffd");
    vm.call("hello");
    // Pages that the guest has not touched yet can no longer be read.
    fs::File::options().write(true).open(base.join("memory")).unwrap().set_len(4096).unwrap();
    vm.begin("check");
    let (status, stderr) = vm.wait();
    assert_eq!(status.code(), Some(3));
    assert!(stderr.contains("Cannot read guest memory at guest-physical"), "{stderr}");
}

/// The pages of a placement in a fit: all, read, written, unclassified, untouched.
fn row(fit: &Value, placement: &str) -> [u64; 5] {
    ["pages", "read", "written", "unclassified", "untouched"].map(|key| fit[placement][key].as_u64().unwrap())
}

#[test]
fn plan_held_against_another_run_tells_what_it_brought_for_nothing_and_what_it_left() {
    let dir = scratch();
    chain_of_two(dir.path());
    let tip = dir.path().join("tip");
    let [planned_for, run] = ["touch pages=600 write=40 seed=5", "touch pages=500 write=20 seed=6"];
    let [p, q] = [("p.profile", planned_for), ("q.profile", run)].map(|(name, function)| {
        let path = dir.path().join(name);
        run_ok(&["profile", "record", "--run", function, "--snapshot", text(&tip), "--out", text(&path)]);
        path
    });
    let [expected, actual] = [&p, &q].map(|path| Profile::load(path).unwrap());
    let of = ["--snapshot", text(&tip), "--policy", "reap", "--profile", text(&p)];
    let json = run_ok(&[&["plan", "--json", "--against", text(&q)], &of[..]].concat());
    let plan: Value = serde_json::from_str(&json).unwrap();
    let own = row(&plan["fit_expected"], "preload");
    assert_eq!(own, [own[0], own[1], own[2], 0, 0], "reap brings what its profile touches");
    let fit = &plan["fit_against"];
    let all: u64 = ["preload", "in_place", "cow_file", "lazy", "zero"].iter().map(|name| row(fit, name)[0]).sum();
    assert_eq!(all, (64 << 20) / 4096);
    let wasted = expected.working_set().difference(&actual.working_set()).len();
    assert!(wasted > 100, "the runs differ");
    assert_eq!(row(fit, "preload")[4], wasted);
    assert_eq!(
        row(fit, "lazy")[1..4].iter().sum::<u64>(),
        actual.working_set().difference(&expected.working_set()).len()
    );

    // The same from the restore itself; and the faults it counts are the pages the plan left and this run touched.
    let report = dir.path().join("report.json");
    let args = ["--run", run, "--report", text(&report), "--against", text(&q)];
    run_ok(&[&["restore"], &of[..], &args].concat());
    let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    assert_eq!(report["restore"]["fit_against"], *fit);
    assert_eq!(report["restore"]["fit_expected"], plan["fit_expected"]);
    let served = &report["fault_ins"]["served"];
    let served = served["read"].as_u64().unwrap() + served["write"].as_u64().unwrap();
    let left: u64 = row(fit, "lazy")[1..4].iter().sum();
    println!("{served} faults served, {left} pages left; {wasted} brought for nothing");
    assert!(served.abs_diff(left) <= 8, "{served} faults served, {left} pages left");
    // In a table too, and only with a profile of this snapshot.
    let shown = run_ok(&[&["plan", "--against", text(&q)], &of[..]].concat());
    assert!(shown.contains("untouched") && shown.contains(run), "{shown}");
    let base = dir.path().join("base");
    let said = run_err(&["plan", "--snapshot", text(&base), "--policy", "trenv", "--against", text(&q)]);
    assert!(said.contains("recorded on snapshot"), "{said}");
}

#[test]
fn report_and_plan_say_by_which_costs_a_plan_was_made() {
    let dir = scratch();
    chain_of_two(dir.path());
    let tip = dir.path().join("tip");
    let profile = dir.path().join("p.profile");
    let touch = "touch pages=600 write=40 seed=5";
    run_ok(&["profile", "record", "--run", touch, "--snapshot", text(&tip), "--out", text(&profile)]);
    let costs = dir.path().join("costs.json");
    let mut measured = Costs::default();
    measured.set_measured("vma_ns", 5000);
    measured.save(&costs).unwrap();
    let reported = |more: &[&str]| {
        let path = dir.path().join("report.json");
        let args = ["restore", "--snapshot", text(&tip), "--run", "hello", "--report", text(&path)];
        // A home without measurements.
        let output = finish(tvmm().args(args).args(more).env("XDG_CACHE_HOME", dir.path().join("none")));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap()["restore"].clone()
    };
    let tiered = ["--policy", "tiered", "--profile", text(&profile)];
    for origin in ["made", "cache"] {
        let restore = reported(&[&tiered[..], &["--costs", text(&costs)]].concat());
        assert_eq!(restore["plan"], origin);
        assert_eq!(restore["costs"]["file"], text(&costs));
        assert!(restore["costs"]["source"].as_str().unwrap().starts_with("1 of "), "{restore:#}");
        assert!(restore["costs"]["written"].as_i64().unwrap() > 1_700_000_000);
    }
    let restore = reported(&tiered);
    assert_eq!((&restore["costs"]["source"], &restore["costs"]["file"]), (&"built-in".into(), &Value::Null));
    assert_eq!(reported(&["--policy", "trenv"])["costs"], Value::Null, "a policy that weighs nothing");
}
