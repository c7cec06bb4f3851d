//! Restores whose memory comes from a page server, and what happens when that is killed, slow, lying, restarted, or no
//! page server at all.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::cold::{Proxy, Scene, Server, Spoil};
use crate::support::{TIMEOUT, Vm, run, run_err, run_ok, stop, text, without_progress};

pub const QUICK: [&str; 2] = ["--fault-timeout", "2"];

/// Waits for tvmm to end; what it says, in one line, with exit code 1.
pub fn ends_with(vm: &mut Vm) -> String {
    let (status, stderr) = vm.wait();
    let stderr = without_progress(&stderr);
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

/// Runs `check` in a clone without memory; the report.
pub fn checked(scene: &Scene, policy: &str, cold: &[&str], more: &[&str]) -> Value {
    let out = scene.dir.path().join("report.json");
    let mut args = vec!["restore", "--snapshot", text(&scene.bare), "--policy", policy, "--run", "check"];
    args.extend(["--report", text(&out)]);
    args.extend(cold.iter().flat_map(|cold| ["--cold", cold]));
    args.extend(more);
    let said = run_ok(&args);
    assert!(said.contains(&scene.digest), "{policy}: {said}");
    serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap()
}

pub fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("no {key} in {value}"))
}

#[test]
fn guest_runs_from_a_page_server_with_at_most_two_round_trips_per_fault() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let report = checked(&scene, "firecracker-uffd", &[&server.cold()], &[]);
    let place = &report["cold"]["places"][0];
    let served = &report["fault_ins"]["served"];
    let faults = number(served, "read") + number(served, "write");
    // A connection for the index (3) and one for faults (1) besides.
    assert!(number(place, "round_trips") <= faults + 4, "{place} for {served}");
    assert_eq!(number(place, "connections"), 2, "{place}");
    let report = checked(&scene, "eager", &[&server.cold()], &[]);
    let place = &report["cold"]["places"][0];
    assert!(number(place, "round_trips") < 10, "what is preloaded streams: {place}");
}

#[test]
fn server_that_is_restarted_goes_unnoticed_by_the_guest() {
    let scene = Scene::make();
    let mut server = scene.serve("127.0.0.1:0");
    let mut vm = scene.restore("firecracker-uffd", &[&server.cold()], &[]);
    vm.call("hello");
    let address = server.address.clone();
    server.kill();
    let id = vm.begin("check");
    std::thread::sleep(Duration::from_millis(300));
    let _server = scene.serve(&address);
    assert!(vm.finish(&id).contains(&scene.digest));
}

#[test]
fn server_that_is_gone_for_good_ends_the_vm_naming_page_and_server() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    ends_without(&scene, server);
}

/// A VM whose only server is killed ends, and says which page it could not get from whom.
pub fn ends_without(scene: &Scene, mut server: Server) {
    let mut vm = scene.restore("firecracker-uffd", &[&server.cold()], &QUICK);
    vm.call("hello");
    server.kill();
    vm.begin("check");
    let said = ends_with(&mut vm);
    for part in ["Cannot fetch the page at guest-physical 0x", &server.cold(), "cannot be connected to", "attempts in"]
    {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn other_servers_take_over_and_share_the_load() {
    let scene = Scene::make();
    let mut first = scene.serve("127.0.0.1:0");
    let second = scene.serve("127.0.0.1:0");
    let both = format!("tcp:{},{}", first.address, second.address);
    let mut vm = scene.restore("firecracker-uffd", &[&both], &QUICK);
    vm.call("hello");
    first.kill();
    assert_eq!(vm.call("check").digest, scene.digest);
    drop(vm);
    // The first is gone from the beginning; also as a pool of its own.
    checked(&scene, "firecracker", &[&both], &QUICK);
    checked(&scene, "firecracker", &[&first.cold(), &second.cold()], &QUICK);
    let first = scene.serve("127.0.0.1:0");
    let both = format!("tcp:{},{}", first.address, second.address);
    let report = checked(&scene, "eager", &[&both], &[]);
    let [a, b] = [0, 1].map(|place| number(&report["cold"]["places"][place], "bytes_pages"));
    assert!(a > 0 && b > 0, "both give: {a} and {b} bytes");
}

#[test]
fn lies_are_never_run_and_one_lie_is_asked_again() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    // Behind greeting, `Opened` and the header of the first chunk.
    let after = 3000;
    let proxy = Proxy::before(&server, Spoil::Nothing);
    let mut vm = scene.restore("firecracker-uffd", &[&proxy.cold()], &QUICK);
    proxy.spoil(Spoil::Flip { after: after + 200_000, connections: 2 });
    assert_eq!(vm.call("check").digest, scene.digest);
    drop(vm);
    let seen = proxy.connections.load(std::sync::atomic::Ordering::SeqCst);
    assert!(seen >= 3, "the flipped answer cost a connection: {seen}");

    let proxy = Proxy::before(&server, Spoil::Nothing);
    let mut vm = scene.restore("firecracker-uffd", &[&proxy.cold()], &QUICK);
    vm.call("hello");
    proxy.spoil(Spoil::Flip { after, connections: usize::MAX });
    // The connection that is there has passed that place.
    proxy.cut_all();
    vm.begin("check");
    let said = ends_with(&mut vm);
    for part in ["Cannot fetch the page at guest-physical 0x", &proxy.cold(), "checksum"] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn liar_is_left_for_another_server() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let liar = Proxy::before(&server, Spoil::Nothing);
    let both = format!("tcp:{},{}", liar.address, server.address);
    liar.spoil(Spoil::Flip { after: 100_000, connections: usize::MAX });
    let report = checked(&scene, "firecracker-uffd", &[&both], &QUICK);
    let places = &report["cold"]["places"];
    assert!(number(&places[0], "damaged") > 0 && number(&places[1], "chunks") > 0, "{places}");
}

#[test]
fn connections_that_break_or_close_by_half_are_made_again() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let after = 150_000;
    let connections = 6;
    for spoil in [Spoil::Cut { after, connections }, Spoil::HalfClose { after, connections }] {
        for policy in ["firecracker-uffd", "eager"] {
            let proxy = Proxy::before(&server, spoil);
            let report = checked(&scene, policy, &[&proxy.cold()], &QUICK);
            let place = &report["cold"]["places"][0];
            assert!(number(place, "retries") > 1, "{spoil:?}, {policy}: {place}");
        }
    }
}

#[test]
fn slow_server_is_waited_for_and_a_silent_one_is_not() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let proxy = Proxy::before(&server, Spoil::Delay(Duration::from_millis(20)));
    checked(&scene, "eager", &[&proxy.cold()], &[]);
    let mut vm = scene.restore("firecracker-uffd", &[&proxy.cold()], &["--fault-timeout", "1"]);
    vm.call("hello");
    proxy.spoil(Spoil::Silence { after: 0 });
    let asked = Instant::now();
    vm.begin("check");
    let said = ends_with(&mut vm);
    assert!(said.contains("guest-physical 0x") && said.contains(&proxy.cold()), "{said}");
    assert!(asked.elapsed() < Duration::from_secs(20));
    // With another server, silence is a failure like any other.
    let both = format!("tcp:{},{}", proxy.address, server.address);
    checked(&scene, "firecracker-uffd", &[&both], &QUICK);
}

#[test]
fn vm_whose_server_is_silent_can_be_ended_by_a_signal() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let mut vm = scene.restore("firecracker-uffd", &[&server.cold()], &[]);
    vm.call("hello");
    stop(server.pid());
    vm.begin("check");
    std::thread::sleep(Duration::from_millis(300));
    let asked = Instant::now();
    let (status, stderr) = vm.terminate();
    assert!(status.success(), "{stderr}");
    assert!(asked.elapsed() < Duration::from_secs(20));
}

#[test]
fn background_install_streams_and_survives_a_broken_connection() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let profile = scene.dir.path().join("p.profile");
    let snapshot = text(&scene.snapshot);
    run_ok(&["profile", "record", "--snapshot", snapshot, "--run", "hello", "--out", text(&profile)]);
    let proxy = Proxy::before(&server, Spoil::Cut { after: 700_000, connections: 4 });
    let report = checked(&scene, "aquifer", &[&proxy.cold()], &["--profile", text(&profile)]);
    assert!(number(&report["fault_ins"]["served"], "pages_ahead") > 0, "{report}");
}

#[test]
fn cache_directory_keeps_what_was_fetched_within_its_bounds_and_is_not_trusted() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let cache = scene.dir.path().join("cache");
    let restore = |size: &str| {
        let more = ["--cold-cache", text(&cache), "--cold-cache-size", size];
        let report = checked(&scene, "firecracker-uffd", &[&server.cold()], &more);
        let place = &report["cold"]["places"][0];
        (number(place, "chunks"), number(place, "cached"))
    };
    let (chunks, cached) = restore("64");
    assert!(chunks > 0 && cached == 0, "{cached} of {chunks}");
    let (again, cached) = restore("64");
    assert_eq!((again, cached), (chunks, chunks));
    // A bit flipped, a file cut, something else under the name of a chunk.
    let mut files: Vec<_> = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut bytes = std::fs::read(&files[0]).unwrap();
    bytes[7] ^= 1;
    std::fs::write(&files[0], bytes).unwrap();
    std::fs::write(&files[1], "short").unwrap();
    std::fs::remove_file(&files[2]).unwrap();
    std::fs::create_dir(&files[2]).unwrap();
    assert_eq!(restore("64").1, chunks - 3);
    let _ = std::fs::remove_dir(&files[2]);
    // Guest memory does not fit 4 MiB; the cache keeps to it all the same.
    restore("4");
    restore("4");
    let held: u64 = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert!(held <= 4 << 20, "{held} bytes");
    let args = ["restore", "--snapshot", text(&scene.bare), "--run", "hello", "--cold", &server.cold(), "--cold-cache"];
    let said = run_err(&[&args[..], &["/proc/nowhere"]].concat());
    assert!(said.contains("Cannot make the cache directory /proc/nowhere"), "{said}");
}

#[test]
fn what_is_no_page_server_or_has_no_such_snapshot_is_refused() {
    let scene = Scene::make();
    let other = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let refused = |cold: &str, bare| {
        run_err(&[&["restore", "--snapshot", bare, "--run", "hello", "--cold", cold], &QUICK[..]].concat())
    };
    let said = refused(&server.cold(), text(&other.bare));
    assert!(said.contains("does not hold snapshot") && said.contains(&server.cold()), "{said}");
    let web = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = web.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut client in web.incoming().flatten() {
            let mut request = [0; 1000];
            let _ = client.read(&mut request);
            let _ = client.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
        }
    });
    let said = refused(&format!("tcp:{address}"), text(&scene.bare));
    assert!(said.contains("does not speak the page service's protocol"), "{said}");
    let said = refused("tcp:127.0.0.1:1", text(&scene.bare));
    assert!(said.contains("cannot be connected to"), "{said}");
}

#[test]
fn object_removed_or_damaged_at_the_server_is_told() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let refused = || run_err(&["restore", "--snapshot", text(&scene.bare), "--run", "hello", "--cold", &server.cold()]);
    let index = scene.object(".index");
    let good = std::fs::read(&index).unwrap();
    std::fs::write(&index, &good[..good.len() - 5]).unwrap();
    let said = refused();
    assert!(said.contains("is truncated"), "{said}");
    std::fs::write(&index, &good).unwrap();
    // A running VM keeps what the server has open.
    let mut vm = scene.restore("firecracker-uffd", &[&server.cold()], &[]);
    vm.call("hello");
    let id = run_ok(&["pool", "ls", text(&scene.pool)]);
    run_ok(&["pool", "rm", text(&scene.pool), &id[..12]]);
    assert_eq!(vm.call("check").digest, scene.digest);
    drop(vm);
    let said = refused();
    assert!(said.contains("does not hold snapshot"), "{said}");
}

/// Sends bytes and reads what comes until the server closes.
pub fn exchange(server: &Server, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(&server.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

pub fn greeting() -> Vec<u8> {
    let mut bytes = b"TVMMPAGE\x01\0\x01\0".to_vec();
    let checksum = crc32c::crc32c(&bytes);
    bytes.extend(checksum.to_le_bytes());
    bytes
}

/// A frame that says it has `claimed` bytes of payload.
pub fn frame(kind: u16, payload: &[u8], claimed: u32) -> Vec<u8> {
    let mut bytes = claimed.to_le_bytes().to_vec();
    bytes.extend(kind.to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(7_u64.to_le_bytes());
    bytes.extend(crc32c::crc32c(payload).to_le_bytes());
    let checksum = crc32c::crc32c(&bytes);
    bytes.extend(checksum.to_le_bytes());
    bytes.extend(payload);
    bytes
}

#[test]
fn hostile_clients_are_dropped_and_the_others_served() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    assert!(exchange(&server, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").is_empty());
    assert!(exchange(&server, &[0xff; 4096]).is_empty());
    assert!(exchange(&server, b"").is_empty());
    let greeting = greeting();
    assert_eq!(exchange(&server, &greeting).len(), 16);
    let read = [0_u32, 1].map(u32::to_le_bytes).concat();
    for (bytes, says) in [
        (frame(3, &read, 8), "makes no sense"),
        (frame(1, &[5; 32], 32), "does not hold snapshot"),
        (frame(1, &[5; 31], 31), "makes no sense"),
        (frame(0x83, &read, 8), "makes no sense"),
        (frame(77, &[], 0), "is of kind"),
        (frame(3, &read, u32::MAX), "is longer than"),
        (frame(4, &[1; 16], 16), "cannot be read by RDMA"),
        (vec![9; 24], "does not have its checksum"),
    ] {
        let answer = exchange(&server, &[&greeting[..], &bytes].concat());
        let text = String::from_utf8_lossy(&answer);
        assert!(text.contains(says), "{says}: {text:?}");
    }
    // Clients that greet and then say nothing do not keep others from being served.
    let mut idle: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(&server.address).unwrap()).collect();
    idle.iter_mut().for_each(|stream| stream.write_all(&greeting).unwrap());
    checked(&scene, "eager", &[&server.cold()], &[]);
}

#[test]
fn too_many_connections_wait_for_their_turn() {
    let scene = Scene::make();
    let server = Server::start(&scene.pool, "127.0.0.1:0", &["--max-connections", "2"]);
    let mut held: Vec<TcpStream> = (0..2).map(|_| TcpStream::connect(&server.address).unwrap()).collect();
    held.iter_mut().for_each(|stream| stream.write_all(&greeting()).unwrap());
    std::thread::sleep(Duration::from_millis(100));
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        drop(held);
    });
    let report = checked(&scene, "firecracker-uffd", &[&server.cold()], &[]);
    release.join().unwrap();
    assert!(number(&report["cold"]["places"][0], "retries") > 0, "{report}");
}

#[test]
fn server_ends_well_by_a_signal_and_refuses_what_it_cannot_do() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let said = run_err(&["serve-pages", "--dir", text(&scene.pool), "--listen", &format!("tcp:{}", server.address)]);
    assert!(said.contains("Cannot listen at"), "{said}");
    for listen in ["127.0.0.1:0", "rdma:127.0.0.1:0", "tcp:nowhere"] {
        run_err(&["serve-pages", "--dir", text(&scene.pool), "--listen", listen]);
    }
    let said = run_err(&["serve-pages", "--dir", text(&scene.bare), "--listen", "tcp:127.0.0.1:0"]);
    assert!(said.contains("for a pool: it is a snapshot's directory"), "{said}");
    let output =
        run(&["serve-pages", "--dir", text(&scene.pool), "--listen", "tcp:127.0.0.1:0", "--idle-timeout", "0"]);
    assert_eq!(output.status.code(), Some(2));
    let mut server = server;
    assert!(server.end().success());
}

/// Threads of a process.
fn threads(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().count()
}

#[test]
fn clients_that_say_nothing_neither_keep_others_out_nor_take_threads() {
    let scene = Scene::make();
    let server = Server::start(&scene.pool, "127.0.0.1:0", &["--max-connections", "4"]);
    let mut silent: Vec<TcpStream> = (0..400).map(|_| TcpStream::connect(&server.address).unwrap()).collect();
    checked(&scene, "eager", &[&server.cold()], &[]);
    let count = threads(server.pid());
    assert!(count <= 4 + 128 + 8, "{count} threads");
    // The oldest were closed for the others.
    silent[0].set_read_timeout(Some(TIMEOUT)).unwrap();
    assert_eq!(silent[0].read(&mut [0; 16]).unwrap(), 0);

    // A byte a second: the greeting takes longer than it may, in all.
    let mut slow = TcpStream::connect(&server.address).unwrap();
    slow.set_read_timeout(Some(TIMEOUT)).unwrap();
    for byte in greeting() {
        if slow.write_all(&[byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    assert_eq!(slow.read(&mut [0; 16]).unwrap_or(0), 0, "it was answered");
}

#[test]
fn clients_that_do_not_read_or_stop_in_a_request_lose_their_place() {
    let scene = Scene::make();
    let server = Server::start(&scene.pool, "127.0.0.1:0", &["--max-connections", "2"]);
    let id = run_ok(&["pool", "ls", text(&scene.pool)]);
    let id: Vec<u8> = (0..32).map(|at| u8::from_str_radix(&id[2 * at..2 * at + 2], 16).unwrap()).collect();
    // The first asks for a chunk again and again, and takes no answer.
    let mut deaf = TcpStream::connect(&server.address).unwrap();
    deaf.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let read = frame(3, &[1_u32, 1].map(u32::to_le_bytes).concat(), 8);
    deaf.write_all(&[&greeting()[..], &frame(1, &id, 32)].concat()).unwrap();
    while deaf.write_all(&read.repeat(64)).is_ok() {}
    // The second stops in the middle of a request.
    let mut halting = TcpStream::connect(&server.address).unwrap();
    halting.write_all(&[&greeting()[..], &frame(1, &id, 32)[..30]].concat()).unwrap();
    checked(&scene, "eager", &[&server.cold()], &["--fault-timeout", "200"]);
    halting.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut answer = Vec::new();
    let _ = halting.read_to_end(&mut answer);
    assert_eq!(answer.len(), 16, "a greeting, and the end");
    drop(deaf);
}
