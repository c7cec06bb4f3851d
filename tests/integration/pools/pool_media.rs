//! Pools on the media of real hosts: device DAX, a NUMA node without CPUs, persistent memory with a file system (these
//! are there in the testbed), huge pages that are reserved.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;
use tempfile::TempDir;

use crate::skip::skip;
use crate::support::pool::{DEVICE, far_memory, filled, take_memory_away};
use crate::support::{Vm, finish, is_emulated, run_err, run_ok, scratch, text, tvmm};

/// Runs `tvmm pool COMMAND` that must succeed.
fn pool(args: &[&str]) -> String {
    run_ok(&[&["pool"], args].concat())
}

#[test]
fn a_dax_device_is_formatted_filled_and_restored_from() {
    let Some(_far) = far_memory() else { return };
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
    for policy in ["eager", "firecracker-uffd", "trenv"] {
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

/// Far memory as memory of a node, until it is dropped.
struct FarNode(u32);

impl FarNode {
    fn make() -> FarNode {
        FarNode::turn_to("system-ram");
        FarNode(far_node().expect("a NUMA node without CPUs"))
    }

    fn turn_to(use_as: &str) {
        let output = finish(Command::new("far-memory").arg(use_as));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for FarNode {
    fn drop(&mut self) {
        let _ = unmount(format!("/run/tvmm/numa-{}", self.0).as_str(), UnmountFlags::empty());
        FarNode::turn_to("devdax");
        // The device's node is another file now: leases of VMs that were killed look like those of another host's.
        let _ = finish(tvmm().args(["pool", "gc", DEVICE, "--lease-expiry", "0"]));
    }
}

/// On which nodes the pages of a process's mappings of a pool are: those of the pool, and copies.
#[derive(Debug, Default)]
struct Nodes {
    shown: Vec<i32>,
    copied: Vec<i32>,
}

impl Nodes {
    /// Asks move_pages(2), which without nodes to go to only says where each page is, and `/proc/PID/pagemap` whose it
    /// is.
    fn of(pid: u32) -> Nodes {
        const PAGE: u64 = 4096;
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
        let mut nodes = Nodes::default();
        for line in fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines() {
            // The other one is the monitor's.
            if !line.contains("pool.tvmm") || !line.contains(" rw-p ") {
                continue;
            }
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap());
            let pages: Vec<u64> = (start..end).step_by(PAGE as usize).collect();
            let mut entries = vec![0; pages.len() * 8];
            pagemap.read_exact_at(&mut entries, start / PAGE * 8).unwrap();
            let entries = entries.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry));
            for (node, entry) in nodes_of_pages(pid, &pages).into_iter().zip(entries).filter(|(node, _)| *node >= 0) {
                let is_files = entry & 1 << 61 != 0;
                if is_files { &mut nodes.shown } else { &mut nodes.copied }.push(node);
            }
        }
        nodes
    }
}

/// The node of each page of a process; negative for those that are not there.
fn nodes_of_pages(pid: u32, pages: &[u64]) -> Vec<i32> {
    let mut nodes = vec![-1; pages.len()];
    let nowhere = std::ptr::null::<i32>();
    // SAFETY: the kernel reads as many addresses and writes as many numbers as there are pages; without nodes to move
    // to it moves nothing.
    let result = unsafe {
        libc::syscall(libc::SYS_move_pages, pid, pages.len(), pages.as_ptr(), nowhere, nodes.as_mut_ptr(), 0)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    nodes
}

#[test]
fn a_pool_on_a_far_node_stays_there_and_copies_do_not() {
    // It mounts a tmpfs, and turns the device: not on a machine that is somebody's.
    if !is_emulated() {
        return skip!("dax", "the test binds {DEVICE} to another driver, which only the testbed's device is for");
    }
    let Some(_far) = far_memory() else { return };
    let dir = scratch();
    let out = dir.path().join("full");
    let digest = filled(&out, 3000, 7);
    let node = FarNode::make();
    let at = format!("numa:{}", node.0);
    run_ok(&["pool", "create", "--tier", "cxl", "--at", &at, "--size", "0.1"]);
    pool(&["add", &at, text(&out)]);
    take_memory_away(&out);
    let mut vm = Vm::restore_with(&out, "trenv", &["--pool", &at]);
    assert_eq!(vm.call("check").digest, digest);
    let read = Nodes::of(vm.pid());
    assert!(read.shown.len() >= 2500 && read.shown.iter().all(|on| *on == node.0 as i32), "{read:?}");
    vm.call("touch pages=1000 write=100 seed=3");
    let written = Nodes::of(vm.pid());
    assert!(written.copied.len() >= read.copied.len() + 900, "{} {}", read.copied.len(), written.copied.len());
    assert!(written.copied.iter().all(|on| *on != node.0 as i32), "{written:?}");
    assert!(written.shown.iter().all(|on| *on == node.0 as i32), "{written:?}");
    drop(vm);
    let mut again = Vm::restore_with(&out, "trenv", &["--pool", &at]);
    assert_eq!(again.call("check").digest, digest);
}

/// Restores from a pool at `at` with everything in place, reads, writes half of 1000 pages, and compares with what a
/// restore without the pool comes to; the report.
fn written_in_place(at: &Path) -> Value {
    const TOUCH: &str = "touch pages=1000 write=50 seed=3";
    let dir = scratch();
    let [out, report] = ["full", "report"].map(|name| dir.path().join(name));
    let digest = filled(&out, 3000, 7);
    let mut plain = Vm::restore(&out, "eager");
    plain.call(TOUCH);
    let written = plain.call("check").digest;
    drop(plain);
    pool(&["add", text(at), text(&out)]);
    take_memory_away(&out);
    let restore = || Vm::restore_with(&out, "trenv", &["--pool", text(at), "--report", text(&report)]);
    let mut vm = restore();
    assert_eq!(vm.call("check").digest, digest);
    let shown: Value = serde_json::from_str(&pool(&["show", text(at), "--json"])).unwrap();
    assert!(shown["vms"][0]["resident"]["pool_kib"].as_u64().unwrap() >= 10_000, "{shown}");
    vm.call(TOUCH);
    assert_eq!(vm.call("check").digest, written);
    let (status, stderr) = vm.terminate();
    assert!(status.success(), "{stderr}");
    let report = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    assert_eq!(restore().call("check").digest, digest, "a VM wrote to the pool");
    assert!(pool(&["fsck", text(at), "--json"]).contains("\"good\": true"));
    report
}

/// Mount point of a file system on persistent memory that bypasses the page cache.
fn dax_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut lines = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let is_dax = |words: &[&str]| words.last().unwrap().split(',').any(|word| word == "dax" || word == "dax=always");
    Some(lines.find(|words| is_dax(words))?[4].into())
}

#[test]
fn the_kernel_copies_what_is_written_of_a_pool_on_fsdax() {
    let Some(mounted) = dax_mount() else {
        return skip!("fsdax", "no file system is mounted with -o dax (tests/testbed/run -p)");
    };
    let dir = tempfile::Builder::new().prefix("tvmm-test-").tempdir_in(mounted).unwrap();
    run_ok(&["pool", "create", "--tier", "cxl", "--at", text(dir.path()), "--size", "0.1"]);
    let shown = pool(&["show", text(dir.path()), "--json"]);
    assert!(shown.contains("\"huge\": true") && shown.contains("\"copy_on_write\": true"), "{shown}");
    let report = written_in_place(dir.path());
    assert_eq!(report["promotion"], Value::Null, "the kernel copied");
    let kib = |key: &str| report["memory"][key].as_u64().unwrap();
    assert!(kib("guest_in_place_kib") >= 9_000 && kib("guest_private_kib") >= 1_900, "{}", report["memory"]);
    let pages = |key: &str| report["fault_ins"][key].as_u64().unwrap();
    assert!(pages("file_mapped") >= 2_300 && (450..1_500).contains(&pages("file_copied")), "{}", report["fault_ins"]);
}

/// A hugetlbfs with pages of 2 MiB of its own, which the host gets back.
struct HugePages {
    dir: TempDir,
    before: u64,
}

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// Reserves so many more; why not otherwise.
    fn reserve(count: u64) -> Result<HugePages, String> {
        let now = || fs::read_to_string(HUGE_PAGES).ok()?.trim().parse::<u64>().ok();
        let before = now().ok_or("this kernel has no huge pages that can be reserved")?;
        let pages = HugePages { dir: scratch(), before };
        fs::write(HUGE_PAGES, (before + count).to_string()).map_err(|error| format!("{HUGE_PAGES}: {error}"))?;
        if now() != Some(before + count) {
            return Err(format!("the host has no {count} huge pages in one piece each"));
        }
        match mount("tvmm-test", pages.dir.path(), "hugetlbfs", MountFlags::empty(), c"pagesize=2M") {
            Ok(()) => Ok(pages),
            Err(error) => Err(format!("a hugetlbfs cannot be mounted: {error}")),
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = unmount(self.dir.path(), UnmountFlags::DETACH);
        let _ = fs::write(HUGE_PAGES, self.before.to_string());
    }
}

#[test]
fn a_pool_of_reserved_huge_pages_is_promoted_in_whole_blocks() {
    let pages = match HugePages::reserve(40) {
        Ok(pages) => pages,
        Err(why) => return skip!("huge-pages", "{why}"),
    };
    let at = pages.dir.path();
    let create = |gib: &str| ["pool", "create", "--tier", "cxl", "--at", text(at), "--size", gib].map(str::to_string);
    let too_large = create("0.5");
    let said = run_err(&too_large.each_ref().map(String::as_str));
    assert!(said.contains("Cannot make") && !at.join("pool.tvmm").exists(), "{said}");
    run_ok(&create("0.07").each_ref().map(String::as_str));
    let shown = pool(&["show", text(at), "--json"]);
    assert!(shown.contains("\"align\": 2097152") && shown.contains("\"copy_on_write\": false"), "{shown}");
    let report = written_in_place(at);
    let promotion = &report["promotion"];
    let promoted = ["operand", "told"].map(|how| promotion[how]["pages"].as_u64().unwrap_or(0)).iter().sum::<u64>();
    assert!(promoted >= 512 && promoted.is_multiple_of(512), "{promotion}");
    assert_eq!(promotion["all"]["times"], 0, "{promotion}");
}
