//! Rewind: a restored VM goes back to its snapshot in place, and nothing of the former run is left.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::answering_on_vsock;
use crate::devices::vsock::{ask, connect};
use crate::support::artefact::{content, inspect};
use crate::support::pool::{Pool, filled};
use crate::support::service::wait_until;
use crate::support::{Random, Vm, config, rounds, run, run_err, scratch, text};

/// Goes back, and lets the VM compare all of itself with the snapshot.
fn rewind(vm: &Vm) -> Value {
    vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })))
}

fn refused(vm: &Vm) -> String {
    vm.api_fault("PUT", "/tvmm/rewind", Some(json!({})))
}

/// Restores of `snapshot` by each way to place memory.
pub(super) fn restores(snapshot: &Path) -> Vec<(String, Vm)> {
    let ways: [&[&str]; 8] = [
        &["--policy", "firecracker"],
        &["--policy", "eager"],
        &["--policy", "firecracker-uffd"],
        &["--policy", "catalyzer"],
        &["--policy", "trenv"],
        &["--policy", "trenv", "--in-place-mapping", "shared"],
        &["--policy", "firecracker", "--track-dirty-pages"],
        &["--policy", "firecracker", "--dram", "1"],
    ];
    let restore = |way: &[&str]| (way.join(" "), Vm::restore_with(snapshot, way[1], &way[2..]));
    ways.into_iter().map(restore).collect()
}

#[test]
fn a_rewound_guest_is_the_snapshot_again_whatever_placed_its_memory() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 2000, 1);
    for (way, mut vm) in restores(&snapshot) {
        vm.wait_for_socket();
        for round in 0..3 {
            assert_eq!(vm.call("check").digest, digest, "{way}, round {round}");
            vm.call(&format!("touch pages=700 write=100 seed={round}"));
            vm.call(&format!("fill pages=1500 seed={}", round + 7));
            assert_ne!(vm.call("check").digest, digest, "the guest has changed its memory");
            let rewound = rewind(&vm);
            let back = ["pages_copied", "pages_cleared", "pages_dropped"].map(|key| rewound[key].as_u64().unwrap());
            assert!(back.iter().sum::<u64>() >= 2200, "{way}: {rewound}");
            assert_eq!(vm.state(), "Running");
        }
        let report = vm.api_ok("GET", "/tvmm/report", None);
        assert_eq!(report["restore"]["rewinds"], 3);
    }
}

#[test]
fn a_diff_after_a_rewind_has_no_page_that_went_back() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 2000, 1);
    for more in [&["--track-dirty-pages"][..], &[]] {
        let mut vm = Vm::restore_with(&snapshot, "firecracker", more);
        vm.call("touch pages=1000 write=100 seed=5");
        rewind(&vm);
        let diff = dir.path().join("diff");
        vm.snapshot(&diff, &["--diff"]);
        let held = inspect(&diff)["manifest"]["pages_held"].as_u64().unwrap();
        assert!(held < 200, "{more:?}: {held} pages");
        std::fs::remove_dir_all(&diff).unwrap();
    }
}

#[test]
fn pages_beyond_the_budget_are_dropped_and_the_others_stay_local() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 100, 1);
    let dropped_with = |more: &[&str]| {
        let mut vm = Vm::restore_with(&snapshot, "catalyzer", more);
        vm.call("fill pages=3000 seed=5");
        rewind(&vm)["pages_dropped"].as_u64().unwrap()
    };
    assert_eq!(dropped_with(&[]), 0);
    assert!(dropped_with(&["--dram", "4"]) >= 2500);
}

#[test]
fn a_paused_vm_stays_paused_and_a_vm_on_several_cpus_goes_back() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let mut vm = Vm::boot(&config(2, 128));
    vm.call("fill pages=500 seed=2 cpu=1");
    let digest = vm.call("check").digest;
    vm.snapshot(&snapshot, &[]);
    drop(vm);
    let mut vm = Vm::restore(&snapshot, "firecracker");
    vm.call("spin ms=20 cpus=all");
    vm.call("fill pages=900 seed=3 cpu=1");
    vm.pause();
    rewind(&vm);
    assert_eq!(vm.state(), "Paused");
    vm.resume();
    assert_eq!(vm.call("check cpu=1").digest, digest);
    // In the middle of work on both CPUs, or of its answer.
    for _ in 0..5 {
        vm.begin("spin ms=100 cpus=all");
        rewind(&vm);
        assert_eq!(vm.call("check").digest, digest);
    }
}

/// The bytes that a former guest could have left.
const CANARY: &[u8] = b"CANARY-7f3e9a51c2d8";

/// Returns whether a file has the canary.
fn has_canary(path: &Path) -> bool {
    let bytes = std::fs::read(path).unwrap();
    bytes.windows(CANARY.len()).any(|window| window == CANARY)
}

#[test]
fn a_canary_in_lines_metadata_and_memory_is_nowhere_afterwards() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 300, 1);
    let mut vm = Vm::restore(&snapshot, "firecracker");
    // Without its end, the line stays in the buffers of guest and serial port.
    vm.wait_for_socket();
    vm.send(CANARY);
    let planted = dir.path().join("planted");
    // The guest takes the bytes in its own time.
    loop {
        std::thread::sleep(std::time::Duration::from_millis(20));
        vm.snapshot(&planted, &[]);
        if has_canary(&planted.join("memory")) {
            break;
        }
        std::fs::remove_dir_all(&planted).unwrap();
    }
    rewind(&vm);
    let after = dir.path().join("after");
    vm.snapshot(&after, &[]);
    for entry in std::fs::read_dir(&after).unwrap() {
        let path = entry.unwrap().path();
        assert!(!has_canary(&path), "{}", path.display());
    }
    vm.call("hello");
}

#[test]
fn memory_given_to_the_balloon_comes_back() {
    let dir = scratch();
    let mut config = config(1, 128);
    config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 1,
        "free_page_hinting": true, "free_page_reporting": true });
    let mut vm = Vm::boot(&config);
    vm.call("fill pages=3000 seed=3");
    let digest = vm.call("check").digest;
    vm.call("balloon op=status");
    let snapshot = dir.path().join("snapshot");
    vm.snapshot(&snapshot, &[]);
    drop(vm);
    for (way, mut vm) in restores(&snapshot) {
        for op in ["report", "inflate"] {
            vm.call(&format!("balloon op={op} filled=1"));
            assert_ne!(vm.call("check").digest, digest, "{way}: the pages are zero");
            let rewound = rewind(&vm);
            assert!(rewound["pages_returned"].as_u64().unwrap() >= 3000, "{way}, {op}: {rewound}");
            assert_eq!(vm.call("check").digest, digest, "{way}, {op}");
        }
        assert_eq!(vm.call("balloon op=status").number("held"), 0, "{way}");
    }
}

#[test]
fn connections_of_the_former_guest_are_closed_and_new_ones_work() {
    let dir = scratch();
    let (snapshot, path) = answering_on_vsock(dir.path());
    let vm = Vm::restore(&snapshot, "firecracker");
    for _ in 0..5 {
        let mut stream = connect(&path, 52);
        assert!(ask(&stream, "run a fill pages=50 seed=1").starts_with("ok a "));
        stream.write_all(CANARY).unwrap();
        rewind(&vm);
        let mut rest = Vec::new();
        // The end, or a reset: either way there is no guest behind it any more.
        let _ = stream.read_to_end(&mut rest);
        assert_eq!(rest, b"", "nothing of the former guest comes any more");
        let stream: UnixStream = connect(&path, 52);
        assert!(ask(&stream, "run b hello").starts_with("ok b "));
    }
}

/// A machine with a drive.
pub(super) fn with_drive(image: &Path, read_only: bool) -> Value {
    let mut config = config(1, 128);
    config["drives"] = json!([{ "drive_id": "disk", "path_on_host": image, "is_root_device": false,
        "is_read_only": read_only }]);
    config
}

/// The image of a drive.
pub(super) fn image(dir: &Path) -> PathBuf {
    let path = dir.join("image");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    path
}

#[test]
fn own_copies_of_drives_go_back_and_shared_drives_are_refused() {
    let dir = scratch();
    let image = image(dir.path());
    let mut vm = Vm::boot(&with_drive(&image, false));
    vm.call("blk op=write sectors=64 seed=1 chunk=64");
    let copied = dir.path().join("copied");
    vm.snapshot(&copied, &["--copy-drives"]);
    let shared = dir.path().join("shared");
    vm.snapshot(&shared, &[]);
    drop(vm);
    let drives = dir.path().join("drives");
    std::fs::create_dir(&drives).unwrap();
    let mut vm = Vm::restore_with(&copied, "firecracker", &["--drive-dir", text(&drives)]);
    for seed in [2, 3] {
        assert_eq!(vm.call("blk op=check sectors=64 seed=1 chunk=64").number("bad"), 0);
        vm.call(&format!("blk op=write sectors=64 seed={seed} chunk=64"));
        rewind(&vm);
    }
    assert_eq!(vm.call("blk op=check sectors=64 seed=1 chunk=64").number("bad"), 0);
    // In the middle of requests.
    let before = vm.port_reads();
    vm.begin("blk op=write sectors=1024 seed=9 chunk=64");
    wait_until("the guest to take the request", || vm.port_reads() > before);
    rewind(&vm);
    assert_eq!(vm.call("blk op=check sectors=64 seed=1 chunk=64").number("bad"), 0);
    drop(vm);
    let vm = Vm::restore(&shared, "firecracker");
    vm.wait_for_socket();
    let refusal = refused(&vm);
    assert!(refusal.starts_with("Cannot rewind the VM: the guest can write drive disk"), "{refusal}");
    assert_eq!(vm.state(), "Running", "a refused rewind changes nothing");
}

#[test]
fn a_drive_that_the_guest_only_reads_needs_no_copy() {
    let dir = scratch();
    let image = image(dir.path());
    let mut vm = Vm::boot(&with_drive(&image, true));
    vm.call("blk op=info");
    let snapshot = dir.path().join("snapshot");
    vm.snapshot(&snapshot, &[]);
    drop(vm);
    let mut vm = Vm::restore(&snapshot, "firecracker");
    let read = vm.call("blk op=read sectors=64 chunk=64").digest;
    rewind(&vm);
    assert_eq!(vm.call("blk op=read sectors=64 chunk=64").digest, read);
}

#[test]
fn a_vm_without_a_snapshot_to_go_back_to_says_so() {
    let vm = Vm::boot(&config(1, 64));
    vm.wait_for_socket();
    assert!(refused(&vm).starts_with("Cannot rewind a VM that was booted"), "{}", refused(&vm));
    let stderr = run_err(&["rewind", "--api-sock", text(vm.socket())]);
    assert!(stderr.contains("Cannot rewind a VM that was booted"), "{stderr}");
    let vm = Vm::wait_for_api();
    vm.wait_for_socket();
    assert!(refused(&vm).contains("not supported before starting the microVM"), "{}", refused(&vm));
    let fault = vm.api_fault("PUT", "/tvmm/rewind", Some(json!({ "verfy": true })));
    assert!(fault.contains("verfy"), "{fault}");
}

#[test]
fn the_command_prints_times_and_counts() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 10, 1);
    let vm = Vm::restore(&snapshot, "firecracker");
    vm.wait_for_socket();
    let output = run(&["rewind", "--api-sock", text(vm.socket()), "--verify"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.starts_with("rewound in ") && stderr.contains("the VM equals its snapshot"), "{stderr}");
    let output = run(&["rewind", "--api-sock", text(vm.socket()), "--compare", "--json"]);
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(printed["total_us"].as_u64().unwrap() > 0, "{printed}");
}

#[test]
fn a_snapshot_that_is_removed_can_still_be_gone_back_to() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 500, 1);
    let mut vm = Vm::restore(&snapshot, "firecracker");
    vm.call("touch pages=100 write=100");
    std::fs::remove_dir_all(&snapshot).unwrap();
    rewind(&vm);
    assert_eq!(vm.call("check").digest, digest, "the VM holds the files open");
}

#[test]
fn a_pool_serves_the_way_back() {
    let dir = scratch();
    let pool = Pool::create("1");
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 2000, 1);
    pool.add(&snapshot);
    for (policy, more) in [("trenv", &[][..]), ("trenv", &["--in-place-mapping", "shared"][..]), ("eager", &[][..])] {
        let mut vm = pool.restore(&snapshot, policy, more);
        for seed in [1, 2] {
            vm.call(&format!("touch pages=1000 write=100 seed={seed}"));
            rewind(&vm);
            assert_eq!(vm.call("check").digest, digest, "{policy} {more:?}");
        }
    }
}

#[test]
fn snapshots_of_a_rewound_vm_are_sound() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 1000, 1);
    let mut vm = Vm::restore_with(&snapshot, "firecracker", &["--track-dirty-pages"]);
    vm.call("fill pages=500 seed=4");
    let between = dir.path().join("between");
    vm.snapshot(&between, &["--diff"]);
    vm.call("touch pages=300 write=100");
    rewind(&vm);
    let diff = dir.path().join("diff");
    vm.snapshot(&diff, &["--diff"]);
    let full = dir.path().join("full");
    vm.snapshot(&full, &[]);
    let mut vm = Vm::restore(&diff, "firecracker");
    assert_eq!(vm.call("check").digest, digest, "the diff is one against the snapshot gone back to");
    let mut vm = Vm::restore(&full, "eager");
    assert_eq!(vm.call("check").digest, digest);
    assert!(!content(&between).is_empty());
}

/// The resources of a VM's process.
#[derive(Clone, Copy, Debug)]
struct Resources {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    /// Memory that no file has, KiB.
    anonymous_kib: u64,
}

impl Resources {
    fn of(vm: &Vm) -> Resources {
        let path = |of: &str| format!("/proc/{}/{of}", vm.pid());
        let count = |of: &str| std::fs::read_dir(path(of)).unwrap().count();
        let status = std::fs::read_to_string(path("status")).unwrap();
        let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
        Resources {
            descriptors: count("fd"),
            threads: count("task"),
            mappings: std::fs::read_to_string(path("maps")).unwrap().lines().count(),
            anonymous_kib: anonymous.trim().strip_suffix(" kB").unwrap().parse().unwrap(),
        }
    }

    /// Returns whether these are those of `before`, but for what an allocator may keep.
    fn are_as(&self, before: &Resources) -> bool {
        self.descriptors <= before.descriptors
            && self.threads <= before.threads
            && self.mappings <= before.mappings + 4
            && self.anonymous_kib <= before.anonymous_kib + (4 << 10)
    }
}

/// `TVMM_REWINDS=10000` makes so many rewinds.
#[test]
fn many_rewinds_of_random_programs_leave_no_descriptor_thread_or_memory_behind() {
    let all = std::env::var("TVMM_REWINDS").map_or(300, |text| text.parse().expect("TVMM_REWINDS is a number"));
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 1000, 1);
    for (policy, more) in [("firecracker", &[][..]), ("firecracker-uffd", &[][..]), ("trenv", &[][..])] {
        let mut vm = Vm::restore_with(&snapshot, policy, more);
        let mut random = Random(41);
        let mut step = |vm: &mut Vm| {
            match random.below(4) {
                0 => drop(vm.call(&format!("touch pages={} write=100", 1 + random.below(900)))),
                1 => drop(vm.call(&format!("fill pages={} seed={}", 1 + random.below(400), random.below(99)))),
                // The rewind may come before the guest has read the request: it must end by itself.
                2 => drop(vm.begin("spin ms=30")),
                _ => {}
            }
            // The comparison takes most of the time.
            let verify = random.below(8) == 0;
            vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": verify })));
        };
        // All pages that the programs write are local from here on.
        vm.call("touch pages=1000 write=100");
        vm.call("fill pages=400 seed=1");
        (0..20).for_each(|_| step(&mut vm));
        let before = Resources::of(&vm);
        (0..rounds(all / 3)).for_each(|_| step(&mut vm));
        // The connection of the last request may still be closing.
        wait_until(&format!("resources to be as before: {before:?}"), || Resources::of(&vm).are_as(&before));
        println!("{policy}: {before:?}, {} rewinds, {:?}", rounds(all / 3), Resources::of(&vm));
        assert_eq!(vm.call("check").digest, digest, "{policy}");
    }
}
