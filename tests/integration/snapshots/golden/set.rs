//! A golden set: one artefact of every format that tvmm writes, made in one go. `tests/golden/README.md` lists them.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tvmm::snapshot::{Chain, Location, Placement};
use tvmm::tiering::costs::Costs;
use tvmm::tiering::plan_file::PlanFile;

use super::host::{Feature, Host};
use super::{expand, facts, golden, pack, packed, unpack, written};
use crate::devices::vsock;
use crate::support::network::{Network, with_network};
use crate::support::{Vm, config, run_ok, scratch, text};

/// In the order in which they were taken; `merged` is `full` and `diff` in one, `child` is a diff over `diff`.
const SNAPSHOTS: [&str; 4] = ["full", "diff", "merged", "child"];
/// The feature of the CPU that the guest of `set1` is known to have seen: AVX2.
const SEEN: Feature = Feature { leaf: 7, subleaf: 0, register: "ebx", bits: 1 << 5 };
const TAP: &str = "tap0";
const POOL_LEN: &str = "0.02";

fn set() -> PathBuf {
    golden().join("set1")
}

/// Everything of the set, as it was, in `to`; and what was true of it.
fn expand_set(to: &Path) -> Value {
    for name in SNAPSHOTS {
        expand(&set().join(name), &to.join(name));
    }
    let expected: Value = serde_json::from_slice(&fs::read(set().join("expected.json")).unwrap()).unwrap();
    fs::create_dir(to.join("pool")).unwrap();
    let len = expected["pool"]["len"].as_u64().unwrap();
    unpack(&packed(&set().join("pool.packed")), len, &to.join("pool/pool.tvmm"));
    copy_dir(&set().join("cold"), &to.join("cold"));
    expected
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The sections of a snapshot's state: kind, instance, version.
fn sections(snapshot: &Path) -> Vec<Value> {
    let told = super::inspect(snapshot);
    let sections = told["sections"].as_array().unwrap().iter();
    sections.map(|section| json!([section["kind"], section["instance"], section["version"]])).collect()
}

/// The facts that a plan must keep: pages by placement, and what it is for.
fn plan_facts(path: &Path) -> Value {
    let plan = PlanFile::load(path).unwrap().plan;
    let pages = |placement| {
        let of_it = plan.extents.iter().filter(|planned| planned.placement == placement);
        of_it.map(|planned| planned.extent.pages).sum::<u64>()
    };
    let placed = Placement::ALL.map(|placement| json!([serde_json::to_value(placement).unwrap(), pages(placement)]));
    json!({ "snapshot": plan.snapshot.to_string(), "policy": plan.policy, "placed": placed })
}

fn shown_profile(path: &Path) -> Value {
    serde_json::from_str(&run_ok(&["profile", "show", text(path), "--json"])).unwrap()
}

/// Checks that `actual` has every field of `expected`; later versions may say more.
fn assert_holds(expected: &Value, actual: &Value, what: &str) {
    match expected {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| assert_holds(value, &actual[name], &format!("{what}.{name}")));
        }
        other => assert_eq!(other, actual, "{what}"),
    }
}

#[test]
fn golden_snapshots_with_every_device_a_diff_over_a_diff_and_a_merged_one_are_read_as_they_were_written() {
    let dir = scratch();
    let expected = expand_set(dir.path());
    for name in SNAPSHOTS {
        let snapshot = dir.path().join(name);
        assert_eq!(facts(&snapshot), expected[name]["facts"], "{name}");
        assert_eq!(json!(sections(&snapshot)), expected[name]["sections"], "{name}");
    }
    // Balloon, drive, entropy, network interface, pmem and vsock.
    let sections = sections(&dir.path().join("full"));
    assert_eq!(sections.iter().filter(|section| section[0] == "Virtio").count(), 6, "{sections:?}");
    // The merged one stands for the diff that it has the memory of.
    fs::remove_dir_all(dir.path().join("diff")).unwrap();
    fs::rename(dir.path().join("merged"), dir.path().join("diff")).unwrap();
    let child = facts(&dir.path().join("child"));
    assert_eq!(child["content_digest"], expected["child"]["facts"]["content_digest"]);
    assert_eq!(child["layers"], 2);
    let again = dir.path().join("again");
    run_ok(&["snapshot", "merge", text(&dir.path().join("child")), "--out", text(&again)]);
    assert_eq!(facts(&again)["content_digest"], expected["child"]["facts"]["content_digest"]);
}

#[test]
fn golden_profile_plan_and_costs_are_read_as_they_were_written_and_plans_are_made_of_them() {
    let dir = scratch();
    let expected = expand_set(dir.path());
    let full = dir.path().join("full");
    let [profile, plan, costs] = ["profile", "plan", "costs.json"].map(|name| set().join(name));
    assert_holds(&expected["profile"], &shown_profile(&profile), "profile");
    let told = Costs::load(&costs).unwrap();
    assert_eq!(told.measured, ["anon_write_fault_ns", "file_read_fault_ns"]);
    for (name, ns) in expected["costs"].as_object().unwrap() {
        let now = told.fields().find(|(field, _)| field == name);
        assert_eq!(now.map(|(_, ns)| ns), ns.as_u64(), "{name}");
    }
    assert_eq!(plan_facts(&plan), expected["plan"]);
    let chain = Chain::open(&Location::Dir(full.clone())).unwrap();
    let loaded = PlanFile::load(&plan).unwrap();
    loaded.check_for(&chain, &[], &plan).unwrap();
    let saved = dir.path().join("saved");
    loaded.save(&saved).unwrap();
    assert!(fs::read(&saved).unwrap() == fs::read(&plan).unwrap(), "a golden plan is written as it was");
    let made = dir.path().join("made");
    make_plan(&full, &profile, &costs, &made);
    assert_eq!(plan_facts(&made)["snapshot"], expected["plan"]["snapshot"]);
    for name in ["merged", "child"] {
        let snapshot = dir.path().join(name);
        run_ok(&["plan", "--snapshot", text(&snapshot), "--policy", "eager", "--out", text(&dir.path().join("p"))]);
    }
}

#[test]
fn golden_pools_have_what_was_put_into_them() {
    let dir = scratch();
    let expected = expand_set(dir.path());
    for name in ["pool", "cold"] {
        let pool = dir.path().join(name);
        run_ok(&["pool", "fsck", text(&pool)]);
        let listed = run_ok(&["pool", "ls", text(&pool)]);
        let id = expected["full"]["facts"]["id"].as_str().unwrap();
        assert!(listed.lines().any(|line| line.contains(&id[..16])), "{name}: {listed}");
    }
    let shown: Value =
        serde_json::from_str(&run_ok(&["pool", "show", text(&dir.path().join("pool")), "--json"])).unwrap();
    assert_holds(&expected["pool"]["shown"], &shown, "pool");
}

#[test]
fn golden_set_restores_where_the_host_allows_and_is_refused_elsewhere_with_what_it_lacks() {
    with_network(|network| {
        let dir = scratch();
        let expected = expand_set(dir.path());
        network.tap(TAP);
        images(dir.path());
        let own = Own::of(dir.path());
        let restores = |name: &str, more: &[&str]| {
            let snapshot = dir.path().join(name);
            let args = [&["--snapshot", text(&snapshot)][..], &own.args(), more].concat();
            Host::of(&snapshot, SEEN).restores_or_refuses(&args, expected[name]["check"].as_str().unwrap());
        };
        for name in SNAPSHOTS {
            restores(name, &["--policy", "eager"]);
            restores(name, &["--policy", "firecracker"]);
        }
        restores("full", &["--plan", text(&set().join("plan"))]);
        restores("full", &["--policy", "reap", "--profile", text(&set().join("profile"))]);
        restores("full", &["--policy", "trenv", "--pool", text(&dir.path().join("pool"))]);
        fs::remove_file(dir.path().join("full/memory")).unwrap();
        restores("full", &["--policy", "firecracker-uffd", "--cold", text(&dir.path().join("cold"))]);
        let snapshot = dir.path().join("merged");
        if !Host::of(&snapshot, SEEN).must_refuse() {
            devices_answer(&mut Vm::restore_with(&snapshot, "eager", &own.args()));
        }
    });
}

/// The disk, image, tap and socket of a restored VM, in place of those that the golden one had.
struct Own([String; 8]);

impl Own {
    fn of(dir: &Path) -> Own {
        let path = |name: &str| text(&dir.join(name)).to_string();
        let [disk, image] = [("disk", path("disk")), ("p0", path("image"))].map(|(id, path)| format!("{id}={path}"));
        let words = ["--drive", &disk, "--drive", &image, "--net", &format!("eth0={TAP}"), "--vsock", &path("v")];
        Own(words.map(str::to_string))
    }

    fn args(&self) -> [&str; 8] {
        self.0.each_ref().map(String::as_str)
    }
}

/// The files of the VM's disk and of its pmem.
fn images(dir: &Path) {
    for (name, len) in [("disk", 1 << 20), ("image", 2 << 20)] {
        let file = fs::File::create(dir.join(name)).unwrap();
        file.set_len(len).unwrap();
        file.set_modified(written()).unwrap();
    }
}

/// A machine with every device.
fn machine(dir: &Path) -> Value {
    let mut config = config(1, 8);
    config["boot-source"] = json!({ "boot_args": "init_on_free=1" });
    config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true });
    config["drives"] = json!([{
        "drive_id": "disk", "path_on_host": dir.join("disk"), "is_root_device": false, "cache_type": "Writeback",
    }]);
    config["entropy"] = json!({});
    config["network-interfaces"] =
        json!([{ "iface_id": "eth0", "host_dev_name": TAP, "guest_mac": "06:00:ac:10:00:02" }]);
    config["pmem"] = json!([{ "id": "p0", "path_on_host": dir.join("image"), "read_only": true }]);
    config["vsock"] = json!({ "guest_cid": 3, "uds_path": dir.join("v") });
    config
}

/// Has the guest use each of its devices.
fn devices_answer(vm: &mut Vm) {
    assert_eq!(vm.call("blk op=read sectors=8 chunk=8").number("failed"), 0);
    assert_eq!(vm.call("balloon op=status").number("held"), 0);
    assert_eq!(vm.call("net_info").value("mac"), "06:00:ac:10:00:02");
    assert_eq!(vm.call("pmem").number("size"), 2 << 20);
    vm.call("rng bytes=64");
    let config = vm.api_ok("GET", "/vm/config", None);
    let socket = PathBuf::from(config["vsock"]["uds_path"].as_str().unwrap());
    let id = vm.begin("vsock_serve port=52 lines=1 closed=1");
    assert!(vsock::ask(&vsock::connect(&socket, 52), "run a hello").starts_with("ok a "));
    vm.finish(&id);
}

fn make_plan(snapshot: &Path, profile: &Path, costs: &Path, out: &Path) {
    let from = ["--profile", text(profile), "--costs", text(costs), "--cache", "huge"];
    run_ok(&[&["plan", "--snapshot", text(snapshot), "--policy", "tiered", "--out", text(out)], &from[..]].concat());
}

/// Makes a set as `set1` was made. Refuses to touch what exists.
#[test]
#[ignore = "makes a new golden set: set TVMM_GOLDEN to its name"]
fn make_golden_set() {
    let target = golden().join(std::env::var("TVMM_GOLDEN").expect("TVMM_GOLDEN is the name of the new set"));
    fs::create_dir(&target).expect("the set is new");
    with_network(move |network| {
        let dir = scratch();
        let mut expected = make_snapshots(network, dir.path(), &target);
        make_derived(dir.path(), &target, &mut expected);
        fs::write(target.join("expected.json"), format!("{expected:#}\n")).unwrap();
    });
}

fn make_snapshots(network: &Network, dir: &Path, target: &Path) -> Value {
    let mut expected = json!({});
    network.tap(TAP);
    images(dir);
    let mut vm = Vm::boot(&machine(dir));
    devices_answer(&mut vm);
    vm.call("fill pages=8 seed=1");
    for name in ["full", "diff", "child"] {
        match name {
            "diff" => drop((vm.call("free filled=1"), vm.call("fill pages=4 seed=2"))),
            "child" => drop(vm.call("touch pages=4 write=50 seed=3")),
            _ => {}
        }
        expected[name] = json!({ "check": vm.call("check").digest });
        vm.snapshot(&dir.join(name), if name == "full" { &[] } else { &["--diff"] });
    }
    // A VM that is killed leaves its socket behind.
    drop(vm);
    fs::remove_file(dir.join("v")).unwrap();
    run_ok(&["snapshot", "merge", text(&dir.join("diff")), "--out", text(&dir.join("merged"))]);
    expected["merged"] = json!({ "check": expected["diff"]["check"] });
    for name in SNAPSHOTS {
        let from = dir.join(name);
        let to = target.join(name);
        expected[name]["facts"] = facts(&from);
        expected[name]["sections"] = json!(sections(&from));
        fs::create_dir(&to).unwrap();
        for file in ["manifest.json", "vmstate", "pages"] {
            fs::copy(from.join(file), to.join(file)).unwrap();
        }
        write_packed(&to.join("memory.packed.zst"), &fs::read(from.join("memory")).unwrap());
        fs::File::options().write(true).open(from.join("memory")).unwrap().set_modified(written()).unwrap();
    }
    expected
}

fn write_packed(path: &Path, bytes: &[u8]) {
    fs::write(path, zstd::encode_all(pack(bytes).as_slice(), 19).unwrap()).unwrap();
}

/// Pools, profile, plan and costs of the full snapshot.
fn make_derived(dir: &Path, target: &Path, expected: &mut Value) {
    let full = dir.join("full");
    // The plan names the file of the costs, so nothing is made in the tree itself.
    const FILES: [&str; 3] = ["profile", "plan", "costs.json"];
    let [profile, plan, costs] = FILES.map(|name| dir.join(name));
    let record = ["profile", "record", "--snapshot", text(&full), "--run", "touch pages=4 write=50 seed=3"];
    run_ok(&[&record[..], &["--out", text(&profile)]].concat());
    expected["profile"] = shown_profile(&profile);
    let mut measured = Costs::default();
    measured.set_measured("anon_write_fault_ns", 6_543);
    measured.set_measured("file_read_fault_ns", 4_321);
    measured.save(&costs).unwrap();
    expected["costs"] = measured.fields().map(|(name, ns)| (name.to_string(), json!(ns))).collect();
    make_plan(&full, &profile, &costs, &plan);
    expected["plan"] = plan_facts(&plan);
    for name in FILES {
        fs::copy(dir.join(name), target.join(name)).unwrap();
    }
    let pool = dir.join("pool");
    run_ok(&["pool", "create", "--tier", "cxl", "--at", text(&pool), "--size", POOL_LEN]);
    run_ok(&["pool", "add", text(&pool), text(&full)]);
    let bytes = fs::read(pool.join("pool.tvmm")).unwrap();
    write_packed(&target.join("pool.packed.zst"), &bytes);
    let mut shown: Value = serde_json::from_str(&run_ok(&["pool", "show", text(&pool), "--json"])).unwrap();
    // These depend on the host: the file system that the pool is on, and the VMs that run from it.
    shown.as_object_mut().unwrap().retain(|name, _| name != "medium" && name != "vms");
    expected["pool"] = json!({ "len": bytes.len(), "shown": shown });
    let cold = dir.join("cold");
    run_ok(&["pool", "create", "--tier", "file", "--at", text(&cold)]);
    run_ok(&["pool", "add", text(&cold), text(&full)]);
    copy_dir(&cold, &target.join("cold"));
}
