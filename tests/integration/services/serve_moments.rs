//! `tvmm serve`: requests at random moments of the steps of an idle VM, and the daemon's end while VMs are spilled.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::serve_idle::{check, count, fill, id_of, put_touch, record, service, wait_for_state};
use crate::snapshots::crash::SmallDisk;
use crate::support::service::{Service, metric, processes_of, wait_until};
use crate::support::{Random, Vm, moments, rounds, scratch, seed_of_moments, signal, text};

const HOUR_MS: u64 = 3_600_000;

/// A request to the guest: its function and parameters.
fn draw_call(random: &mut Random) -> (&'static str, String) {
    let seed = 1 + random.below(1 << 30);
    match random.below(4) {
        0 => ("check", String::new()),
        1 => ("touch", format!("pages=512 write={}", random.below(101))),
        _ => ("touch", format!("pages={} write={} seed={seed}", 1 + random.below(512), random.below(101))),
    }
}

/// A policy for idle VMs, and what its VMs are led through.
struct Rule {
    idle: Value,
    /// The last step that a VM takes by it.
    deepest: &'static str,
    /// Moments after which the pauses of the function are forgotten: when many are known, VMs wait longer.
    pauses_known: usize,
    /// Requests without a pause that follow: without any, a VM of `ladder` waits for the longest time.
    quick: usize,
}

fn rules() -> [Rule; 3] {
    let suspend = json!({ "policy": "suspend", "keep_alive_ms": 1 });
    let ladder = json!({ "policy": "ladder", "floor_ms": 100, "cap_ms": HOUR_MS });
    let faasmem = json!({ "policy": "faasmem", "keep_alive_ms": HOUR_MS, "floor_ms": 1, "offload_ms": 300 });
    [
        Rule { idle: suspend, deepest: "suspended", pauses_known: 7, quick: 0 },
        Rule { idle: ladder, deepest: "suspended", pauses_known: 1, quick: 12 },
        Rule { idle: faasmem, deepest: "spilled", pauses_known: 7, quick: 0 },
    ]
}

/// A VM of a service, and its twin, which nothing disturbs.
struct Twins<'a> {
    service: &'a Service,
    vm: String,
    twin: Vm,
}

impl Twins<'_> {
    /// Both get a request, and must answer the same.
    fn call(&mut self, (name, params): (&str, &str), what: &str) {
        let answer = self.service.invoke(json!({ "func_name": name, "params": params, "vmId": self.vm }));
        let expected = self.twin.call(&format!("{name} {params}")).digest;
        let result = answer["result"].as_str().unwrap();
        assert!(result.starts_with(&expected), "{what}: {name} {params}: {answer}, not {expected}");
    }
}

#[test]
fn a_vm_answers_as_its_twin_does_at_each_moment_of_its_steps() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    let snapshot = dir.path().join("state/snapshots/base");
    let seed = seed_of_moments();
    let mut random = Random(seed);
    for Rule { idle, deepest, pauses_known, quick } in rules() {
        put_touch(&service, idle.clone());
        let first = json!({ "func_name": "touch", "params": "pages=1", "policy": "eager" });
        let vm = id_of(&service.invoke(first));
        let mut twins = Twins { service: &service, vm, twin: Vm::restore(&snapshot, "firecracker") };
        twins.twin.call("touch pages=1");
        let all = moments(25).div_ceil(3);
        let mut tallies = Tallies::default();
        for moment in 0..all {
            let what = format!("TVMM_MOMENTS_SEED={seed}, {idle}, moment {moment}");
            if moment % pauses_known == 0 {
                tallies.take(&service);
                put_touch(&service, idle.clone());
                (0..quick).for_each(|_| twins.call(("touch", "pages=1"), &what));
            }
            if moment % 7 == 0 {
                wait_for_state(&service, &twins.vm, deepest);
            } else {
                let longest_ms = 64 << random.below(5);
                std::thread::sleep(Duration::from_micros(random.below(1000) * longest_ms));
            }
            let (name, params) = draw_call(&mut random);
            twins.call((name, &params), &what);
            if random.below(4) == 0 {
                twins.call(("check", ""), &what);
            }
        }
        twins.call(("check", ""), "at the end");
        service.ok("DELETE", &format!("/vms/{}", twins.vm), None);
        tallies.take(&service);
        println!("{idle}: {all} moments; {tallies:?}");
        assert!(tallies.woken(deepest) > 0, "{idle}: {tallies:?}");
    }
}

/// Steps of idle VMs by name and end.
#[derive(Debug, Default)]
struct Tallies(BTreeMap<String, u64>);

impl Tallies {
    /// Adds the counts of `touch`, of which no step may have failed, and removes the function.
    fn take(&mut self, service: &Service) {
        for step in ["parked", "trimmed", "spilled", "suspended"] {
            for end in ["done", "partly", "cancelled", "refused", "woken", "prefetched"] {
                *self.0.entry(format!("{step} {end}")).or_default() += count(service, step, end);
            }
            let failed = ["failed", "wakes_failed"].map(|end| count(service, step, end));
            assert_eq!(failed, [0, 0], "{step}");
        }
        self.0.retain(|_, count| *count > 0);
        service.ok("DELETE", "/functions/touch", None);
    }

    fn woken(&self, step: &str) -> u64 {
        self.0.get(&format!("{step} woken")).copied().unwrap_or_default()
    }
}

/// The bytes of a disk that are taken.
fn taken(disk: &SmallDisk) -> u64 {
    let stat = rustix::fs::statvfs(disk.path("")).unwrap();
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}

/// Starts a service whose VMs are spilled to `disk` at once when they are idle, and whose messages go to `log`.
fn spilling(dir: &Path, disk: &SmallDisk, log: &Path) -> Service {
    let service = Service::start_logging(&dir.join("state"), &["--spill-dir", text(&disk.path(""))], log);
    put_touch(&service, json!({ "policy": "faasmem", "keep_alive_ms": HOUR_MS, "floor_ms": 1, "offload_ms": 1 }));
    service
}

#[test]
fn a_daemon_killed_while_vms_are_spilled_leaves_nothing_of_them() {
    let Some(disk) = SmallDisk::new(256) else { return };
    let dir = scratch();
    let state = dir.path().join("state");
    let first = service(dir.path(), &[]);
    put_touch(&first, json!({ "policy": "suspend", "keep_alive_ms": 1 }));
    let asleep = id_of(&first.ok("POST", "/vms", Some(json!({ "func_name": "touch", "ssId": "base" }))));
    fill(&first, &asleep, "pages=300 seed=5");
    let digest = check(&first, &asleep);
    wait_for_state(&first, &asleep, "suspended");
    assert!(first.terminate().success());
    let empty = taken(&disk);
    let mut random = Random(seed_of_moments());
    let mut amid = 0;
    for round in 0..rounds(6) {
        let mut service = spilling(dir.path(), &disk, &dir.path().join("log"));
        let vm = id_of(&service.invoke(json!({ "func_name": "touch", "params": "pages=1", "policy": "eager" })));
        fill(&service, &vm, &format!("pages=6000 seed={round}"));
        if round % 2 == 0 {
            wait_for_state(&service, &vm, "spilled");
            wait_until("its pages are in the file", || metric(&service, "tvmm_spilled_bytes") > 4 << 20);
            assert!(taken(&disk) > empty + (4 << 20));
        } else {
            std::thread::sleep(Duration::from_micros(random.below(600_000)));
            amid += usize::from(record(&service, &vm)["state"] != "spilled");
        }
        signal(service.pid(), Signal::KILL);
        service.wait();
        wait_until("no process is left", || processes_of(&state).is_empty());
        assert_eq!(taken(&disk), empty, "the space of the spill file is free");
        assert_eq!(std::fs::read_dir(disk.path("")).unwrap().count(), 0);
        let log = dir.path().join("log-after");
        let service = spilling(dir.path(), &disk, &log);
        assert_eq!(std::fs::read_dir(state.join("run")).unwrap().count(), 0, "sockets and images are gone");
        let lost = record(&service, &vm);
        assert_eq!(lost["state"], "lost", "{lost}");
        let said = std::fs::read_to_string(&log).unwrap();
        assert!(said.lines().any(|line| line.contains("was lost") && line.contains(&vm)), "{said}");
        assert_eq!(record(&service, &asleep)["state"], "suspended");
        assert_eq!(check(&service, &asleep), digest, "round {round}");
        assert_eq!(count(&service, "suspended", "wakes_failed"), 0);
        // A client's VM is not spilled by this policy, and is suspended again for the next round.
        put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 1 }));
        wait_for_state(&service, &asleep, "suspended");
        assert!(service.terminate().success());
    }
    println!("{amid} of {} daemons were killed before their VM was spilled", rounds(6));
}
