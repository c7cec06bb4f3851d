//! `tvmm serve`: invocations, snapshots, copies and deletions, and the daemon killed among them. When it starts again,
//! all that it had acknowledged is there, and the VMs that it ran are gone.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use fastrand::Rng;
use serde_json::{Value, json};

use super::world::World;
use crate::support::TIMEOUT;
use crate::support::service::{Service, wait_until_gone};

/// The daemon and what it must have.
pub struct Daemon {
    service: Service,
    dir: PathBuf,
    /// By name: the result of the request that is always the same.
    snaps: BTreeMap<String, String>,
    next: u32,
}

/// The most snapshots it has.
const SNAPS_MAX: usize = 8;
const POLICIES: [&str; 5] = ["eager", "firecracker", "firecracker-uffd", "catalyzer", "trenv"];

impl Daemon {
    fn start(dir: PathBuf) -> Daemon {
        let service = Service::start(&dir, &["--shells", "1", "--max-vms", "6"]);
        let function = json!({ "func_name": "touch", "mem_size": 64, "prepare": "fill pages=512 seed=1",
        "track_dirty_pages": true });
        service.ok("POST", "/functions", Some(function));
        Daemon { service, dir, snaps: BTreeMap::new(), next: 0 }
    }

    fn fresh(&mut self) -> String {
        self.next += 1;
        format!("s{}.{}", self.next / 2, self.next)
    }

    fn any(&self, rng: &mut Rng) -> Option<String> {
        let number = rng.usize(..);
        (!self.snaps.is_empty()).then(|| self.snaps.keys().nth(number % self.snaps.len()).unwrap().clone())
    }

    fn invoke(&self, more: &Value, params: &str) -> Value {
        let mut body = json!({ "func_name": "touch", "params": params, "keep": false });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.service.invoke(body)
    }

    /// The result of the request that is always the same, in a VM restored from the snapshot.
    fn result(&self, name: &str, policy: &str) -> String {
        digest(&self.invoke(&json!({ "ssId": name, "policy": policy }), "pages=256 stride=2 write=0"))
    }

    /// All that was acknowledged is there.
    fn check(&self, policy: &str) {
        let there = self.service.get("/snapshots");
        for (name, result) in &self.snaps {
            assert!(there.as_array().unwrap().iter().any(|snap| snap["ssId"] == **name), "{name} is lost: {there}");
            assert_eq!(self.result(name, policy), *result, "{name} by {policy}");
        }
    }
}

fn digest(answer: &Value) -> String {
    answer["result"].as_str().expect("a result").split(' ').next().unwrap().to_string()
}

/// At the end of a run.
pub fn check(world: &mut World) {
    if let Some(daemon) = &world.service {
        daemon.check("eager");
    }
}

pub fn invocations(world: &mut World, rng: &mut Rng) {
    let mut daemon = world.service.take().unwrap_or_else(|| Daemon::start(world.dir().join("serve")));
    for _ in 0..rng.u32(2..6) {
        let policy = POLICIES[rng.usize(..POLICIES.len())];
        match rng.u32(..8) {
            0 | 1 => invoke(&mut daemon, rng, policy),
            2 | 3 => hibernate(&mut daemon, rng, policy),
            4 => copy(&mut daemon, rng),
            5 => delete(&mut daemon, rng),
            6 => kill(world, &mut daemon, rng, policy),
            _ => record(&daemon, rng),
        }
        world.count("requests to serve");
    }
    world.service = Some(daemon);
}

fn invoke(daemon: &mut Daemon, rng: &mut Rng, policy: &str) {
    let Some(name) = daemon.any(rng) else { return hibernate(daemon, rng, policy) };
    assert_eq!(daemon.result(&name, policy), daemon.snaps[&name], "{name} by {policy}");
}

/// Restores a snapshot or boots, changes memory, and makes a snapshot of that.
fn hibernate(daemon: &mut Daemon, rng: &mut Rng, policy: &str) {
    if daemon.snaps.len() >= SNAPS_MAX {
        return delete(daemon, rng);
    }
    let from = daemon.any(rng);
    let params = format!("pages={} write={} seed={}", rng.u32(1..300), rng.u32(0..=100), rng.u32(..));
    let vm = match &from {
        Some(name) => daemon.invoke(&json!({ "ssId": name, "policy": policy, "keep": true }), &params),
        None => daemon.service.ok("POST", "/vms", Some(json!({ "func_name": "touch" }))),
    };
    let vm = vm["vmId"].as_str().expect("a VM").to_string();
    let kind = if from.is_some() && rng.bool() { "Diff" } else { "Full" };
    let name = daemon.fresh();
    let body = json!({ "vmId": vm, "ssId": name, "snapshot_type": kind });
    let (status, answer) = daemon.service.ask("POST", "/snapshots", Some(body));
    assert!(status == 200, "{kind} {name} of a VM of {from:?}: {status} {answer}");
    let result = digest(&daemon.invoke(&json!({ "vmId": vm }), "pages=256 stride=2 write=0"));
    daemon.service.ok("DELETE", &format!("/vms/{vm}"), None);
    assert_eq!(daemon.result(&name, policy), result, "{name} by {policy}");
    daemon.snaps.insert(name, result);
}

fn copy(daemon: &mut Daemon, rng: &mut Rng) {
    let Some(from) = daemon.any(rng).filter(|_| daemon.snaps.len() < SNAPS_MAX) else { return };
    let name = daemon.fresh();
    daemon.service.ok("PUT", &format!("/snapshots?from_snapshot={from}&ssId={name}"), None);
    let result = daemon.snaps[&from].clone();
    daemon.snaps.insert(name, result);
}

/// One that others are relative to may be refused.
fn delete(daemon: &mut Daemon, rng: &mut Rng) {
    let Some(name) = daemon.any(rng) else { return };
    let (status, answer) = daemon.service.ask("DELETE", &format!("/snapshots/{name}"), None);
    match status {
        200 => drop(daemon.snaps.remove(&name)),
        409 => {}
        _ => panic!("DELETE {name}: {status} {answer}"),
    }
}

fn record(daemon: &Daemon, rng: &mut Rng) {
    let Some(name) = daemon.any(rng) else { return };
    let body = json!({ "params": format!("pages={} write=10", rng.u32(1..200)) });
    daemon.service.ok("POST", &format!("/snapshots/{name}/profile"), Some(body));
    for policy in ["reap", "tiered"] {
        assert_eq!(daemon.result(&name, policy), daemon.snaps[&name], "{name} by {policy}");
    }
}

/// Kills the daemon in the middle of a request, and starts it again.
fn kill(world: &mut World, daemon: &mut Daemon, rng: &mut Rng, policy: &str) {
    let name = daemon.fresh();
    let (path, body) = match daemon.any(rng) {
        Some(from) if rng.bool() => (format!("PUT /snapshots?from_snapshot={from}&ssId={name}"), json!({})),
        Some(from) => {
            let body = json!({ "func_name": "touch", "params": "pages=9", "ssId": from, "policy": policy });
            ("POST /invocations".to_string(), body)
        }
        None => ("POST /vms".to_string(), json!({ "func_name": "touch" })),
    };
    let children = daemon.service.children();
    let body = body.to_string();
    let head = "HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length:";
    let mut client = UnixStream::connect(daemon.service.socket()).expect("the service answers");
    client.write_all(format!("{path} {head} {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
    client.set_read_timeout(Some(TIMEOUT)).unwrap();
    std::thread::sleep(world.moment("serve", rng));
    daemon.service.kill();
    world.count("kills");
    let mut answer = Vec::new();
    let _ = client.read_to_end(&mut answer);
    children.into_iter().for_each(wait_until_gone);
    let snaps = std::mem::take(&mut daemon.snaps);
    let next = daemon.next;
    *daemon = Daemon { snaps, next, ..Daemon::start(daemon.dir.clone()) };
    let copied = path.starts_with("PUT") && answer.starts_with(b"HTTP/1.1 200");
    let there = daemon.service.get("/snapshots");
    let is_there = there.as_array().unwrap().iter().any(|snap| snap["ssId"] == *name);
    assert!(is_there || !copied, "{name} was acknowledged and is not there");
    if is_there {
        let from = path.split(['=', '&']).nth(1).expect("a copy");
        let result = daemon.snaps[from].clone();
        daemon.snaps.insert(name, result);
    }
    daemon.check(policy);
}
