//! `tvmm plan` shows what `tvmm restore` carries out: every policy, from files (cached or not), pools and cold pools.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;
use tvmm::snapshot::{JsonPlan, RestorePlan};
use tvmm::sys::page_cache::resident_pages;
use tvmm::tiering::plan_file::PlanFile;
use tvmm::tiering::policy::Policy;

use crate::support::pool::Pool;
use crate::support::{Vm, config, run_ok, scratch, text};

const FUNCTION: &str = "touch pages=700 write=20 seed=5";

/// A chain of two snapshots, and a profile of the newer one.
struct Scene {
    dir: TempDir,
    tip: PathBuf,
    profile: PathBuf,
    digest: String,
}

impl Scene {
    fn make() -> Scene {
        let dir = scratch();
        let tip = dir.path().join("tip");
        let profile = dir.path().join("p.profile");
        let mut vm = Vm::boot(&config(1, 64));
        vm.call("fill pages=5000 seed=3");
        vm.snapshot(&dir.path().join("base"), &["--verify"]);
        vm.call("touch pages=300 write=50 seed=8");
        let digest = vm.call("check").digest;
        vm.snapshot(&tip, &["--diff", "--verify"]);
        drop(vm);
        run_ok(&["profile", "record", "--snapshot", text(&tip), "--run", FUNCTION, "--out", text(&profile)]);
        Scene { dir, tip, profile, digest }
    }

    /// Drops the memory files of both layers from the page cache. Returns whether nothing of them is left there.
    fn evict(&self) -> bool {
        let evicted = ["base", "tip"].map(|name| {
            let file = fs::File::open(self.dir.path().join(name).join("memory")).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            resident_pages(&file).unwrap() == Some(0)
        });
        evicted == [true; 2]
    }

    fn args<'a>(&'a self, command: &'a str, policy: Policy, from: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec![command, "--snapshot", text(&self.tip), "--policy", policy.name()];
        if policy.needs_profile() {
            args.extend(["--profile", text(&self.profile)]);
        }
        args.extend(from);
        args
    }

    /// The plan that `tvmm plan` writes, after it was compared with what the command shows.
    fn planned(&self, policy: Policy, from: &[&str]) -> (PathBuf, PlanFile) {
        let path = self.dir.path().join("shown.plan");
        let args = [&self.args("plan", policy, from)[..], &["--json", "--out", text(&path)]].concat();
        let printed = run_ok(&args);
        fs::write(path.with_extension("json"), &printed).unwrap();
        let shown: Value = serde_json::from_str(&printed).unwrap();
        let file = PlanFile::load(&path).unwrap();
        assert_eq!(shown["plan"], serde_json::to_value(JsonPlan::from(file.plan.clone())).unwrap(), "{policy}");
        assert_eq!(shown["expected"]["vmas"], file.expected.vmas, "{policy}");
        (path, file)
    }

    /// The `restore` of the report of a restore that checks the guest's memory.
    fn restored(&self, args: &[&str]) -> Value {
        let report = self.dir.path().join("report.json");
        let answer = run_ok(&[args, &["--run", "check", "--report", text(&report)]].concat());
        assert_eq!(answer.split(' ').nth(2), Some(self.digest.as_str()), "{answer}");
        serde_json::from_slice::<Value>(&fs::read(&report).unwrap()).unwrap()["restore"].clone()
    }

    /// The only plan that restores by `policy` have kept, if any. It is removed.
    fn kept(&self, policy: Policy) -> Option<RestorePlan> {
        let entries = fs::read_dir(self.tip.join("plan")).ok()?.map(|entry| entry.unwrap().path());
        let is_kept = |path: &PathBuf| path.extension().is_some_and(|found| found == "plan");
        let plans: Vec<PathBuf> = entries.filter(is_kept).collect();
        assert!(plans.len() <= 1, "{policy}: {plans:?}");
        let plan = plans.first().map(|path| PlanFile::load(path).unwrap().plan);
        plans.iter().for_each(|path| fs::remove_file(path).unwrap());
        plan
    }
}

/// Checks the report of a restore: it carried out the plan that was shown.
fn assert_carried_out(restored: &Value, shown: &PlanFile, what: &str) {
    let engine = &restored["engine"];
    assert_eq!(restored["policy"], shown.plan.policy.as_str(), "{what}");
    assert_eq!(engine["planned"], json!(shown.plan.counts()), "{what}");
    assert_eq!(engine["extents"], json!(shown.plan.extents.len()), "{what}");
    assert_eq!(engine["mmap_calls"], shown.expected.vmas, "{what}");
}

/// Plans and restores by every policy, and once more by the plan's file. Returns the plan of `tiered`.
fn compare(scene: &Scene, from: &[&str], what: &str, prepare: impl Fn()) -> PlanFile {
    let mut of_tiered = None;
    for policy in Policy::ALL {
        let what = format!("{policy}, {what}");
        prepare();
        let (path, shown) = scene.planned(policy, from);
        prepare();
        let restored = scene.restored(&scene.args("restore", policy, from));
        assert_carried_out(&restored, &shown, &what);
        let kept = scene.kept(policy);
        assert_eq!(kept.is_some(), policy.needs_profile(), "{what}");
        // A kept plan, and how it fits its profile, are those before it is lowered to a cold pool.
        if let Some(kept) = kept.filter(|_| !from.contains(&"--cold")) {
            assert_eq!(kept, shown.plan, "{what}");
            assert_eq!(restored["fit_expected"], json!(shown.fit), "{what}");
        }
        for plan in [&path, &path.with_extension("json")] {
            let by_plan = ["restore", "--snapshot", text(&scene.tip), "--plan", text(plan)];
            let restored = scene.restored(&[&by_plan[..], from].concat());
            assert_carried_out(&restored, &shown, &format!("{what}, by {}", plan.display()));
        }
        if policy == Policy::Tiered {
            assert_eq!(restored["source_cache"], shown.costs.as_ref().unwrap().cache.as_str(), "{what}");
            of_tiered = Some(shown);
        }
    }
    of_tiered.unwrap()
}

#[test]
fn plan_shows_what_a_restore_from_files_carries_out() {
    let scene = Scene::make();
    // Read, and so cached, by whatever ran before.
    scene.restored(&scene.args("restore", Policy::Eager, &[]));
    let cached = compare(&scene, &[], "cached files", || ());
    let can_evict = scene.evict();
    let evict = || {
        scene.evict();
    };
    let evicted = compare(&scene, &[], "evicted files", evict);
    let cache = |file: &PlanFile| file.costs.as_ref().unwrap().cache.clone();
    assert_ne!(cache(&cached), "cold");
    // Not on a tmpfs.
    if can_evict {
        assert_eq!(cache(&evicted), "cold");
        assert_ne!(evicted.plan, cached.plan, "the test would not notice a plan that looks at no page cache");
    }
}

#[test]
fn plan_shows_what_a_restore_from_a_pool_carries_out() {
    let scene = Scene::make();
    let pool = Pool::create("0.25");
    pool.add(&scene.tip);
    compare(&scene, &["--pool", pool.path()], "a pool", || ());
}

#[test]
fn plan_shows_what_a_restore_from_a_cold_pool_carries_out() {
    let scene = Scene::make();
    let cold = scene.dir.path().join("cold");
    run_ok(&["pool", "create", "--tier", "remote", "--at", text(&cold)]);
    run_ok(&["pool", "add", text(&cold), text(&scene.tip)]);
    let file = compare(&scene, &["--cold", text(&cold)], "a cold pool", || ());
    assert_eq!(file.costs.unwrap().cache, "cold");
    assert!(file.plan.counts().lazy + file.plan.counts().preload >= 5000, "{:?}", file.plan.counts());
}

#[test]
fn plan_for_another_cache_state_differs_where_the_policy_weighs_costs_only() {
    let scene = Scene::make();
    let planned = |policy, cache| scene.planned(policy, &["--cache", cache]).1.plan;
    for policy in Policy::ALL {
        let plans = ["huge", "small", "cold"].map(|cache| planned(policy, cache));
        let is_same = plans.iter().all(|plan| *plan == plans[0]);
        assert_eq!(is_same, !policy.weighs_costs(), "{policy}");
    }
}
