//! No wait without a bound: peers that drip, stall, close and lie, for each protocol by which memory comes. Progress is
//! counted in whole units, such as chunks, and a restore that makes none ends within its `--fault-timeout`.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::pools::serve_pages::ends_with;
use crate::support::cold::{Proxy, Scene, Spoil};
use crate::support::slow_file::SlowFile;
use crate::support::{run, run_ok, text, without_progress};

/// Far above the fault time-outs below, and far below what a peer takes that drips all of guest memory.
const BOUND: Duration = Duration::from_secs(120);

/// In the middle of the first chunk on a connection for chunks, and of the index on one for that.
const MIDDLE: u64 = 600;

/// Faults of a peer that does not serve: from its first byte, after the greeting, and in the middle of a unit.
fn faults() -> Vec<Spoil> {
    let every = Duration::from_millis(30);
    let mut faults = Vec::new();
    for after in [0, 16, MIDDLE] {
        faults.push(Spoil::Silence { after });
        faults.push(Spoil::Drip { after, every });
        faults.push(Spoil::Cut { after, connections: usize::MAX });
        faults.push(Spoil::HalfClose { after, connections: usize::MAX });
        faults.push(Spoil::Garbage { after });
    }
    faults
}

/// A restore from `cold` that must end in time, with exit code 1 and the peer's name.
fn ends_in_time(bare: &Path, cold: &str, policy: &str, said_of: &str) {
    let began = Instant::now();
    let output = run(&[
        "restore",
        "--snapshot",
        text(bare),
        "--policy",
        policy,
        "--cold",
        cold,
        "--run",
        "check",
        "--fault-timeout",
        "1",
    ]);
    let stderr = without_progress(&String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(1), "{said_of}: {stderr}");
    assert!(stderr.starts_with("tvmm: ") && stderr.contains(cold), "{said_of}: {stderr}");
    assert!(!stderr.contains("panicked"), "{said_of}: {stderr}");
    assert!(began.elapsed() < BOUND, "{said_of}: it took {:?}", began.elapsed());
}

#[test]
fn page_server_that_gives_no_index_ends_the_restore_in_time() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    for fault in faults() {
        let proxy = Proxy::before(&server, fault);
        ends_in_time(&scene.bare, &proxy.cold(), "eager", &format!("index, {fault:?}"));
    }
}

#[test]
fn page_server_that_gives_no_chunk_ends_preloads_and_faults_in_time() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    for fault in faults() {
        for policy in ["eager", "firecracker-uffd"] {
            let proxy = Proxy::before(&server, Spoil::Nothing);
            // The first connection is for the index.
            proxy.spoil_from(1, fault);
            ends_in_time(&scene.bare, &proxy.cold(), policy, &format!("{policy}, {fault:?}"));
        }
    }
}

#[test]
fn page_server_that_drips_while_the_guest_runs_ends_the_vm_in_time() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let profile = scene.dir.path().join("p.profile");
    run_ok(&["profile", "record", "--snapshot", text(&scene.snapshot), "--run", "hello", "--out", text(&profile)]);
    let every = Duration::from_millis(30);
    let proxy = Proxy::before(&server, Spoil::Nothing);
    let mut vm = scene.restore("firecracker-uffd", &[&proxy.cold()], &["--fault-timeout", "1"]);
    vm.call("hello");
    let began = Instant::now();
    proxy.spoil(Spoil::Drip { after: 0, every });
    vm.begin("check");
    let said = ends_with(&mut vm);
    assert!(said.contains("guest-physical 0x") && said.contains(&proxy.cold()), "{said}");
    assert!(began.elapsed() < BOUND, "it took {:?}", began.elapsed());

    // Pages that are installed in the background come from a second connection for chunks.
    let proxy = Proxy::before(&server, Spoil::Nothing);
    proxy.spoil_from(1, Spoil::Drip { after: MIDDLE, every });
    let more = ["--fault-timeout", "1", "--profile", text(&profile), "--paused"];
    let began = Instant::now();
    let said = ends_with(&mut scene.restore("aquifer", &[&proxy.cold()], &more));
    assert!(said.contains(&proxy.cold()), "{said}");
    assert!(began.elapsed() < BOUND, "it took {:?}", began.elapsed());
}

#[test]
fn cold_pool_and_cached_chunk_on_a_file_system_that_hangs_end_the_restore_in_time() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let cache = scene.dir.path().join("cache");
    let restored = |policy: &str, more: &[&str]| {
        let args = ["restore", "--snapshot", text(&scene.bare), "--policy", policy, "--run", "check"];
        let began = Instant::now();
        let output = run(&[&args[..], more].concat());
        assert!(began.elapsed() < BOUND, "{policy}: it took {:?}", began.elapsed());
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let cached = ["--cold", &server.cold(), "--cold-cache", text(&cache), "--fault-timeout", "1"];
    assert_eq!(restored("eager", &cached).0, Some(0));
    let chunk = std::fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
    for (hangs, more) in
        [(scene.object(".chunks"), &["--cold", text(&scene.pool), "--fault-timeout", "1"][..]), (chunk, &cached[..])]
    {
        let Some(slow) = SlowFile::over(&hangs) else { return };
        slow.hang();
        for policy in ["eager", "firecracker-uffd"] {
            let (code, said) = restored(policy, more);
            assert_eq!(code, Some(1), "{}, {policy}: {said}", hangs.display());
            assert!(said.contains("(--fault-timeout)"), "{}, {policy}: {said}", hangs.display());
        }
    }
}

#[test]
fn wait_of_a_second_is_told_with_its_limit() {
    let scene = Scene::make();
    let args = ["restore", "--snapshot", text(&scene.bare), "--cold", "tcp:127.0.0.1:1", "--run", "hello"];
    let output = run(&[&args[..], &["--fault-timeout", "4"]].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 2, "{said}");
    assert_eq!(lines[0], "tvmm: warn: Waiting for tcp:127.0.0.1:1, at most 2.25 s");
    assert!(lines[1].contains("cannot be connected to"), "{said}");
}

#[test]
fn name_that_cannot_be_found_ends_the_restore_in_time() {
    let scene = Scene::make();
    // RFC 6761: this name is nobody's.
    ends_in_time(&scene.bare, "tcp:no-such-host.invalid:1", "eager", "a name");
}
