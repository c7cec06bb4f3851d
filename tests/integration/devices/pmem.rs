//! Images as guest memory: shared with the host's page cache, kept out of snapshots, refused when they are not the
//! same.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::artefact::{inspect, pages};
use crate::support::{Vm, config, run_err, scratch, text};

const PAGE: u64 = 4096;

/// An image of `len` bytes, no two pages alike.
fn image(dir: &Path, name: &str, len: u64) -> PathBuf {
    let path = dir.join(name);
    let bytes: Vec<u8> = (0..len).map(|at| (at / PAGE * 7 + at % 251) as u8).collect();
    std::fs::write(&path, bytes).unwrap();
    path
}

fn with_pmem(mib: u64, images: &[(&Path, bool)]) -> Value {
    let mut config = config(1, mib);
    let device = |(index, (path, read_only)): (usize, &(&Path, bool))| {
        json!({ "id": format!("p{index}"),
    "path_on_host": path, "read_only": read_only })
    };
    config["pmem"] = images.iter().enumerate().map(device).collect();
    config
}

/// The fields of this process's mapping of a file, KiB.
fn mapping(vm: &Vm, path: &Path, field: &str) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).unwrap();
    let of_file = smaps.lines().skip_while(|line| !line.ends_with(text(path)));
    let line = of_file.skip(1).find(|line| line.starts_with(&format!("{field}:"))).expect("a mapping of the image");
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn guests_see_the_image_share_its_pages_and_cannot_write_it() {
    let dir = scratch();
    let image = image(dir.path(), "image", (3 << 20) + 100);
    let before = std::fs::read(&image).unwrap();
    let config = with_pmem(64, &[(&image, true)]);
    let mut vms = [Vm::boot(&config), Vm::boot(&config)];
    let answers = [0, 1].map(|index: usize| vms[index].call("pmem"));
    assert_eq!(answers[0].digest, answers[1].digest);
    assert_eq!((answers[0].number("size"), answers[0].value("gpa")), (4 << 20, "0x100000000"));
    let tail = vms[0].call("pmem first=769 pages=255").digest;
    assert_eq!(vms[0].call("pmem first=800 pages=1").digest, vms[0].call("pmem first=1000 pages=1").digest);
    assert_ne!(vms[0].call("pmem first=0 pages=255").digest, tail, "behind the image are zeros");
    for vm in &vms {
        assert!(mapping(vm, &image, "Rss") >= 3 << 10);
        assert_eq!(mapping(vm, &image, "Private_Dirty"), 0);
    }
    vms[0].call("pmem write=5 pages=20");
    assert_eq!(vms[0].call("pmem pages=768").digest, vms[1].call("pmem pages=768").digest);
    assert_eq!(std::fs::read(&image).unwrap(), before);
}

#[test]
fn what_the_guest_writes_and_flushes_is_in_the_file() {
    let dir = scratch();
    let image = image(dir.path(), "image", 2 << 20);
    let mut vm = Vm::boot(&with_pmem(64, &[(&image, false)]));
    let written = vm.call("pmem first=3 pages=100 write=9");
    assert_eq!(written.number("ret"), 0);
    let whole = vm.call("pmem").digest;
    drop(vm);
    let bytes = std::fs::read(&image).unwrap();
    assert_eq!(bytes.len(), 2 << 20);
    let mut reader = Vm::boot(&with_pmem(64, &[(&image, true)]));
    assert_eq!(reader.call("pmem first=3 pages=100").digest, written.digest);
    assert_eq!(reader.call("pmem").digest, whole);
}

#[test]
fn snapshots_name_the_image_and_do_not_hold_it() {
    let dir = scratch();
    let images = ["a", "b"].map(|name| image(dir.path(), name, 16 << 20));
    // Two RAM ranges: the slots of the images come after both.
    let mut vm = Vm::boot(&with_pmem(3200, &[(&images[0], true), (&images[1], true)]));
    vm.call("fill pages=500 seed=3");
    let expected = ["check", "pmem", "pmem nth=1"].map(|function| vm.call(function).digest);
    assert_ne!(vm.call("pmem").value("gpa"), vm.call("pmem nth=1").value("gpa"));
    let [full, diff] = ["full", "diff"].map(|name| dir.path().join(name));
    vm.snapshot(&full, &[]);
    assert!(pages(&full).0 < 3000, "{:?}", pages(&full));
    vm.call("touch pages=100 write=100 seed=2");
    let touched = vm.call("check").digest;
    vm.snapshot(&diff, &["--diff"]);
    assert!((100..300).contains(&pages(&diff).0), "{:?}", pages(&diff));
    assert_eq!(inspect(&diff)["layers"].as_array().unwrap().len(), 2);
    for policy in ["eager", "firecracker", "firecracker-uffd"] {
        for (snapshot, check) in [(&full, &expected[0]), (&diff, &touched)] {
            let mut restored = Vm::restore(snapshot, policy);
            let seen = ["check", "pmem", "pmem nth=1"].map(|function| restored.call(function).digest);
            assert_eq!(seen, [check, &expected[1], &expected[2]].map(String::clone), "{policy}");
            assert_eq!(restored.api_ok("GET", "/vm/config", None)["pmem"][1]["path_on_host"], json!(images[1]));
        }
    }
}

#[test]
fn image_that_is_missing_short_or_changed_is_refused_at_restore_and_another_can_be_named() {
    let dir = scratch();
    let image = image(dir.path(), "image", 2 << 20);
    let copy = dir.path().join("copy");
    std::fs::copy(&image, &copy).unwrap();
    let mut vm = Vm::boot(&with_pmem(64, &[(&image, true)]));
    let digest = vm.call("pmem").digest;
    let out = dir.path().join("snapshot");
    vm.snapshot(&out, &[]);
    drop(vm);
    let refuses = |what: &str| {
        let said = run_err(&["restore", "--snapshot", text(&out), "--policy", "eager"]);
        assert!(said.contains(what) && said.contains(text(&image)) && said.contains("`p0`"), "{said}");
    };
    std::fs::write(&image, b"short").unwrap();
    refuses("it has 5 bytes");
    std::fs::copy(&copy, &image).unwrap();
    refuses("it was written since");
    std::fs::remove_file(&image).unwrap();
    refuses("Cannot open");
    let mut vm = Vm::wait_for_api();
    let overrides = json!({ "drive_overrides": [{ "drive_id": "p0", "path_on_host": copy }], "policy": "eager" });
    let load = json!({ "snapshot_path": out, "resume_vm": true, "tvmm": overrides });
    vm.api_ok("PUT", "/snapshot/load", Some(load));
    assert_eq!(vm.call("pmem").digest, digest);
    assert_eq!(vm.api_ok("GET", "/vm/config", None)["pmem"][0]["path_on_host"], json!(copy));
}

#[test]
fn configs_that_cannot_be_are_refused_and_limits_can_be_changed() {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, with_pmem(64, &[(&dir.path().join("none"), true)]).to_string()).unwrap();
    let said = run_err(&["--config", text(&path)]);
    assert!(said.contains("none for pmem device `p0`"), "{said}");
    let image = image(dir.path(), "image", 100);
    let vm = Vm::boot(&with_pmem(64, &[(&image, false)]));
    let other = dir.path().join("other.json");
    std::fs::write(&other, with_pmem(64, &[(&image, true)]).to_string()).unwrap();
    assert!(run_err(&["--config", text(&other)]).contains("locked"));
    let limit = json!({ "ops": { "size": 5, "refill_time": 100 } });
    vm.api_ok("PATCH", "/pmem/p0", Some(json!({ "id": "p0", "rate_limiter": limit })));
    assert_eq!(vm.api_ok("GET", "/vm/config", None)["pmem"][0]["rate_limiter"], limit);
    assert!(vm.api_fault("PATCH", "/pmem/p1", Some(json!({ "id": "p1" }))).contains("no pmem device `p1`"));
}
