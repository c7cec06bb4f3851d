//! Booting, snapshotting, restoring by every policy, merging, copying, deleting, profiles and plans.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use fastrand::Rng;
use serde_json::json;

use super::world::{DEPTH_MAX, Living, Snap, World, remove, words};
use crate::support::{Vm, config, text};

const POLICIES: [&str; 5] = ["eager", "firecracker", "firecracker-uffd", "catalyzer", "trenv"];
/// Those that need a profile.
const PROFILED: [&str; 4] = ["reap", "faasnap", "aquifer", "tiered"];

/// A policy that the snapshot has what is needed for, as arguments.
pub fn policy(snap: &Snap, rng: &mut Rng) -> Vec<String> {
    let number = rng.usize(..POLICIES.len() + PROFILED.len());
    match &snap.profile {
        Some(profile) if number >= POLICIES.len() => {
            words(&["--policy", PROFILED[number - POLICIES.len()], "--profile", text(profile)])
        }
        _ => words(&["--policy", POLICIES[number % POLICIES.len()]]),
    }
}

pub fn boot(world: &mut World, rng: &mut Rng) {
    let mut vm = Vm::boot(&config(rng.u32(1..=2), 64));
    vm.call(&format!("fill pages={} seed={}", rng.u32(500..6000), rng.u32(..)));
    let digest = vm.call("check").digest;
    world.add_vm(Living { vm, tip: None, digest, origin: None });
    world.count("boots");
}

pub fn touch(world: &mut World, rng: &mut Rng) {
    let request = format!("touch pages={} write={} seed={}", rng.u32(1..500), rng.u32(0..=100), rng.u32(..));
    let Some(index) = world.any_vm(rng) else { return boot(world, rng) };
    let living = &mut world.vms[index];
    assert_eq!(living.vm.call("check").digest, living.digest, "a VM's memory is another");
    living.vm.call(&request);
    living.digest = living.vm.call("check").digest;
}

pub fn end(world: &mut World, rng: &mut Rng) {
    let by_signal = rng.bool();
    let Some(index) = world.any_vm(rng) else { return };
    let living = world.vms.remove(index);
    if by_signal {
        let (status, said) = living.vm.terminate();
        assert!(status.success(), "SIGTERM: {status:?} {said}");
    } else {
        drop(living);
        world.count("kills");
    }
}

pub fn full(world: &mut World, rng: &mut Rng) {
    snapshot(world, rng, "Full");
}

pub fn diff(world: &mut World, rng: &mut Rng) {
    snapshot(world, rng, "Diff");
}

fn snapshot(world: &mut World, rng: &mut Rng, kind: &'static str) {
    let kills = rng.u32(..3) == 0;
    let in_files = rng.u32(..4) == 0;
    let is_live = rng.u32(..3) == 0;
    if world.vms.is_empty() {
        boot(world, rng);
    }
    let Some(index) = world.any_vm(rng) else { return };
    let tip = world.vms[index].tip.clone();
    let depth = world.depth_of(tip.as_deref());
    let kind = if tip.is_none() || depth >= DEPTH_MAX { "Full" } else { kind };
    let parent = if kind == "Diff" { tip } else { None };
    let path = world.fresh("s");
    let memory = in_files.then(|| path.with_extension("mem"));
    let mut body = json!({ "snapshot_path": path, "snapshot_type": kind });
    if let Some(memory) = &memory {
        body["mem_file_path"] = json!(memory);
    }
    if is_live {
        body["tvmm"] = json!({ "live": true });
    }
    let depth = if parent.is_some() { depth + 1 } else { 1 };
    let digest = world.vms[index].digest.clone();
    let snap = Snap { path: path.clone(), memory, parent, digest, profile: None, depth };
    if !is_live {
        world.vms[index].vm.pause();
    }
    if kills {
        let living = world.vms.remove(index);
        let acknowledged = world.ask_and_kill(living.vm, kind, "/snapshot/create", &body.to_string(), rng);
        return settle(world, snap, acknowledged);
    }
    let start = Instant::now();
    world.note(&format!("  PUT /snapshot/create {body}"));
    world.vms[index].vm.api_ok("PUT", "/snapshot/create", Some(body));
    world.took(kind, start);
    if is_live {
        world.count("live");
    } else {
        world.vms[index].vm.resume();
    }
    world.vms[index].tip = Some(path);
    world.count(if kind == "Full" { "full snapshots" } else { "diffs" });
    settle(world, snap, true);
}

/// Checks the snapshot of a writer that may have been killed: it is there if acknowledged, and whole if it is there.
fn settle(world: &mut World, snap: Snap, acknowledged: bool) {
    if !snap.path.exists() {
        assert!(!acknowledged, "{} was acknowledged and is not there", snap.path.display());
        snap.memory.iter().for_each(|memory| remove(memory));
        return world.count("cut short");
    }
    world.inspect(&snap);
    world.check(&snap, &words(&["--policy", "eager"]));
    world.add_snap(snap);
}

/// A restored VM goes back to its snapshot, or is killed on the way.
pub fn rewind(world: &mut World, rng: &mut Rng) {
    let kills = rng.u32(..4) == 0;
    let verify = rng.bool();
    let Some(index) = world.any_vm(rng) else { return restore_and_keep(world, rng) };
    let Some((path, digest)) = world.vms[index].origin.clone() else { return restore_and_keep(world, rng) };
    let body = json!({ "verify": verify });
    if kills {
        let living = world.vms.remove(index);
        world.ask_and_kill(living.vm, "rewind", "/tvmm/rewind", &body.to_string(), rng);
        return world.count("rewinds killed");
    }
    let start = Instant::now();
    world.note(&format!("  PUT /tvmm/rewind {body}"));
    let living = &mut world.vms[index];
    living.vm.api_ok("PUT", "/tvmm/rewind", Some(body));
    assert_eq!(living.vm.call("check").digest, digest, "a rewound VM's memory is another");
    living.digest = digest;
    living.tip = Some(path);
    world.took("rewind", start);
    world.count("rewinds");
}

/// A restored VM becomes the VM of another snapshot, if it can, or is killed on the way.
pub fn repurpose(world: &mut World, rng: &mut Rng) {
    let kills = rng.u32(..4) == 0;
    let compare = rng.bool();
    let Some(index) = world.any_vm(rng) else { return restore_and_keep(world, rng) };
    if world.vms[index].origin.is_none() {
        return restore_and_keep(world, rng);
    }
    let Some(snap) = world.any_dir(rng) else { return full(world, rng) };
    let policy = POLICIES[rng.usize(..POLICIES.len())];
    let body = json!({ "snapshot_path": snap.path, "track_dirty_pages": true, "resume_vm": true, "compare": compare,
        "tvmm": { "policy": policy } });
    if kills {
        let living = world.vms.remove(index);
        world.ask_and_kill(living.vm, "repurpose", "/tvmm/repurpose", &body.to_string(), rng);
        return world.count("repurposes killed");
    }
    let start = Instant::now();
    world.note(&format!("  PUT /tvmm/repurpose {body}"));
    let living = &mut world.vms[index];
    let (status, answer) = living.vm.api("PUT", "/tvmm/repurpose", Some(body));
    if status == 400 {
        // The number of vCPUs is another.
        assert!(answer["fault_message"].as_str().is_some_and(|why| why.contains("vCPU")), "{answer}");
        assert_eq!(living.vm.call("check").digest, living.digest, "a refused VM is as it was");
        return world.count("repurposes refused");
    }
    assert_eq!(status, 200, "{answer}");
    assert_eq!(living.vm.call("check").digest, snap.digest, "a repurposed VM's memory is another");
    living.digest = snap.digest.clone();
    living.tip = Some(snap.path.clone());
    living.origin = Some((snap.path, snap.digest));
    world.took("repurpose", start);
    world.count("repurposes");
}

pub fn restore(world: &mut World, rng: &mut Rng) {
    let Some(snap) = world.any_snap(rng) else { return full(world, rng) };
    let policy = policy(&snap, rng);
    world.check(&snap, &policy);
}

pub fn restore_and_keep(world: &mut World, rng: &mut Rng) {
    let Some(snap) = world.any_snap(rng) else { return full(world, rng) };
    let mut args = words(&["restore", "--snapshot"]);
    args.extend(snap.location());
    args.extend(policy(&snap, rng));
    args.push("--track-dirty-pages".to_string());
    world.note(&format!("  tvmm {}", args.join(" ")));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut vm = Vm::spawn(crate::support::scratch(), &args);
    vm.wait_for_state("Running");
    assert_eq!(vm.call("check").digest, snap.digest, "{args:?}");
    world.count("restores checked");
    let origin = Some((snap.path.clone(), snap.digest.clone()));
    world.add_vm(Living { vm, tip: Some(snap.path), digest: snap.digest, origin });
}

pub fn kill_a_restore(world: &mut World, rng: &mut Rng) {
    let Some(snap) = world.any_snap(rng) else { return full(world, rng) };
    let mut args = words(&["restore", "--snapshot"]);
    args.extend(snap.location());
    args.extend(policy(&snap, rng));
    args.extend(words(&["--run", "check"]));
    world.run("restore", &args, Some(rng));
    // A plan or image that it may have derived is whole, or made anew.
    let policy = policy(&snap, rng);
    world.check(&snap, &policy);
}

pub fn merge(world: &mut World, rng: &mut Rng) {
    let kills = rng.bool();
    let Some(snap) = world.any_dir(rng) else { return full(world, rng) };
    let path = world.fresh("m");
    let args = words(&["snapshot", "merge", text(&snap.path), "--out", text(&path)]);
    let done = world.run("merge", &args, kills.then_some(rng));
    let acknowledged = done.is_some_and(|output| output.status.success());
    assert!(acknowledged || kills, "the merge failed");
    world.count("merges");
    settle(world, Snap { path, memory: None, parent: None, profile: None, depth: 1, ..snap }, acknowledged);
}

/// By the tools of the host: a copy beside is as good as the original.
pub fn copy(world: &mut World, rng: &mut Rng) {
    let Some(snap) = world.any_dir(rng) else { return full(world, rng) };
    let path = world.fresh("c");
    copy_dir(&snap.path, &path);
    world.count("copies");
    settle(world, Snap { path, profile: None, ..snap }, true);
}

pub fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

pub fn delete(world: &mut World, rng: &mut Rng) {
    let number = rng.usize(..);
    let free: Vec<usize> = (0..world.snaps.len()).filter(|index| !world.is_needed(&world.snaps[*index].path)).collect();
    if free.len() > 2 {
        world.remove_snap(free[number % free.len()]);
        world.count("deletions");
    }
}

pub fn profile(world: &mut World, rng: &mut Rng) {
    let kills = rng.u32(..3) == 0;
    let recorder = ["uffd", "pagemap", "mincore", "dirty-log"][rng.usize(..4)];
    let function = format!("touch pages={} write={} seed={}", rng.u32(1..400), rng.u32(0..=100), rng.u32(..));
    let Some(snap) = world.any_snap(rng) else { return full(world, rng) };
    let out = world.fresh("p");
    let mut args = words(&["profile", "record", "--snapshot"]);
    args.extend(snap.location());
    args.extend(words(&["--recorder", recorder, "--run", &function, "--out", text(&out)]));
    let done = world.run("profile", &args, kills.then_some(rng));
    // The recorder `mincore` looks at the page cache. Pages that another VM maps stay there.
    let told = done.as_ref().map_or(String::new(), |output| String::from_utf8_lossy(&output.stderr).into_owned());
    if recorder == "mincore" && told.contains("cannot be dropped from the page cache") {
        assert!(!out.exists(), "{} was refused and is there", out.display());
        return world.count("recordings refused");
    }
    let acknowledged = done.is_some_and(|output| output.status.success());
    assert!(acknowledged || kills, "recording failed");
    world.count("profiles");
    if !out.exists() {
        assert!(!acknowledged, "{} was acknowledged and is not there", out.display());
        return world.count("cut short");
    }
    world.run_ok("profile show", &words(&["profile", "show", text(&out)]));
    let index = world.snaps.iter().position(|other| other.path == snap.path).expect("it was drawn from them");
    if let Some(old) = world.snaps[index].profile.replace(out) {
        remove(&old);
    }
}

pub fn plan(world: &mut World, rng: &mut Rng) {
    let Some(snap) = world.any_dir(rng) else { return full(world, rng) };
    let out: PathBuf = world.fresh("plan");
    let mut args = words(&["plan", "--snapshot", text(&snap.path), "--out", text(&out)]);
    args.extend(policy(&snap, rng));
    world.run_ok("plan", &args);
    world.check(&snap, &words(&["--plan", text(&out)]));
    remove(&out);
    world.count("plans");
}
