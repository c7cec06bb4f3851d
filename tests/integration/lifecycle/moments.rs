//! Requests at random moments of demotions and barriers, balloon releases among them. Each answer, and all memory, is
//! compared with that of a twin, a VM that gets the same requests and gives nothing back. `TVMM_MOMENTS=5000` makes so
//! many moments, and `TVMM_MOMENTS_SEED` repeats a sequence.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::demote::count;
use crate::support::{Answer, Random, Vm, config, http, moments, scratch, seed_of_moments};

/// Filled pages: 12 MiB.
const FILLED: u64 = 3000;
const WAYS: [&[&str]; 5] = [
    &["firecracker"],
    &["eager"],
    &["firecracker-uffd"],
    &["trenv", "--in-place-mapping", "shared"],
    &["firecracker", "--track-dirty-pages"],
];

/// Something that is asked of a VM: the host first, then the guest.
struct Request {
    /// Path and body of a `PATCH`.
    host: Option<(&'static str, Value)>,
    /// The first one is sent at the moment; all have been answered before the next moment.
    calls: Vec<String>,
}

impl Request {
    fn draw(random: &mut Random) -> Request {
        let seed = 1 + random.below(1 << 30);
        let touch = |pages: u64, write: u64| format!("touch pages={pages} write={write} seed={seed}");
        let plain = |calls: &[String]| Request { host: None, calls: calls.to_vec() };
        match random.below(12) {
            0 => plain(&["check".into()]),
            // All memory at once.
            1 => plain(&[format!("touch pages={FILLED} write={}", random.below(101))]),
            2 => plain(&["free filled=1".into(), format!("fill pages={FILLED} seed={seed}")]),
            3 => {
                let way = ["report", "inflate"][random.below(2) as usize];
                plain(&[format!("balloon op={way} filled=1"), touch(FILLED / 2, 100)])
            }
            4 => Request {
                host: Some(("/balloon/hinting/start", json!({}))),
                calls: vec!["balloon op=hint filled=1".into(), touch(FILLED / 2, 100)],
            },
            // Free memory goes to the balloon, or comes back.
            5 => Request {
                host: Some(("/balloon", json!({ "amount_mib": random.below(24) }))),
                calls: vec!["balloon op=follow".into()],
            },
            _ => plain(&[touch(1 + random.below(FILLED), random.below(101))]),
        }
    }
}

/// The path and the body of each request that makes a VM give memory back.
fn draw_demotion(random: &mut Random, dir: &Path) -> Vec<(&'static str, String)> {
    let mut asked = Vec::new();
    if random.below(3) == 0 {
        let barrier = json!({ "reads": random.below(2) == 0, "writes": random.below(2) == 0 });
        asked.push(("/tvmm/barrier", barrier.to_string()));
    }
    let mut demotion = json!({});
    if random.below(3) > 0 {
        demotion["to"] = json!("spilled");
        demotion["spill_dir"] = json!(dir);
    }
    if random.below(3) == 0 {
        demotion["cold"] = json!(true);
        if random.below(2) == 0 {
            let buckets = ["runtime", "init", "execution"];
            demotion["buckets"] = json!(buckets[random.below(3) as usize..]);
        }
    }
    if random.below(3) == 0 {
        demotion["most_pages"] = json!(1 + random.below(FILLED / 2));
    }
    if random.below(3) == 0 {
        demotion["rate_mib_s"] = json!(50 + random.below(400));
    }
    asked.push(("/tvmm/demote", demotion.to_string()));
    asked
}

/// A VM that gives memory back, and its twin.
struct Twins {
    vm: Vm,
    twin: Vm,
    /// The time that the VM took to give memory back.
    took: Duration,
    /// Requests that came before it had.
    amid: usize,
}

impl Twins {
    fn restore(snapshot: &Path, way: &[&str]) -> Twins {
        let vm = Vm::restore_with(snapshot, way[0], &way[1..]);
        let twin = Vm::restore_with(snapshot, "firecracker", &[]);
        [&vm, &twin].iter().for_each(|vm| vm.wait_for_socket());
        Twins { vm, twin, took: Duration::from_millis(10), amid: 0 }
    }

    /// Asks for memory, and at a moment before all of it was given back for an answer.
    fn moment(&mut self, random: &mut Random, dir: &Path, what: &str) {
        let Request { host, calls } = Request::draw(random);
        let demotion = draw_demotion(random, dir);
        let what = format!("{what}: {calls:?} amid {demotion:?}");
        let pause = self.took.mul_f64(1.2 * random.below(1000) as f64 / 1000.0);
        let socket = self.vm.socket().to_owned();
        let start = Instant::now();
        std::thread::scope(|scope| {
            let giving = scope.spawn(|| {
                let ask = |(path, body): &(&str, String)| http(&socket, "PUT", path, body);
                (demotion.iter().map(ask).collect::<Vec<_>>(), start.elapsed())
            });
            std::thread::sleep(pause);
            if let Some((path, body)) = host {
                [&self.vm, &self.twin].iter().for_each(|vm| drop(vm.api_ok("PATCH", path, Some(body.clone()))));
            }
            self.amid += usize::from(!giving.is_finished());
            calls.iter().for_each(|call| self.call(call, &what));
            let (answers, took) = giving.join().unwrap();
            assert!(answers.iter().all(|(status, _)| *status == 200), "{what}: {answers:?}");
            self.took = (self.took + took) / 2;
        });
    }

    /// Both get a request, and must answer the same.
    fn call(&mut self, call: &str, what: &str) {
        let begun = self.vm.begin(call);
        let expected = self.twin.call(call).digest;
        let line = self.vm.finish(&begun);
        assert!(line.starts_with("ok "), "{what}: {line}");
        assert_eq!(Answer::parse(&line).digest, expected, "{what}: the answer to {call}");
    }
}

#[test]
fn a_guest_answers_as_its_twin_does_at_each_moment_of_demotions() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let mut config = config(1, 64);
    config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true,
        "free_page_hinting": true });
    let mut vm = Vm::boot(&config);
    vm.call(&format!("fill pages={FILLED} seed=3"));
    vm.call("balloon op=status");
    let saved = vm.call("check").digest;
    vm.snapshot(&snapshot, &[]);
    drop(vm);
    let seed = seed_of_moments();
    let mut random = Random(seed);
    for way in WAYS {
        let mut twins = Twins::restore(&snapshot, way);
        let all = moments(75).div_ceil(WAYS.len());
        for moment in 0..all {
            let what = format!("TVMM_MOMENTS_SEED={seed}, {way:?}, moment {moment}");
            twins.moment(&mut random, dir.path(), &what);
            if random.below(4) == 0 {
                twins.call("check", &what);
            }
        }
        let Twins { amid, took, .. } = twins;
        println!("{way:?}: {all} moments, {amid} of them before the end of a demotion, which took {took:?}");
        twins.call("check", "at the end");
        let report = twins.vm.api_ok("GET", "/tvmm/report", None);
        assert!(count(&report["restore"], "demotions") >= all as u64, "{way:?}: {report}");
        twins.vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
        assert_eq!(twins.vm.call("check").digest, saved, "{way:?}: the VM goes back");
    }
}
