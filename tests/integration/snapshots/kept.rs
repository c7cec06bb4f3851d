//! Every snapshot that was acknowledged can be restored: chains at their limit, parents that are deleted, names that
//! are alike, writers that are killed, and random sequences of all of these against a model.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::service::{Service, wait_until};
use crate::support::{Random, Vm, config, exchange_over, run_err, run_ok, scratch, signal, text};

/// A service with a function that changes its memory and one that checks it, both in VMs of `touch`.
fn serve(state: &Path) -> Service {
    let service = Service::start(state, &["--max-vms", "8"]);
    let function = |name: &str| {
        json!({ "func_name": name, "mem_size": 64, "prepare": "fill pages=300 seed=1",
    "track_dirty_pages": true })
    };
    for name in ["touch", "check"] {
        service.ok("POST", "/functions", Some(function(name)));
    }
    service
}

fn boot(service: &Service) -> String {
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "touch" })));
    vm["vmId"].as_str().unwrap().to_string()
}

/// Changes a VM's memory.
fn touch(service: &Service, vm: &str, seed: u64) {
    let params = format!("pages=40 write=100 seed={seed}");
    service.invoke(json!({ "func_name": "touch", "vmId": vm, "params": params }));
}

/// The digest of a VM's memory.
fn check(service: &Service, body: Value) -> (String, String) {
    let mut asked = json!({ "func_name": "check" });
    asked.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
    let answer = service.invoke(asked);
    let digest = answer["result"].as_str().unwrap().split(' ').next().unwrap().to_string();
    (digest, answer["vmId"].as_str().unwrap_or_default().to_string())
}

fn take(service: &Service, vm: &str, name: &str, kind: &str) -> Value {
    service.ok("POST", "/snapshots", Some(json!({ "vmId": vm, "ssId": name, "snapshot_type": kind })))
}

/// A VM that was restored from a snapshot.
fn restore(service: &Service, name: &str) -> (String, String) {
    check(service, json!({ "ssId": name, "keep": true }))
}

fn end(service: &Service, vm: &str) {
    service.ok("DELETE", &format!("/vms/{vm}"), None);
}

/// Names in a directory tree that only a writer at work has.
fn temporaries(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_str().unwrap().starts_with(".tvmm-") {
            found.push(entry.path());
        }
        if entry.path().is_dir() {
            found.extend(temporaries(&entry.path()));
        }
    }
    found
}

#[test]
fn the_65th_layer_is_refused_and_the_64_before_it_can_be_restored_and_merged() {
    let dir = scratch();
    let path = |layer: usize| dir.path().join(format!("{layer:03}"));
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=300 seed=1");
    vm.snapshot(&path(0), &[]);
    for layer in 1..64 {
        vm.call(&format!("touch pages=20 write=100 seed={layer}"));
        vm.snapshot(&path(layer), &["--diff"]);
    }
    let at_64 = vm.call("check").digest;
    let socket = text(vm.socket()).to_string();
    let said = run_err(&["snapshot", "--api-sock", &socket, "--out", text(&path(64)), "--diff", "--resume"]);
    assert!(said.contains("more than 64 layers") && said.contains("Take a full snapshot"), "{said}");
    assert!(!path(64).exists());
    vm.call("touch pages=20 write=100 seed=64");
    let digest = vm.call("check").digest;
    vm.snapshot(&path(64), &[]);
    vm.call("touch pages=20 write=100 seed=65");
    let after = vm.call("check").digest;
    vm.snapshot(&path(65), &["--diff"]);
    for (layer, digest) in [(63, &at_64), (64, &digest), (65, &after)] {
        assert_eq!(Vm::restore(&path(layer), "firecracker").call("check").digest, *digest, "{layer}");
    }
    // Merged by parts, the lower part takes the place of its tip, and the layers above it accept that.
    let part = dir.path().join("part");
    run_ok(&["snapshot", "merge", text(&path(40)), "--out", text(&part)]);
    fs::rename(path(40), dir.path().join("aside")).unwrap();
    fs::rename(&part, path(40)).unwrap();
    for layer in 0..40 {
        fs::remove_dir_all(path(layer)).unwrap();
    }
    run_ok(&["inspect", text(&path(63))]);
    assert_eq!(Vm::restore(&path(63), "eager").call("check").digest, at_64);
}

#[test]
fn diff_of_a_deleted_parent_is_refused_and_a_full_snapshot_loses_no_page() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=300 seed=1");
    vm.snapshot(&path("base"), &[]);
    vm.call("touch pages=50 write=100 seed=2");
    vm.snapshot(&path("middle"), &["--diff"]);
    let socket = text(vm.socket()).to_string();
    // Its parent, and then its parent's parent.
    for (seed, gone) in [(3, "middle"), (4, "base")] {
        vm.call(&format!("touch pages=50 write=100 seed={seed}"));
        fs::rename(path(gone), path("aside")).unwrap();
        let said = run_err(&["snapshot", "--api-sock", &socket, "--out", text(&path("diff")), "--diff", "--resume"]);
        assert!(said.contains("Take a full snapshot") && said.contains(gone), "{said}");
        assert!(!path("diff").exists());
        fs::rename(path("aside"), path(gone)).unwrap();
    }
    let digest = vm.call("check").digest;
    vm.snapshot(&path("diff"), &["--diff"]);
    assert_eq!(Vm::restore(&path("diff"), "eager").call("check").digest, digest);
    fs::remove_dir_all(path("diff")).unwrap();
    vm.call("touch pages=50 write=100 seed=5");
    let digest = vm.call("check").digest;
    run_err(&["snapshot", "--api-sock", &socket, "--out", text(&path("lost")), "--diff", "--resume"]);
    vm.snapshot(&path("full"), &[]);
    assert_eq!(Vm::restore(&path("full"), "eager").call("check").digest, digest);
}

#[test]
fn service_refuses_to_delete_what_a_vm_or_a_diff_needs() {
    let dir = scratch();
    let service = serve(&dir.path().join("state"));
    let vm = boot(&service);
    take(&service, &vm, "full", "Full");
    let refused = |name: &str| service.refused(409, "DELETE", &format!("/snapshots/{name}"), None);
    let said = refused("full");
    assert!(said.contains(&format!("the next diff of VM `{vm}`")), "{said}");
    touch(&service, &vm, 2);
    let (digest, _) = check(&service, json!({ "vmId": vm }));
    take(&service, &vm, "diff", "Diff");
    assert!(refused("full").contains("snapshot `diff` builds on it"));
    assert!(refused("diff").contains(&vm));
    end(&service, &vm);
    let (found, restored) = restore(&service, "diff");
    assert_eq!(found, digest);
    assert!(refused("diff").contains(&format!("VM `{restored}` runs from it")));
    // A second snapshot of it frees the first from the VM, but not from the snapshot that builds on it.
    take(&service, &restored, "later", "Diff");
    refused("diff");
    end(&service, &restored);
    for name in ["later", "diff", "full"] {
        service.ok("DELETE", &format!("/snapshots/{name}"), None);
    }
}

#[test]
fn service_takes_full_snapshots_long_before_a_chain_is_too_long() {
    let dir = scratch();
    let service = serve(&dir.path().join("state"));
    let vm = boot(&service);
    take(&service, &vm, "s0", "Full");
    let mut compacted = Vec::new();
    let mut digests = Vec::new();
    let mut vm = vm;
    for round in 1..=36_u64 {
        touch(&service, &vm, round);
        let (digest, _) = check(&service, json!({ "vmId": vm }));
        let taken = take(&service, &vm, &format!("s{round}"), "Diff");
        assert_eq!(taken["compacted"], taken["snapshot_type"] == "Full", "{taken}");
        assert_eq!(taken["compacted"], taken["parent"].is_null(), "{taken}");
        if taken["compacted"] == true {
            compacted.push(round);
        }
        digests.push(digest.clone());
        // Hibernated and woken now and then.
        if round % 12 == 0 {
            end(&service, &vm);
            let (found, restored) = restore(&service, &format!("s{round}"));
            assert_eq!(found, digest, "{round}");
            vm = restored;
        }
    }
    assert_eq!(compacted, [16, 32]);
    let metrics =
        crate::support::exchange(service.socket(), b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(metrics.contains("tvmm_snapshots_compacted_total 2"), "{metrics}");
    for round in [1, 15, 16, 17, 31, 32, 36] {
        let (found, restored) = restore(&service, &format!("s{round}"));
        assert_eq!(found, digests[round - 1], "{round}");
        end(&service, &restored);
    }
    // Snapshots before the last full one are not needed any more.
    (0..32).rev().for_each(|round| drop(service.ok("DELETE", &format!("/snapshots/s{round}"), None)));
    assert_eq!(restore(&service, "s36").0, digests[35]);
}

#[test]
fn copies_touch_no_snapshot_of_another_name() {
    let dir = scratch();
    let state = dir.path().join("state");
    let service = serve(&state);
    let vm = boot(&service);
    take(&service, &vm, "base", "Full");
    touch(&service, &vm, 7);
    let (digest, _) = check(&service, json!({ "vmId": vm }));
    take(&service, &vm, "victim.partial", "Diff");
    service.ok("PUT", "/snapshots?from_snapshot=base&ssId=victim.x", None);
    assert_eq!(restore(&service, "victim.partial").0, digest);
    // Copies of a diff, too, hold on to what it builds on.
    service.ok("PUT", "/snapshots?from_snapshot=victim.partial&ssId=second", None);
    let names: Vec<String> = (0..8).map(|number| format!("same.{number}")).collect();
    std::thread::scope(|scope| {
        for name in &names {
            let service = &service;
            scope.spawn(move || {
                service.ok("PUT", &format!("/snapshots?from_snapshot=victim.partial&ssId={name}"), None)
            });
        }
    });
    for name in names.iter().map(String::as_str).chain(["second"]) {
        let (found, restored) = restore(&service, name);
        assert_eq!(found, digest, "{name}");
        end(&service, &restored);
    }
    // The daemon may still be writing down what has just ended.
    wait_until("no temporary is left", || temporaries(&state).is_empty());
}

#[test]
fn what_killed_writers_and_gone_profiles_leave_is_removed_at_the_next_start() {
    let dir = scratch();
    let state = dir.path().join("state");
    let mut service = serve(&state);
    let vm = boot(&service);
    take(&service, &vm, "base", "Full");
    service.ok("POST", "/snapshots/base/profile", Some(json!({ "params": "pages=40" })));
    let from_base =
        json!({ "func_name": "touch", "ssId": "base", "policy": "reap", "params": "pages=40", "keep": false });
    service.invoke(from_base.clone());
    service.kill();
    let plan = state.join("snapshots/base/plan");
    let left = ["", "profiles/base", "snapshots", "snapshots/base/plan", "snapshot-records"];
    for (number, folder) in left.iter().enumerate() {
        fs::write(state.join(folder).join(format!(".tvmm-{number:032x}.partial")), "x").unwrap();
    }
    fs::create_dir(state.join("profiles/gone")).unwrap();
    fs::write(state.join("profiles/gone/run.profile"), "x").unwrap();
    let old = plan.join("0123.partial-4711");
    fs::write(&old, "x").unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(7200);
    fs::File::options().write(true).open(&old).unwrap().set_modified(long_ago).unwrap();
    let service = serve(&state);
    // The daemon may still be writing down what has just ended.
    wait_until("no temporary is left", || temporaries(&state).is_empty());
    assert!(!old.exists());
    assert!(!state.join("profiles/gone").exists());
    // Plans and images derived from a profile are still there. They go when that profile is replaced or deleted.
    let derived = |extension: &str| {
        let paths = fs::read_dir(&plan).into_iter().flatten().flatten().map(|entry| entry.path());
        paths.filter(|path| path.extension().is_some_and(|found| found == extension)).count()
    };
    assert!(derived("image") > 0 && derived("plan") > 0);
    service.invoke(from_base.clone());
    service.ok("POST", "/snapshots/base/profile", Some(json!({ "params": "pages=90 seed=5" })));
    assert_eq!((derived("image"), derived("plan")), (0, 0));
    service.invoke(from_base);
    assert!(derived("image") > 0 && derived("plan") > 0);
    service.ok("DELETE", "/snapshots/base/profile", None);
    assert_eq!((derived("image"), derived("plan")), (0, 0));
}

#[test]
fn folder_of_plans_and_images_is_bounded_and_what_was_used_last_stays() {
    const LIMIT: u64 = 64 << 20;
    let dir = scratch();
    let base = dir.path().join("base");
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=6000 seed=1");
    vm.snapshot(&base, &[]);
    drop(vm);
    let size = || -> u64 {
        let files = fs::read_dir(base.join("plan")).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
        files.sum()
    };
    let mut made = 0;
    let mut last = 0;
    for pages in (2600..6000_u64).step_by(400) {
        let profile = dir.path().join(format!("{pages}.profile"));
        let run = format!("touch pages={pages}");
        let record = ["profile", "record", "--snapshot", text(&base), "--recorder", "pagemap", "--run", &run];
        run_ok(&[&record[..], &["--out", text(&profile)]].concat());
        let restore = ["restore", "--snapshot", text(&base), "--policy", "reap", "--profile", text(&profile)];
        run_ok(&[&restore[..], &["--run", &run]].concat());
        let now = size();
        made += now.saturating_sub(last);
        last = now;
        assert!(now <= LIMIT, "{now} bytes after {pages} pages");
        let report = dir.path().join("report.json");
        run_ok(&[&restore[..], &["--run", &run, "--report", text(&report)]].concat());
        let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
        assert_eq!(report["restore"]["plan"], "cache", "the plan that was used last is kept: {}", report["restore"]);
    }
    assert!(made > 0 && last > LIMIT / 2, "{last} bytes: the limit was never near");
}

/// The state that a snapshot must have.
#[derive(Clone)]
struct Known {
    digest: String,
    parent: Option<String>,
}

/// The state that a VM must have.
struct Living {
    id: String,
    digest: String,
    /// The snapshot it was restored from.
    from: Option<String>,
    /// The snapshot that its next diff builds on.
    diff_parent: Option<String>,
}

/// The service and what it must know.
struct Model {
    dir: tempfile::TempDir,
    service: Service,
    random: Random,
    snapshots: BTreeMap<String, Known>,
    vms: Vec<Living>,
    /// Requests that a kill left without an answer: these names may be there or not.
    unanswered: BTreeSet<String>,
    names: u64,
    counts: BTreeMap<&'static str, u64>,
}

impl Model {
    fn new(seed: u64) -> Model {
        let dir = scratch();
        let service = serve(&dir.path().join("state"));
        let (snapshots, vms, unanswered, counts) = Default::default();
        Model { dir, service, random: Random(seed | 1), snapshots, vms, unanswered, names: 0, counts }
    }

    /// A name that is not in use; many share what comes before their last dot.
    fn new_name(&mut self) -> String {
        self.names += 1;
        let ends = ["partial", "x", "json", "tmp"];
        format!("s{}.{}.{}", self.names % 3, self.names, ends[self.random.below(4) as usize])
    }

    fn any_snapshot(&mut self) -> Option<String> {
        let count = self.snapshots.len() as u64;
        (count > 0).then(|| self.snapshots.keys().nth(self.random.below(count) as usize).unwrap().clone())
    }

    fn step(&mut self) {
        if self.vms.is_empty() || (self.vms.len() < 3 && self.random.below(4) == 0) {
            return self.start();
        }
        let vm = self.random.below(self.vms.len() as u64) as usize;
        let name = match self.random.below(20) {
            0..3 => "touch",
            3..8 => "diff",
            8..10 => "full",
            10..14 => "delete",
            14..16 => "copy",
            16 => "merge",
            17..19 => "end",
            _ => "kill",
        };
        *self.counts.entry(name).or_default() += 1;
        match name {
            "touch" => self.touch(vm),
            "diff" => self.diff(vm),
            "full" => self.take(vm, "Full"),
            "delete" => self.delete(),
            "copy" => self.copy(),
            "merge" => self.merge(),
            "end" => self.end(vm),
            _ => self.kill(),
        }
    }

    fn start(&mut self) {
        let living = match self.any_snapshot() {
            Some(name) => {
                let (digest, id) = restore(&self.service, &name);
                assert_eq!(digest, self.snapshots[&name].digest, "{name}");
                Living { id, digest, from: Some(name.clone()), diff_parent: Some(name) }
            }
            None => {
                let id = boot(&self.service);
                let (digest, _) = check(&self.service, json!({ "vmId": id }));
                Living { id, digest, from: None, diff_parent: None }
            }
        };
        self.vms.push(living);
    }

    fn touch(&mut self, vm: usize) {
        let seed = self.random.below(1000);
        touch(&self.service, &self.vms[vm].id, seed);
        self.vms[vm].digest = check(&self.service, json!({ "vmId": self.vms[vm].id })).0;
    }

    fn diff(&mut self, vm: usize) {
        self.touch(vm);
        self.take(vm, "Diff");
    }

    fn take(&mut self, vm: usize, kind: &str) {
        let name = self.new_name();
        let body = json!({ "vmId": self.vms[vm].id, "ssId": name, "snapshot_type": kind });
        let (status, taken) = self.service.ask("POST", "/snapshots", Some(body));
        let living = &mut self.vms[vm];
        if kind == "Diff" && living.diff_parent.is_none() && status == 422 {
            return;
        }
        assert_eq!(status, 200, "{taken}");
        let parent = taken["parent"].as_str().map(String::from);
        let wanted = living.diff_parent.clone().filter(|_| kind == "Diff" && taken["compacted"] == false);
        assert_eq!(parent, wanted, "{taken}");
        living.diff_parent = Some(name.clone());
        self.snapshots.insert(name, Known { digest: living.digest.clone(), parent });
    }

    fn delete(&mut self) {
        let Some(name) = self.any_snapshot() else { return };
        let is_parent = self.snapshots.values().any(|known| known.parent.as_ref() == Some(&name));
        let needs = |vm: &Living| vm.from.as_ref() == Some(&name) || vm.diff_parent.as_ref() == Some(&name);
        let wanted = if is_parent || self.vms.iter().any(needs) { 409 } else { 200 };
        let (status, said) = self.service.ask("DELETE", &format!("/snapshots/{name}"), None);
        assert_eq!(status, wanted, "{name}: {said}");
        if status == 200 {
            self.snapshots.remove(&name);
        }
    }

    fn copy(&mut self) {
        let (Some(from), to) = (self.any_snapshot(), self.new_name()) else { return };
        self.service.ok("PUT", &format!("/snapshots?from_snapshot={from}&ssId={to}"), None);
        self.snapshots.insert(to, self.snapshots[&from].clone());
    }

    fn merge(&mut self) {
        let Some(name) = self.any_snapshot() else { return };
        let out = self.dir.path().join("merged");
        let from = self.dir.path().join("state/snapshots").join(&name);
        run_ok(&["snapshot", "merge", text(&from), "--out", text(&out)]);
        let digest = Vm::restore(&out, "firecracker").call("check").digest;
        assert_eq!(digest, self.snapshots[&name].digest, "{name}, merged");
        fs::remove_dir_all(out).unwrap();
    }

    fn end(&mut self, vm: usize) {
        end(&self.service, &self.vms.remove(vm).id);
    }

    /// Kills the service while it takes or copies a snapshot, and starts it again.
    fn kill(&mut self) {
        let name = self.new_name();
        let from = self.any_snapshot();
        let vm = self.vms[0].id.clone();
        let after = Duration::from_millis(self.random.below(120));
        let pid = self.service.pid();
        let service = &self.service;
        let connection = UnixStream::connect(service.socket()).unwrap();
        let request = match from {
            Some(from) if self.random.below(2) == 0 => {
                format!(
                    "PUT /snapshots?from_snapshot={from}&ssId={name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                )
            }
            _ => {
                let body = json!({ "vmId": vm, "ssId": name }).to_string();
                let head = "POST /snapshots HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json";
                format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
            }
        };
        let answer = std::thread::scope(|scope| {
            let asked = scope.spawn(move || exchange_over(connection, request.as_bytes()));
            std::thread::sleep(after);
            signal(pid, Signal::KILL);
            asked.join().unwrap()
        });
        let was_answered = answer.starts_with("HTTP/1.1 200");
        self.service.kill();
        self.vms.clear();
        self.service = serve(&self.dir.path().join("state"));
        let left = temporaries(&self.dir.path().join("state"));
        assert!(left.is_empty(), "{left:?}");
        let records = self.service.get("/snapshots");
        let found = records.as_array().unwrap().iter().find(|record| record["ssId"] == name.as_str());
        assert!(found.is_some() || !was_answered, "snapshot {name} was acknowledged and is lost");
        if let Some(record) = found {
            // Its memory is that of the VM or of the snapshot it was copied from, which only a restore can tell.
            let (digest, vm) = restore(&self.service, &name);
            end(&self.service, &vm);
            let parent = record["parent"].as_str().map(String::from);
            self.snapshots.insert(name, Known { digest, parent });
        } else {
            self.unanswered.insert(name);
        }
    }

    /// Restores every snapshot there must be.
    fn check_all(&mut self) {
        while !self.vms.is_empty() {
            self.end(0);
        }
        let records = self.service.get("/snapshots");
        let mut names: Vec<&str> = records.as_array().unwrap().iter().map(|r| r["ssId"].as_str().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(names, self.snapshots.keys().map(String::as_str).collect::<Vec<_>>());
        for (name, known) in &self.snapshots {
            let (digest, vm) = restore(&self.service, name);
            assert_eq!(digest, known.digest, "{name}");
            end(&self.service, &vm);
        }
        for name in &self.unanswered {
            self.service.refused(404, "GET", &format!("/snapshots/{name}"), None);
        }
    }
}

/// For a minute at most, whatever the host's speed. `TVMM_MODEL_SEED` repeats a run.
#[test]
fn no_acknowledged_snapshot_is_unreadable_after_random_operations() {
    const LIMIT: Duration = Duration::from_secs(60);
    const STEPS: usize = 150;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = std::env::var("TVMM_MODEL_SEED").map_or(now, |seed| seed.parse().expect("a number"));
    println!("TVMM_MODEL_SEED={seed}");
    let begin = Instant::now();
    let mut model = Model::new(seed);
    for _ in 0..STEPS {
        if begin.elapsed() >= LIMIT {
            break;
        }
        model.step();
    }
    model.check_all();
    println!("{:?}; {} snapshots kept", model.counts, model.snapshots.len());
}
