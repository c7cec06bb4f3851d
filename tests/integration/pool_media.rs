//! Pools on the media of real hosts: device DAX, a NUMA node without CPUs. They are there in the testbed.

use std::path::Path;

use crate::support::pool::{filled, take_memory_away};
use crate::support::{Vm, is_emulated, run_err, run_ok, scratch, text};

const DEVICE: &str = "/dev/dax0.0";

/// Runs `tvmm pool COMMAND` that must succeed.
fn pool(args: &[&str]) -> String {
    run_ok(&[&["pool"], args].concat())
}

#[test]
fn a_dax_device_is_formatted_filled_and_restored_from() {
    if !Path::new(DEVICE).exists() {
        return eprintln!("skipped: no {DEVICE}");
    }
    let dir = scratch();
    let [out, other] = ["full", "other"].map(|name| dir.path().join(name));
    let digest = filled(&out, 3000, 7);
    filled(&other, 1000, 8);
    let create = ["pool", "create", "--tier", "cxl", "--at", DEVICE];
    assert!(run_err(&create).contains("--format dax0.0"));
    run_ok(&[&create[..], &["--format", "dax0.0"]].concat());
    assert!(run_err(&create).contains("--format dax0.0"));
    assert!(run_err(&[&create[..], &["--size", "100000"]].concat()).contains("were asked for"));
    let added = pool(&["add", DEVICE, text(&out), "--json"]);
    assert!(added.contains("\"nonzero_pages\""), "{added}");
    assert!(pool(&["fsck", DEVICE, "--json"]).contains("\"good\": true"));
    take_memory_away(&out);
    for policy in ["eager", "firecracker-uffd"] {
        let mut vm = Vm::restore_with(&out, policy, &["--pool", DEVICE]);
        assert_eq!(vm.call("check").digest, digest, "{policy}");
    }
    let shown = pool(&["show", DEVICE, "--json"]);
    assert!(shown.contains("\"kind\": \"dax\"") && shown.contains("\"copy_on_write\": false"), "{shown}");
    let mut vm = Vm::restore_with(&out, "firecracker-uffd", &["--pool", DEVICE]);
    vm.call("hello");
    pool(&["rm", DEVICE, "full"]);
    assert!(pool(&["gc", DEVICE, "--json"]).contains("\"held\": 1"));
    assert_eq!(vm.call("check").digest, digest);
    drop(vm);
    assert!(pool(&["gc", DEVICE, "--json"]).contains("\"snapshots\": 1"));
    pool(&["add", DEVICE, text(&other)]);
    assert!(pool(&["fsck", DEVICE, "--json"]).contains("\"good\": true"));
}

/// A node with memory and without CPUs.
fn far_node() -> Option<u32> {
    let nodes = std::fs::read_dir("/sys/devices/system/node").ok()?;
    let number = |name: &str| name.strip_prefix("node")?.parse::<u32>().ok();
    let mut nodes = nodes.flatten().filter_map(|entry| Some((entry.path(), number(entry.file_name().to_str()?)?)));
    nodes.find_map(|(path, node)| {
        let cpus = std::fs::read_to_string(path.join("cpulist")).ok()?;
        let memory = std::fs::read_to_string(path.join("meminfo")).ok()?;
        let has_memory = memory.lines().any(|line| line.contains("MemTotal") && !line.ends_with(" 0 kB"));
        (cpus.trim().is_empty() && has_memory).then_some(node)
    })
}

/// Pages of the pool's mappings by node, and those of them that were copied: `/proc/PID/numa_maps`.
fn pages_by_node(pid: u32, node: u32) -> (u64, u64, u64) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/numa_maps")).unwrap();
    let (mut there, mut elsewhere, mut copied) = (0, 0, 0);
    for line in maps.lines().filter(|line| line.contains("pool.tvmm")) {
        for field in line.split(' ') {
            let Some((name, pages)) = field.split_once('=').and_then(|(n, p)| Some((n, p.parse::<u64>().ok()?))) else {
                continue;
            };
            match name {
                "anon" => copied += pages,
                _ if name == format!("N{node}") => there += pages,
                _ if name.starts_with('N') && name[1..].parse::<u32>().is_ok() => elsewhere += pages,
                _ => {}
            }
        }
    }
    (there, elsewhere, copied)
}

#[test]
fn a_pool_on_a_far_node_stays_there_and_copies_do_not() {
    let node = far_node();
    // It mounts a tmpfs for good: not on a machine that is somebody's.
    let Some(node) = node.filter(|_| is_emulated()) else {
        return eprintln!("skipped: no NUMA node without CPUs in a testbed");
    };
    let (dir, at) = (scratch(), format!("numa:{node}"));
    let out = dir.path().join("full");
    let digest = filled(&out, 3000, 7);
    run_ok(&["pool", "create", "--tier", "cxl", "--at", &at, "--size", "0.1"]);
    pool(&["add", &at, text(&out)]);
    take_memory_away(&out);
    let mut vm = Vm::restore_with(&out, "trenv", &["--pool", &at]);
    assert_eq!(vm.call("check").digest, digest);
    let (there, elsewhere, copied) = pages_by_node(vm.pid(), node);
    assert!(there >= 2500 && elsewhere <= copied, "{there} {elsewhere} {copied}");
    vm.call("touch pages=1000 write=100 seed=3");
    let (_, elsewhere_then, copied_then) = pages_by_node(vm.pid(), node);
    assert!(copied_then >= copied + 900 && elsewhere_then >= elsewhere + 900, "{elsewhere_then} {copied_then}");
}
