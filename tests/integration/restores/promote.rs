//! Promotion: pages in place are mapped read-only, and are promoted before the guest, KVM or the VMM writes to them.

use std::io::{Read, Write};
use std::net::{Shutdown, UdpSocket};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::skip::skip;
use crate::support::artefact::pages;
use crate::support::network::{HOST, with_network};
use crate::support::pool::{DEVICE, far_memory};
use crate::support::{Answer, TIMEOUT, Vm, config, refusal, run, run_ok, scratch, text};

const FILLED: u64 = 600;
/// Reasons for promotions besides operands and pages that KVM named; the last two are guesses.
const GUESSED: [&str; 5] = ["page_tables", "stack", "descriptors", "near", "all"];

/// A machine whose filled pages lie in a snapshot.
struct Filled {
    dir: TempDir,
    digest: String,
}

impl Filled {
    /// A snapshot of a machine that has run `functions`.
    fn with(mut config: Value, boot_args: &str, functions: &[&str]) -> Filled {
        let dir = scratch();
        if !boot_args.is_empty() {
            config["boot-source"] = json!({ "boot_args": boot_args });
        }
        let mut vm = Vm::boot(&config);
        vm.call(&format!("fill pages={FILLED} seed=7"));
        let digest = vm.call("check").digest;
        functions.iter().for_each(|function| drop(vm.call(function)));
        vm.snapshot(&dir.path().join("snapshot"), &[]);
        Filled { dir, digest }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn restore(&self, mapping: &str) -> Vm {
        restore(&self.path("snapshot"), mapping, &self.path("report"))
    }

    /// Ends the machine; what became of its pages in place.
    fn promotion(&self, vm: Vm) -> Value {
        end(vm, &self.path("report"))["promotion"].clone()
    }
}

/// Restores with everything in place.
fn restore(snapshot: &Path, mapping: &str, report: &Path) -> Vm {
    let more = ["--in-place-mapping", mapping, "--track-dirty-pages", "--report", text(report)];
    Vm::restore_with(snapshot, "trenv", &more)
}

fn end(vm: Vm, report: &Path) -> Value {
    let (status, stderr) = vm.terminate();
    assert!(status.success(), "{stderr}");
    serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap()
}

fn number(promotion: &Value, resort: &str, what: &str) -> u64 {
    promotion[resort][what].as_u64().unwrap_or_else(|| panic!("no {resort}.{what} in {promotion}"))
}

fn times(promotion: &Value, resort: &str) -> u64 {
    number(promotion, resort, "times")
}

/// Returns true if KVM runs guests on page tables of their own: then it reports every refused write to the VMM.
fn has_second_stage() -> bool {
    let is_on = |path| std::fs::read(path).is_ok_and(|text: Vec<u8>| matches!(text.first(), Some(b'Y' | b'1')));
    is_on("/sys/module/kvm_intel/parameters/ept") || is_on("/sys/module/kvm_amd/parameters/npt")
}

fn good(answer: &Answer) -> u64 {
    assert_eq!(answer.number("bad"), 0, "{answer:?}");
    answer.number("kinds")
}

#[test]
fn every_kind_of_store_at_user_level_is_found_by_its_operands() {
    let filled = Filled::with(config(1, 64), "", &[]);
    let mut private = filled.restore("private");
    assert!(good(&private.call("stores")) >= 45);
    let expected = private.call("check").digest;
    assert_eq!(filled.promotion(private), Value::Null, "the kernel copied");
    let mut vm = filled.restore("shared");
    assert_eq!(vm.call("check").digest, filled.digest);
    let kinds = good(&vm.call("stores op=user"));
    assert_eq!(vm.call("check").digest, expected);
    let promotion = filled.promotion(vm);
    let exact = ["operand", "told"].map(|resort| times(&promotion, resort)).iter().sum::<u64>();
    assert!(exact >= kinds, "{promotion}");
    // With a second stage of paging the CPU walks page tables as if it wrote them (AMD), and uses the interrupt stack.
    let never = if has_second_stage() { &GUESSED[3..] } else { &GUESSED[..] };
    never.iter().for_each(|resort| assert_eq!(times(&promotion, resort), 0, "{resort}: {promotion}"));
    let [mapped, left] = ["mapped_pages", "in_place_pages"].map(|key| promotion[key].as_u64().unwrap());
    assert!(mapped >= FILLED && mapped - left >= kinds && left > FILLED / 2, "{promotion}");
}

#[test]
fn stores_at_kernel_level_and_by_string_input_arrive() {
    let filled = Filled::with(config(1, 64), "", &[]);
    let digests = ["private", "shared"].map(|mapping| {
        let mut vm = filled.restore(mapping);
        assert_eq!(good(&vm.call("stores op=kernel")), 4);
        let kernel = vm.call("check").digest;
        assert_eq!(good(&vm.call("stores op=port")), 1);
        // The port's store goes to the first pages, too.
        let digests = (kernel, vm.call("check").digest);
        let promotion = filled.promotion(vm);
        let pages = ["emulated", "operand", "told"].map(|resort| promotion[resort]["pages"].as_u64().unwrap_or(0));
        assert!(mapping == "private" || pages.iter().sum::<u64>() >= 8, "{promotion}");
        digests
    });
    assert_eq!(digests[0], digests[1]);
}

#[test]
fn page_tables_without_their_bits_in_place_cost_the_guest_nothing() {
    for (boot_args, entries) in [("pt=2m", 2..=3), ("pt=4k", FILLED..=FILLED)] {
        let filled = Filled::with(config(1, 64), boot_args, &[]);
        let unmarked = filled.path("unmarked");
        let report = filled.path("report");
        let mut vm = restore(&filled.path("snapshot"), "private", &report);
        assert!(entries.contains(&vm.call("stores op=unmark").number("kinds")));
        vm.snapshot(&unmarked, &[]);
        drop(vm);
        for function in ["stores op=user", "touch pages=600 write=50 seed=3"] {
            let mut vm = restore(&unmarked, "shared", &report);
            assert_eq!(vm.call("check").digest, filled.digest, "{boot_args}");
            vm.call(function);
            let digest = vm.call("check").digest;
            let promotion = filled.promotion(vm);
            let found = times(&promotion, if has_second_stage() { "page_tables" } else { "ahead" });
            assert!(found > 0 && times(&promotion, "all") == 0, "{boot_args}: {promotion}");
            let mut private = restore(&unmarked, "private", &report);
            private.call(function);
            assert_eq!(private.call("check").digest, digest, "{boot_args}: {function}");
        }
    }
}

#[test]
fn interrupts_are_taken_on_a_stack_in_place() {
    let filled = Filled::with(config(1, 64), "", &["stores op=rsp0"]);
    let mut vm = filled.restore("shared");
    assert!(vm.call("stores op=interrupts").number("kinds") >= 3);
    good(&vm.call("stores op=user"));
    let promotion = filled.promotion(vm);
    assert_eq!(times(&promotion, "all"), 0, "{promotion}");
}

#[test]
fn guest_that_switches_to_a_stack_in_place_goes_on_or_is_told_of() {
    let filled = Filled::with(config(1, 64), "", &[]);
    let mut vm = filled.restore("shared");
    vm.call("stores op=rsp0");
    if has_second_stage() {
        assert!(vm.call("stores op=interrupts").number("kinds") >= 3);
        let promotion = filled.promotion(vm);
        assert!(times(&promotion, "stack") > 0 && times(&promotion, "all") == 0, "{promotion}");
        return;
    }
    vm.begin("stores op=interrupts");
    let (status, stderr) = vm.wait();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("its stack lies in place"), "{stderr}");
}

#[test]
fn descriptors_in_place_are_marked() {
    if !has_second_stage() {
        skip!("nested-paging", "this KVM does not load the guest's segments as a CPU does");
        return;
    }
    let filled = Filled::with(config(1, 64), "", &["stores op=descriptor"]);
    let mut vm = filled.restore("shared");
    good(&vm.call("stores op=load"));
    let promotion = filled.promotion(vm);
    assert_eq!(times(&promotion, "all"), 0, "{promotion}");
}

#[test]
fn all_vcpus_write_at_once() {
    let filled = Filled::with(config(2, 64), "", &["spin ms=1 cpus=all"]);
    for _ in 0..5 {
        let mut vm = filled.restore("shared");
        let answer = vm.call("spin ms=20 cpus=all timer_us=500");
        ["simd_bad", "gpr_bad", "backwards"].iter().for_each(|key| assert_eq!(answer.number(key), 0, "{answer:?}"));
        vm.call("touch pages=200 write=100 seed=5 cpu=1");
        good(&vm.call("stores"));
        vm.call("check cpu=1");
        assert_eq!(times(&filled.promotion(vm), "all"), 0);
    }
}

#[test]
fn snapshots_of_promoted_pages_are_whole_in_every_generation() {
    let filled = Filled::with(config(1, 64), "", &[]);
    let mut parent = filled.path("snapshot");
    let mut digest = filled.digest.clone();
    for (generation, kind) in ["Full", "Diff", "Diff", "Full"].into_iter().enumerate() {
        let mut vm = restore(&parent, "shared", &filled.path("report"));
        assert_eq!(vm.call("check").digest, digest, "generation {generation}");
        vm.call(&format!("touch pages=150 write=60 seed={}", generation + 1));
        digest = vm.call("check").digest;
        let out = filled.path(&generation.to_string());
        vm.pause();
        vm.capture(&out, kind);
        vm.resume();
        assert_eq!(vm.call("check").digest, digest);
        if kind == "Diff" {
            // Promoted pages are no changed pages: 90 were written, and what the guest needs to answer.
            assert!((90..150).contains(&pages(&out).0), "{:?}", pages(&out));
        }
        for policy in ["eager", "firecracker", "trenv"] {
            assert_eq!(Vm::restore(&out, policy).call("check").digest, digest, "{policy}, generation {generation}");
        }
        parent = out;
    }
}

#[test]
fn devices_write_into_pages_in_place() {
    let dir = scratch();
    let image = dir.path().join("disk");
    std::fs::write(
        &image,
        (0..1 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect::<Vec<_>>(),
    )
    .unwrap();
    let socket = dir.path().join("v");
    let drive = |id: &str, engine: &str| {
        json!({ "drive_id": id, "path_on_host": image, "is_root_device": false,
    "is_read_only": true, "io_engine": engine })
    };
    let mut config = config(1, 64);
    config["drives"] = json!([drive("a", "Sync"), drive("b", "Async")]);
    config["vsock"] = json!({ "guest_cid": 3, "uds_path": socket });
    config["entropy"] = json!({});
    config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true });
    let echo = UnixListener::bind(dir.path().join("v_99")).unwrap();
    std::thread::spawn(move || {
        for mut stream in echo.incoming().map_while(Result::ok) {
            // Those of machines that are gone may never end.
            std::thread::spawn(move || {
                let mut all = Vec::new();
                if stream.read_to_end(&mut all).is_ok() && stream.write_all(&all).is_ok() {
                    let _ = stream.shutdown(Shutdown::Write);
                }
            });
        }
    });
    // Run once before the snapshot, they leave their buffers behind: pages that are not zero, and used again.
    let functions = [
        "blk nth=0 op=read sectors=512 chunk=64 depth=4 segs=3",
        "blk nth=1 op=read sectors=512 chunk=64 depth=4 segs=3",
        "vsock_connect port=99 bytes=100000 seed=5",
        "rng bytes=9000",
    ];
    let filled = Filled::with(config, "", &functions);
    let answers = ["private", "shared"].map(|mapping| {
        functions.map(|function| {
            // The machine before this one may have left it.
            let _ = std::fs::remove_file(&socket);
            let mut vm = filled.restore(mapping);
            if function.starts_with("vsock") {
                // The connection of the machine before is over: the guest learns of that first.
                vm.call_raw(function);
            }
            let answer = vm.call(function);
            assert_eq!(vm.call("check").digest, filled.digest);
            let promotion = filled.promotion(vm);
            if mapping == "shared" {
                assert!(number(&promotion, "device", "pages") > 1, "{function}: {promotion}");
                assert_eq!(times(&promotion, "all"), 0, "{function}: {promotion}");
            }
            if function.starts_with("rng") { String::new() } else { answer.digest }
        })
    });
    assert_eq!(answers[0], answers[1]);
}

#[test]
fn frames_arrive_in_pages_in_place() {
    with_network(|network| {
        network.tap("tap0");
        let mut config = config(1, 64);
        config["network-interfaces"] =
            json!([{ "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02" }]);
        let filled = Filled::with(config, "", &["net_info", "net_receive count=1 ms=1"]);
        let mut vm = filled.restore("shared");
        network.wait_for("tap0");
        let id = vm.begin("net_answer ip=0x0a4d0002 frames=20 irq=1");
        let socket = UdpSocket::bind((HOST, 0)).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        for round in 0..20_usize {
            let data: Vec<u8> = (0..1400).map(|index| (index * 3 + round) as u8).collect();
            socket.send_to(&data, ("10.77.0.2", 7)).unwrap();
            let mut answer = [0; 2000];
            let (len, _) = socket.recv_from(&mut answer).expect("the guest answers");
            assert_eq!(&answer[..len], data, "round {round}");
        }
        let line = vm.finish(&id);
        assert!(line.contains("udp=20"), "{line}");
        let promotion = filled.promotion(vm);
        assert!(times(&promotion, "device") > 0 && times(&promotion, "all") == 0, "{promotion}");
    });
}

#[test]
fn pages_in_place_can_be_given_back() {
    let mut config = config(1, 64);
    config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true });
    for way in ["report", "inflate"] {
        let filled = Filled::with(config.clone(), "", &[]);
        let [private, shared] = ["private", "shared"].map(|mapping| {
            let mut vm = filled.restore(mapping);
            vm.call("touch pages=100 write=100 seed=2");
            vm.call(&format!("balloon op={way} filled=1"));
            let zero = vm.call("check").digest;
            vm.call("touch pages=300 write=50 seed=9");
            let digest = vm.call("check").digest;
            assert_ne!(zero, digest);
            let out = filled.path(mapping);
            vm.snapshot(&out, &["--diff"]);
            assert_eq!(Vm::restore(&out, "firecracker").call("check").digest, digest, "{way}, {mapping}");
            let promotion = filled.promotion(vm);
            assert!(mapping == "private" || promotion["in_place_pages"].as_u64().unwrap() < 100, "{promotion}");
            (zero, digest)
        });
        assert_eq!(private, shared, "{way}");
    }
}

#[test]
fn api_takes_the_mapping_and_the_metrics_tell_of_promotions() {
    let filled = Filled::with(config(1, 64), "", &[]);
    let metrics = filled.path("metrics");
    let mut vm = Vm::wait_for_api();
    vm.api_ok("PUT", "/metrics", Some(json!({ "metrics_path": metrics })));
    let load = |mapping: &str| {
        json!({ "snapshot_path": filled.path("snapshot"), "resume_vm": true,
                "tvmm": { "policy": "trenv", "in_place_mapping": mapping } })
    };
    assert!(vm.api_fault("PUT", "/snapshot/load", Some(load("sideways"))).contains("sideways"));
    vm.api_ok("PUT", "/snapshot/load", Some(load("shared")));
    good(&vm.call("stores"));
    vm.api_ok("PUT", "/actions", Some(json!({ "action_type": "FlushMetrics" })));
    let lines = std::fs::read_to_string(&metrics).unwrap();
    let line: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert!(times(&line["promotion"], "operand") + times(&line["promotion"], "told") > 0, "{line}");
    let why = refusal(&run(&["restore", "--snapshot", text(&filled.path("none")), "--in-place-mapping", "shared"]));
    assert!(why.contains("none"), "{why}");
    let output = run(&["restore", "--snapshot", text(&filled.path("snapshot")), "--in-place-mapping", "sideways"]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("neither `private` nor `shared`"));
}

#[test]
fn pages_of_a_dax_device_are_promoted_in_whole_blocks() {
    let Some(_far) = far_memory() else { return };
    let dir = scratch();
    let [out, report] = ["dax", "report"].map(|name| dir.path().join(name));
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=3000 seed=7");
    let digest = vm.call("check").digest;
    vm.snapshot(&out, &[]);
    drop(vm);
    run_ok(&["pool", "create", "--tier", "cxl", "--at", DEVICE, "--format", "dax0.0"]);
    run_ok(&["pool", "add", DEVICE, text(&out)]);
    let mut vm = Vm::restore_with(&out, "trenv", &["--pool", DEVICE, "--report", text(&report)]);
    assert_eq!(vm.call("check").digest, digest);
    assert!(good(&vm.call("stores")) >= 45);
    assert_eq!(good(&vm.call("stores op=kernel")), 4);
    vm.call("touch pages=300 write=50 seed=3");
    let promotion = end(vm, &report)["promotion"].clone();
    let pages = number(&promotion, "operand", "pages") + number(&promotion, "told", "pages");
    assert!(pages >= 512 && pages.is_multiple_of(512), "{promotion}");
    ["near", "all"].iter().for_each(|resort| assert_eq!(times(&promotion, resort), 0, "{resort}: {promotion}"));
}
