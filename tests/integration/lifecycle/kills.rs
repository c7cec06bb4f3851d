//! kill -9 at random moments of a fork, a rewind, a repurposing and a live snapshot, and of a service during each. All
//! that survives is whole, and nothing is left of the rest. `TVMM_KILLS=200` makes so many kills of each kind.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::fork::{Place, guest, process_of, state};
use super::rewind::{image, with_drive};
use crate::support::pool::{Pool, filled};
use crate::support::service::{Service, processes_of, wait_until, wait_until_gone};
use crate::support::{Random, TIMEOUT, Vm, config, exchange_over, rounds, run_ok, scratch, signal, text};

/// The moments of the kills of one kind, drawn from a bit more than the time that the operation takes undisturbed.
struct Moments {
    kind: &'static str,
    random: Random,
    took: Duration,
    kills: usize,
    before_answer: usize,
}

impl Moments {
    fn new(kind: &'static str, seed: u64) -> Moments {
        Moments { kind, random: Random(seed), took: Duration::ZERO, kills: 0, before_answer: 0 }
    }

    /// The rounds to make: the first is not disturbed.
    fn rounds() -> usize {
        1 + std::env::var("TVMM_KILLS").map_or(rounds(8), |text| text.parse().expect("TVMM_KILLS is a number"))
    }

    /// Sends `asked` and waits for the moment of the kill; in the first round for the answer.
    fn wait(&mut self, ask: impl FnOnce() -> Asked) -> Asked {
        let start = Instant::now();
        let mut asked = ask();
        if self.took == Duration::ZERO {
            let answer = asked.answer().expect("an undisturbed request is answered");
            assert!(matches!(answer.0, 200 | 204), "{}: {answer:?}", self.kind);
            self.took = start.elapsed();
        } else {
            self.kills += 1;
            std::thread::sleep(self.took.mul_f64(1.3 * self.random.below(1000) as f64 / 1000.0));
        }
        asked
    }

    /// Notes whether the answer came before the kill. About a quarter shall: so later kills come later or earlier.
    fn note(&mut self, is_answered: bool) {
        if is_answered {
            self.took = self.took.mul_f64(0.75);
        } else {
            self.before_answer += 1;
            self.be_later();
        }
    }

    /// Makes later kills come later.
    fn be_later(&mut self) {
        self.took = self.took.mul_f64(1.1);
    }
}

impl Drop for Moments {
    fn drop(&mut self) {
        println!(
            "{}: {} kills within {:?}, {} before the answer",
            self.kind, self.kills, self.took, self.before_answer
        );
    }
}

/// A request whose sender does not wait.
struct Asked {
    stream: UnixStream,
    answer: Option<(u16, Value)>,
}

impl Asked {
    fn put(socket: &Path, path: &str, body: &Value) -> Asked {
        Asked::send(socket, &format!("PUT {path}"), body)
    }

    /// Sends a request whose method and path are `what`.
    fn send(socket: &Path, what: &str, body: &Value) -> Asked {
        let body = body.to_string();
        let head = format!("{what} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n");
        let mut stream = UnixStream::connect(socket).expect("the socket answers");
        let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all(request.as_bytes()).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Asked { stream, answer: None }
    }

    /// Status and body; `None` if the process was killed before it had written all of them.
    fn answer(&mut self) -> Option<(u16, Value)> {
        if self.answer.is_none() {
            let mut bytes = Vec::new();
            let _ = self.stream.read_to_end(&mut bytes);
            let answer = String::from_utf8_lossy(&bytes).into_owned();
            let (head, body) = answer.split_once("\r\n\r\n")?;
            let status = head.split(' ').nth(1)?.parse().ok()?;
            let body = if body.is_empty() { Value::Null } else { serde_json::from_str(body).ok()? };
            self.answer = Some((status, body));
        }
        self.answer.clone()
    }
}

/// The names in a directory that end so.
fn ending(dir: &Path, suffix: &str) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    names.filter(|name| name.ends_with(suffix)).collect()
}

/// Checks that the pool is whole, and that no VM that was killed holds pages of it.
fn empty(pool: &Pool, snapshots: &[&str]) {
    pool.ok("fsck", &[]);
    snapshots.iter().for_each(|name| drop(pool.ok("rm", &[name])));
    let freed = pool.json("gc", &[]);
    assert!(freed["pages"].as_u64().unwrap() >= 1500 && freed["held"] == 0, "{freed}");
}

const CHILDREN: u32 = 3;

/// The sockets of the children of a fork of this name, and of their vsock devices.
fn sockets(place: &Place, name: &str) -> Vec<(PathBuf, PathBuf)> {
    let numbers = 1..=CHILDREN;
    numbers.map(|n| (place.path(&format!("{name}-{n}.sock")), place.path(&format!("v-{name}-{n}")))).collect()
}

/// Returns whether a VM says that its guest runs. The VM may end meanwhile.
fn runs(socket: &Path) -> bool {
    let Ok(stream) = UnixStream::connect(socket) else { return false };
    let answer = exchange_over(stream, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    answer.contains(r#""state":"Running""#)
}

/// Kills the children that live, after a look at their memory.
fn check_and_kill(sockets: &[(PathBuf, PathBuf)], content: &str) {
    for (socket, vsock) in sockets {
        let Some(pid) = process_of(socket) else { continue };
        assert_eq!(state(socket), "Running");
        assert_eq!(guest(vsock, "check").digest, content, "the child has the memory of the fork");
        signal(pid, Signal::KILL);
        wait_until("the child has ended", || process_of(socket).is_none());
    }
}

#[test]
fn a_parent_killed_in_a_fork_leaves_all_children_or_none() {
    let place = Place(scratch());
    let mut moments = Moments::new("parents of forks", 23);
    for round in 0..Moments::rounds() {
        let vm = place.boot(|_| {});
        guest(&place.path("v"), &format!("fill pages=800 seed={round}"));
        let content = guest(&place.path("v"), "check").digest;
        let name = format!("k{round}");
        let sockets = sockets(&place, &name);
        let mut body = place.body(&name, CHILDREN);
        body["live"] = json!(round % 2 == 1);
        let mut asked = moments.wait(|| Asked::put(vm.socket(), "/tvmm/fork", &body));
        drop(vm.kill());
        let answer = asked.answer();
        moments.note(answer.is_some());
        let is_gone =
            |(socket, vsock): &(PathBuf, PathBuf)| process_of(socket).is_none() && !socket.exists() && !vsock.exists();
        // Children may be at any step on their way to their guest, or to their end.
        wait_until("all children run, or none is left", || {
            sockets.iter().all(|(socket, _)| runs(socket)) || sockets.iter().all(is_gone)
        });
        let acknowledged = answer.is_some_and(|(status, _)| status == 200);
        assert!(!acknowledged || sockets.iter().all(|child| !is_gone(child)), "the children were acknowledged");
        check_and_kill(&sockets, &content);
        std::fs::remove_file(place.path("v")).unwrap();
    }
    let vm = place.boot(|_| {});
    // A child that had no socket yet when its parent was killed may use a fork point until it ends.
    let children = RefCell::new(Vec::new());
    wait_until("fork points without users are swept", || {
        let mut children = children.borrow_mut();
        let name = format!("last{}", children.len());
        children.push(place.fork(vm.socket(), &name, 1));
        place.fork_points().len() == children.len()
    });
    assert_eq!(ending(place.0.path(), ".partial"), Vec::<String>::new());
}

#[test]
fn a_child_killed_in_a_fork_ends_the_fork_or_itself_alone() {
    let place = Place(scratch());
    let vm = place.boot(|_| {});
    guest(&place.path("v"), "fill pages=800 seed=1");
    let content = guest(&place.path("v"), "check").digest;
    let mut moments = Moments::new("children of forks", 29);
    let mut failed = 0;
    for round in 0..Moments::rounds() {
        let name = format!("k{round}");
        let sockets = sockets(&place, &name);
        let former = place.fork_points();
        let body = place.body(&name, CHILDREN);
        let mut asked = moments.wait(|| Asked::put(vm.socket(), "/tvmm/fork", &body));
        let victim = &sockets[moments.random.below(u64::from(CHILDREN)) as usize];
        let killed = process_of(&victim.0);
        if let Some(pid) = killed {
            signal(pid, Signal::KILL);
            wait_until_gone(pid);
        }
        let (status, answer) = asked.answer().expect("the parent answers");
        match killed {
            Some(_) => moments.note(status == 200),
            // It had not been started yet.
            None => moments.be_later(),
        }
        if status == 200 {
            assert_eq!(answer["children"].as_array().unwrap().len(), CHILDREN as usize);
            check_and_kill(&sockets, &content);
        } else {
            failed += 1;
            let fault = answer["fault_message"].as_str().unwrap_or_default();
            assert!(fault.starts_with("Cannot fork the VM: the child for "), "{status} {answer}");
            wait_until("no child is left", || sockets.iter().all(|(socket, _)| process_of(socket).is_none()));
            assert!(sockets.iter().all(|(socket, vsock)| !socket.exists() && !vsock.exists()), "sockets are left");
            // A former one may be left: a process that ends holds its lock for a moment longer.
            assert!(place.fork_points().iter().all(|point| former.contains(point)), "the fork point is left");
        }
        assert_eq!((vm.state().as_str(), &guest(&place.path("v"), "check").digest), ("Running", &content));
    }
    println!("{failed} forks failed by the end of a child");
    let forks = vm.api_ok("GET", "/tvmm/report", None)["forks"].clone();
    assert_eq!((&forks["failed"], &forks["done"]), (&json!(failed), &json!(Moments::rounds() - failed)));
}

#[test]
fn a_vm_killed_in_a_rewind_leaves_its_snapshot_and_its_pool_whole() {
    let dir = scratch();
    let pool = Pool::create("1");
    let image = image(dir.path());
    let mut vm = Vm::boot(&with_drive(&image, false));
    vm.call("blk op=write sectors=64 seed=1 chunk=64");
    vm.call("fill pages=2000 seed=1");
    let digest = vm.call("check").digest;
    let snapshot = dir.path().join("snapshot");
    vm.snapshot(&snapshot, &["--copy-drives"]);
    drop(vm);
    pool.add(&snapshot);
    let pooled = ["trenv", "--in-place-mapping", "shared", "--pool", pool.path()];
    let ways: [&[&str]; 4] = [&["firecracker"], &["eager"], &["firecracker-uffd"], &pooled];
    let mut moments = Moments::new("rewinds", 31);
    for round in 0..Moments::rounds() {
        let drives = dir.path().join("drives");
        std::fs::create_dir(&drives).unwrap();
        let way = ways[round % ways.len()];
        let mut vm = Vm::restore_with(&snapshot, way[0], &[&way[1..], &["--drive-dir", text(&drives)]].concat());
        vm.wait_for_socket();
        assert_eq!(vm.call("check").digest, digest, "round {round}, {way:?}");
        assert_eq!(vm.call("blk op=check sectors=64 seed=1 chunk=64").number("bad"), 0);
        vm.call(&format!("touch pages=1500 write=100 seed={round}"));
        vm.call("blk op=write sectors=64 seed=9 chunk=64");
        let body = json!({ "verify": moments.random.below(2) == 0 });
        let mut asked = moments.wait(|| Asked::put(vm.socket(), "/tvmm/rewind", &body));
        drop(vm.kill());
        moments.note(asked.answer().is_some());
        std::fs::remove_dir_all(&drives).unwrap();
    }
    run_ok(&["inspect", text(&snapshot)]);
    empty(&pool, &["snapshot"]);
}

#[test]
fn a_vm_killed_in_a_repurposing_leaves_both_snapshots_and_their_pool_whole() {
    let dir = scratch();
    let pool = Pool::create("1");
    let snapshots: Vec<(PathBuf, String)> = (0..2)
        .map(|number| {
            let path = dir.path().join(number.to_string());
            let digest = filled(&path, 1500, number + 1);
            pool.add(&path);
            (path, digest)
        })
        .collect();
    let ways = [
        json!({ "policy": "firecracker" }),
        json!({ "policy": "eager" }),
        json!({ "policy": "firecracker-uffd" }),
        json!({ "policy": "trenv", "pools": [pool.path()], "in_place_mapping": "shared" }),
    ];
    let mut moments = Moments::new("repurposings", 37);
    for round in 0..Moments::rounds() {
        let (snapshot, digest) = &snapshots[round % 2];
        let mut vm = pool.restore(snapshot, "trenv", &[]);
        vm.wait_for_socket();
        assert_eq!(vm.call("check").digest, *digest, "round {round}");
        vm.call(&format!("touch pages=1000 write=100 seed={round}"));
        let body = json!({ "snapshot_path": snapshots[(round + 1) % 2].0, "resume_vm": true,
            "tvmm": ways[round % ways.len()], "compare": moments.random.below(2) == 0 });
        let mut asked = moments.wait(|| Asked::put(vm.socket(), "/tvmm/repurpose", &body));
        drop(vm.kill());
        moments.note(asked.answer().is_some());
    }
    for (snapshot, digest) in &snapshots {
        run_ok(&["inspect", text(snapshot)]);
        assert_eq!(Vm::restore(snapshot, "eager").call("check").digest, *digest);
    }
    empty(&pool, &["0", "1"]);
}

#[test]
fn a_vm_killed_in_a_live_snapshot_leaves_a_whole_one_or_none() {
    let dir = scratch();
    let base = dir.path().join("base");
    let digest = filled(&base, 6000, 1);
    let out = dir.path().join("out");
    let mut moments = Moments::new("live snapshots", 41);
    for round in 0..Moments::rounds() {
        let policy = ["firecracker", "eager", "firecracker-uffd", "trenv"][round % 4];
        let mut vm = Vm::restore_with(&base, policy, &[]);
        assert_eq!(vm.call("check").digest, digest, "round {round}");
        vm.call(&format!("touch pages=3000 write=100 seed={round}"));
        let now = vm.call("check").digest;
        vm.wait_for_socket();
        let kind = if moments.random.below(2) == 0 { "Full" } else { "Diff" };
        let body = json!({ "snapshot_path": out, "snapshot_type": kind, "tvmm": { "live": true } });
        let mut asked = moments.wait(|| Asked::put(vm.socket(), "/snapshot/create", &body));
        drop(vm.kill());
        let answer = asked.answer();
        moments.note(answer.is_some());
        assert!(out.exists() || answer.is_none(), "round {round}: {answer:?}");
        assert!(ending(dir.path(), ".partial").len() <= 1, "the next writer of the name sweeps");
        if out.exists() {
            run_ok(&["inspect", text(&out)]);
            assert_eq!(Vm::restore(&out, "eager").call("check").digest, now, "round {round}, {kind}");
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
    Vm::boot(&config(1, 64)).snapshot(&out, &[]);
    assert_eq!(ending(dir.path(), ".partial"), Vec::<String>::new());
}

/// A service that is killed and started again over one directory, and what it has acknowledged.
struct Restarted {
    state: PathBuf,
    /// By name: what a restored VM answers to [`Restarted::result`].
    snapshots: BTreeMap<String, String>,
}

impl Restarted {
    fn start(&self) -> Service {
        Service::start(&self.state, &["--shells", "1"])
    }

    /// The answer of a VM restored from a snapshot, or of a running one, to a request that is always the same.
    fn result(service: &Service, key: &str, name: &str) -> String {
        let answer = service.invoke(json!({ "func_name": "touch", "params": "pages=256 stride=2 write=0", key: name,
            "keep": key == "vmId" }));
        answer["result"].as_str().unwrap().split(' ').next().unwrap().to_string()
    }

    /// Makes the function `touch` have VMs that stand by, and after an answer end (their processes may serve further
    /// VMs) or go back to their snapshot.
    fn put_touch(service: &Service, after: &str) {
        let function = json!({ "func_name": "touch", "mem_size": 64, "prepare": "fill pages=512 seed=1",
            "standby": { "min": 1, "max": 2 }, "after": after });
        service.ok("POST", "/functions", Some(function));
    }

    /// Begins the operation of this round, and returns at the moment of the kill.
    fn operate(&self, round: usize, service: &Service, vm: &str, moments: &mut Moments) -> Asked {
        let after = match round % 6 {
            3 => "rewind",
            5 => "end",
            _ => return moments.wait(|| self.ask(round, service, vm)),
        };
        Restarted::put_touch(service, after);
        let state = || service.get("/functions/touch")["standby_state"]["ready"].as_u64().unwrap();
        wait_until("a VM stands by", || state() > 0);
        let touch = json!({ "func_name": "touch", "params": "pages=200 write=100" });
        let mut asked = Asked::send(service.socket(), "POST /invocations", &touch);
        let (status, answer) = asked.answer().expect("an answer");
        assert_eq!((status, &answer["ok"]), (200, &json!(true)), "{answer}");
        std::thread::sleep(Duration::from_micros(moments.random.below(60_000)));
        asked
    }

    fn ask(&self, round: usize, service: &Service, vm: &str) -> Asked {
        let fork = format!("POST /vms/{vm}/fork");
        let live = json!({ "vmId": vm, "ssId": format!("s{round}"), "live": true });
        let socket = service.socket();
        match round % 6 {
            0 => Asked::send(socket, "POST /snapshots", &live),
            1 => Asked::send(socket, &fork, &json!({ "count": CHILDREN })),
            2 => Asked::send(socket, &format!("POST /vms/{vm}/rewind"), &json!({ "verify": true })),
            _ => Asked::send(socket, &fork, &json!({ "count": CHILDREN, "live": true })),
        }
    }

    /// Files of the directory that end with VMs.
    fn run_files(&self) -> Vec<String> {
        ending(&self.state.join("run"), "")
    }

    /// Checks that a new service has removed what a killed one has left.
    fn check_swept(&self, former: &[String]) {
        let left: Vec<String> = self.run_files().into_iter().filter(|name| former.contains(name)).collect();
        assert_eq!(left, Vec::<String>::new());
        for folder in ["", "snapshots", "run", "profiles"] {
            assert_eq!(ending(&self.state.join(folder), ".partial"), Vec::<String>::new(), "{folder}");
        }
    }
}

#[test]
fn a_service_killed_in_an_operation_leaves_no_process_and_keeps_what_it_has_acknowledged() {
    let dir = scratch();
    let mut restarted = Restarted { state: dir.path().join("state"), snapshots: BTreeMap::new() };
    let service = restarted.start();
    let booted = service.snapshot_touch("base");
    service.ok("DELETE", &format!("/vms/{booted}"), None);
    restarted.snapshots.insert("base".into(), Restarted::result(&service, "ssId", "base"));
    Restarted::put_touch(&service, "rewind");
    drop(service);
    let mut moments = Moments::new("services", 43);
    for round in 0..Moments::rounds() {
        let mut service = restarted.start();
        let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "touch", "ssId": "base" })));
        let vm = vm["vmId"].as_str().unwrap().to_string();
        service
            .invoke(json!({ "func_name": "touch", "params": format!("pages=300 write=100 seed={round}"), "vmId": vm }));
        let result = Restarted::result(&service, "vmId", &vm);
        let mut asked = restarted.operate(round, &service, &vm, &mut moments);
        let former = restarted.run_files();
        service.kill();
        let answer = asked.answer();
        if !matches!(round % 6, 3 | 5) {
            moments.note(answer.is_some());
        }
        wait_until("no process is left", || processes_of(&restarted.state).is_empty());
        let service = restarted.start();
        restarted.check_swept(&former);
        let name = format!("s{round}");
        let there = service.get("/snapshots");
        let is_there = there.as_array().unwrap().iter().any(|snap| snap["ssId"] == *name);
        let acknowledged = round % 6 == 0 && answer.is_some_and(|(status, _)| status == 200);
        assert!(is_there || !acknowledged, "{name} was acknowledged and is not there");
        if is_there {
            restarted.snapshots.insert(name, result);
        }
        let (name, result) = restarted.snapshots.iter().nth(round % restarted.snapshots.len()).unwrap();
        assert_eq!(Restarted::result(&service, "ssId", name), *result, "round {round}: {name}");
    }
    let service = restarted.start();
    for (name, result) in &restarted.snapshots {
        assert_eq!(Restarted::result(&service, "ssId", name), *result, "{name}");
    }
}
