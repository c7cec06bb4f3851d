//! Restores whose memory is read by RDMA from a page server, where the binary can do it and this host has a device with
//! RoCE v2 (soft-RoCE does; the testbed has one), and what is said where not.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::pools::serve_pages::{QUICK, checked, ends_with, ends_without, exchange, frame, greeting, number};
use crate::skip::skip;
use crate::support::cold::{Proxy, Scene, Server, Spoil};
use crate::support::{TIMEOUT, finish, run, run_err, run_ok, signal, stop, text};

/// Returns true if the binary under test was built with RDMA.
fn is_built_in() -> bool {
    let said = run(&["serve-pages", "--dir", "/proc/nowhere", "--listen", "rdma:127.0.0.1:0"]).stderr;
    !String::from_utf8_lossy(&said).contains("--features rdma")
}

/// An IPv4 address of an RDMA device of this host, as the kernel tells it.
fn address_of_a_device() -> Option<IpAddr> {
    let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    for port in entries(Path::new("/sys/class/infiniband"))
        .flat_map(|device| entries(&device.join("ports")).collect::<Vec<_>>())
    {
        for gid in entries(&port.join("gids")) {
            let kind = port.join("gid_attrs/types").join(gid.file_name().unwrap());
            let is_roce = std::fs::read_to_string(kind).is_ok_and(|kind| kind.trim() == "RoCE v2");
            let address = std::fs::read_to_string(gid).unwrap_or_default().trim().parse::<IpAddr>();
            if let (true, Ok(address)) = (is_roce, address.map(|address| address.to_canonical()))
                && address.is_ipv4()
            {
                return Some(address);
            }
        }
    }
    None
}

/// A scene and where it can be served by RDMA; `None`, with the reason printed, where it cannot.
fn scene() -> Option<(Scene, String)> {
    if !is_built_in() {
        skip!("rdma", "the binary is built without --features rdma");
        return None;
    }
    let Some(address) = address_of_a_device() else {
        skip!("rdma", "no RDMA device of this host has an IPv4 address (RoCE v2)");
        return None;
    };
    Some((Scene::make(), format!("{address}:0")))
}

fn serve(scene: &Scene, address: &str) -> Server {
    Server::start_by("rdma", &scene.pool, address, &[])
}

#[test]
fn rdma_that_cannot_be_had_is_refused_with_what_is_missing() {
    let scene = Scene::make();
    let missing = match (is_built_in(), address_of_a_device()) {
        (false, _) => "--features rdma",
        (true, None) => "this host has no RDMA device",
        (true, Some(_)) => "has the address 127.0.0.1",
    };
    let mut said = vec![run_err(&["serve-pages", "--dir", text(&scene.pool), "--listen", "rdma:127.0.0.1:0"])];
    // A server that there is, at an address that no device has.
    let server = scene.serve("127.0.0.1:0");
    let cold = format!("rdma:{}", server.address);
    let restore = ["restore", "--snapshot", text(&scene.bare), "--policy", "eager", "--run", "check", "--cold", &cold];
    said.push(run_err(&[&restore[..], &QUICK].concat()));
    for said in said {
        assert!(said.contains(missing), "{missing}: {said}");
    }
}

#[test]
fn guest_runs_by_reads_of_a_server_that_sleeps_one_round_trip_per_fault() {
    let Some((scene, address)) = scene() else { return };
    let server = serve(&scene, &address);
    let report = checked(&scene, "firecracker-uffd", &[&server.cold()], &[]);
    let place = &report["cold"]["places"][0];
    let served = &report["fault_ins"]["served"];
    let faults = number(served, "read") + number(served, "write");
    println!("{faults} faults; {place}");
    // Three for the index, two for the connection of the faults.
    assert!(number(place, "round_trips") <= faults + 5, "{place} for {served}");
    assert_eq!(number(place, "connections"), 2, "{place}");
    let report = checked(&scene, "eager", &[&server.cold()], &[]);
    let place = &report["cold"]["places"][0];
    println!("eager: {place}");
    assert!(number(place, "round_trips") < 12, "what is preloaded streams: {place}");
    assert!(number(place, "requests") > number(place, "round_trips"), "several reads are under way: {place}");
    // Once it is connected, no thread of the server has a part in it.
    let mut vm = scene.restore("firecracker-uffd", &[&server.cold()], &[]);
    vm.call("hello");
    stop(server.pid());
    assert_eq!(vm.call("check").digest, scene.digest);
    signal(server.pid(), rustix::process::Signal::CONT);
}

#[test]
fn server_that_is_killed_is_waited_for_and_then_named() {
    let Some((scene, address)) = scene() else { return };
    let mut server = serve(&scene, &address);
    let mut vm = scene.restore("firecracker-uffd", &[&server.cold()], &[]);
    vm.call("hello");
    let address = server.address.clone();
    server.kill();
    let id = vm.begin("check");
    std::thread::sleep(Duration::from_millis(300));
    let server = serve(&scene, &address);
    assert!(vm.finish(&id).contains(&scene.digest));
    drop(vm);
    ends_without(&scene, server);
}

#[test]
fn other_servers_take_over_by_rdma_or_tcp() {
    let Some((scene, address)) = scene() else { return };
    let mut first = serve(&scene, &address);
    let mut second = serve(&scene, &address);
    let both = format!("rdma:{},{}", first.address, second.address);
    let third = scene.serve("127.0.0.1:0");
    let mut vm = scene.restore("firecracker-uffd", &[&both, &third.cold()], &QUICK);
    vm.call("hello");
    first.kill();
    assert_eq!(vm.call("check").digest, scene.digest);
    drop(vm);
    second.kill();
    let report = checked(&scene, "eager", &[&both, &third.cold()], &QUICK);
    assert!(number(&report["cold"]["places"][2], "chunks") > 0, "{report}");
    // It can be asked over TCP as well, and who cannot be read by RDMA says so.
    let server = serve(&scene, &address);
    checked(&scene, "eager", &[&format!("tcp:{}", server.address)], &[]);
    let tcp = Server::start(&scene.pool, &address, &[]);
    let cold = format!("rdma:{}", tcp.address);
    let said =
        run_err(&["restore", "--snapshot", text(&scene.bare), "--policy", "eager", "--run", "hello", "--cold", &cold]);
    assert!(said.contains("cannot be read by RDMA") && said.contains(&cold), "{said}");
}

#[test]
fn spoilt_connections_are_made_again_and_lies_refused() {
    let Some((scene, address)) = scene() else { return };
    let server = serve(&scene, &address);
    let proxy = Proxy::before(&server, Spoil::Nothing);
    let mut vm = scene.restore("firecracker-uffd", &[&proxy.cold()], &QUICK);
    vm.call("hello");
    proxy.cut_all();
    assert_eq!(vm.call("check").digest, scene.digest);
    drop(vm);
    // In the answer to `Attach`, behind greeting and `Opened`; the index comes by another connection and is longer.
    let proxy = Proxy::before(&server, Spoil::Nothing);
    let mut vm = scene.restore("firecracker-uffd", &[&proxy.cold()], &QUICK);
    vm.call("hello");
    proxy.spoil(Spoil::Flip { after: 130, connections: usize::MAX });
    proxy.cut_all();
    vm.begin("check");
    let said = ends_with(&mut vm);
    for part in ["Cannot fetch the page at guest-physical 0x", &proxy.cold(), "checksum"] {
        assert!(said.contains(part), "{said}");
    }
    let mut vm = scene.restore("firecracker-uffd", &[&server.cold()], &[]);
    vm.call("hello");
    // Chunks that are not as stored: a write to the object's file changes the memory that the server lends.
    let object = File::options().write(true).open(scene.object(".chunks")).unwrap();
    let len = object.metadata().unwrap().len();
    object.write_all_at(&vec![0x5a; len as usize], 0).unwrap();
    vm.begin("check");
    let said = ends_with(&mut vm);
    assert!(said.contains("does not have the bytes that its checksum is of"), "{said}");
}

#[test]
fn silent_server_ends_the_vm_in_time() {
    let Some((scene, address)) = scene() else { return };
    let server = serve(&scene, &address);
    let mut vm = scene.restore("firecracker-uffd", &[&server.cold()], &["--fault-timeout", "2"]);
    vm.call("hello");
    // The device goes silent only with its host; a server that does not answer new connections comes near it.
    let proxy = Proxy::before(&server, Spoil::Silence { after: 100 });
    let asked = Instant::now();
    let cold = proxy.cold();
    let args = ["restore", "--snapshot", text(&scene.bare), "--run", "check", "--policy", "eager", "--cold", &cold];
    let said = run_err(&[&args[..], &QUICK].concat());
    assert!(said.contains("has not answered") && said.contains(&cold), "{said}");
    assert!(asked.elapsed() < TIMEOUT / 4);
    assert_eq!(vm.call("check").digest, scene.digest);
}

/// The queue pairs of this host: number, and the thread that made it.
fn queue_pairs() -> Vec<(String, u32)> {
    let output = finish(Command::new("rdma").args(["resource", "show", "qp"]));
    let text = String::from_utf8(output.stdout).unwrap();
    let after = |line: &str, key: &str| {
        let mut words = line.split_whitespace().skip_while(|word| *word != key);
        words.nth(1).map(str::to_owned)
    };
    let of = |line: &str| Some((after(line, "lqpn")?, after(line, "pid")?.parse().ok()?));
    text.lines().filter_map(of).collect()
}

#[test]
fn client_that_disappears_leaves_no_queue_pair_behind() {
    let Some((scene, address)) = scene() else { return };
    if Command::new("rdma").arg("-V").output().is_err() {
        skip!("rdma-tool", "no program rdma (iproute2) that tells of queue pairs");
        return;
    }
    let server = serve(&scene, &address);
    let mut vms: Vec<_> = (0..3).map(|_| scene.restore("firecracker-uffd", &[&server.cold()], &[])).collect();
    vms.iter_mut().for_each(|vm| drop(vm.call("hello")));
    let threads = format!("/proc/{}/task", server.pid());
    let is_servers = |thread: u32| Path::new(&threads).join(thread.to_string()).exists();
    let mut left = queue_pairs();
    left.retain(|(_, thread)| is_servers(*thread));
    assert_eq!(left.len(), 3, "{left:?}");
    vms.iter().for_each(|vm| signal(vm.pid(), rustix::process::Signal::KILL));
    let deadline = Instant::now() + TIMEOUT;
    while !left.is_empty() {
        assert!(Instant::now() < deadline, "these are left: {left:?}");
        std::thread::sleep(Duration::from_millis(50));
        let there = queue_pairs();
        left.retain(|pair| there.contains(pair));
    }
    checked(&scene, "eager", &[&server.cold()], &[]);
}

/// The request to open the snapshot of the scene.
fn open(scene: &Scene) -> Vec<u8> {
    let id = run_ok(&["pool", "ls", text(&scene.pool)]);
    let id: Vec<u8> = (0..32).map(|byte| u8::from_str_radix(&id[byte * 2..byte * 2 + 2], 16).unwrap()).collect();
    frame(1, &id, 32)
}

fn endpoint(fields: [u32; 4]) -> Vec<u8> {
    fields.map(u32::to_le_bytes).concat()
}

fn attach(payload: Vec<u8>) -> Vec<u8> {
    frame(4, &payload, payload.len() as u32)
}

/// KiB that a process has pinned for devices.
fn pinned(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn loan_that_ends_leaves_nothing_registered_and_the_connection_idle() {
    let Some((scene, address)) = scene() else { return };
    let open = open(&scene);
    let attach = attach(endpoint([17, 5, 1024, 16]));
    let connect = |server: &Server, requests: &[&[u8]]| {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.write_all(&[&[&greeting()[..]], requests].concat().concat()).unwrap();
        stream
    };
    let until = |pid: u32, is_so: fn(u64) -> bool| {
        let deadline = Instant::now() + TIMEOUT;
        while !is_so(pinned(pid)) {
            assert!(Instant::now() < deadline, "{} KiB are pinned", pinned(pid));
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let server = serve(&scene, &address);
    // A client that only has the object open keeps no memory registered.
    let _by_tcp = connect(&server, &[&open]);
    let reader = connect(&server, &[&open, &attach]);
    until(server.pid(), |pinned| pinned > 0);
    drop(reader);
    until(server.pid(), |pinned| pinned == 0);

    let server = Server::start_by("rdma", &scene.pool, &address, &["--idle-timeout", "1"]);
    let mut reader = connect(&server, &[&open, &attach]);
    let mut former = connect(&server, &[&open, &attach, &open]);
    former.read_to_end(&mut Vec::new()).expect("the server ends an idle connection");
    std::thread::sleep(Duration::from_millis(1500));
    reader.set_nonblocking(true).unwrap();
    let said = reader.read_to_end(&mut Vec::new()).expect_err("who has a loan may be silent");
    assert_eq!(said.kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn hostile_requests_are_refused_and_what_is_registered_is_bounded() {
    let Some((scene, address)) = scene() else { return };
    let server = serve(&scene, &address);
    let open = open(&scene);
    let good = endpoint([17, 5, 1024, 16]);
    for bytes in [
        // Nothing is open.
        attach(good.clone()),
        [open.clone(), attach(vec![])].concat(),
        [open.clone(), attach(good[..15].to_vec())].concat(),
        [open.clone(), attach(endpoint([1 << 24, 5, 1024, 16]))].concat(),
        [open.clone(), attach(endpoint([17, u32::MAX, 1024, 16]))].concat(),
        [open.clone(), attach(endpoint([17, 5, 1500, 16]))].concat(),
        [open.clone(), attach(endpoint([17, 5, 1024, 0]))].concat(),
        [open.clone(), attach(endpoint([17, 5, 1024, 256]))].concat(),
    ] {
        let answer = exchange(&server, &[greeting(), bytes].concat());
        let text = String::from_utf8_lossy(&answer);
        assert!(text.contains("makes no sense"), "{text:?}");
    }
    // Queue pairs that are nobody's, one after the other on a connection, and a connection with one that opens again.
    let many = [greeting(), open.clone(), attach(good.clone()).repeat(20), open, attach(good)].concat();
    assert!(exchange(&server, &many).len() > 20 * 60, "each is answered");
    checked(&scene, "eager", &[&server.cold()], &[]);

    let bounded = Server::start_by("rdma", &scene.pool, &address, &["--registered", "1"]);
    let cold = bounded.cold();
    let said =
        run_err(&["restore", "--snapshot", text(&scene.bare), "--policy", "eager", "--run", "hello", "--cold", &cold]);
    assert!(said.contains("the page server may register 1 MiB"), "{said}");
    run_err(&["serve-pages", "--dir", text(&scene.pool), "--listen", "tcp:127.0.0.1:0", "--registered", "1"]);
}
