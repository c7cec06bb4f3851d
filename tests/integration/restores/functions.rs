//! The functions guest: what each of the twelve functions computes is the same after a restore, and depends on its
//! input.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::{Answer, Vm, config, is_emulated, run_ok, scratch, text};

fn functions_config(mib: u64) -> Value {
    let mut config = config(1, mib);
    config["tvmm"] = json!({ "guest": "functions" });
    config
}

/// Returns requests that prepare data, and requests that use it; each of these must get an answer unlike all others.
fn requests() -> (Vec<String>, Vec<String>) {
    let sized = [
        ("readlist", 16),
        ("mmap", 16),
        ("image", 6_000),
        ("json", 3_000),
        ("pyaes", 400),
        ("chameleon", 100),
        ("matmul", 60),
        ("ffmpeg", 8_000),
        ("compression", 3_000),
        ("pagerank", 800),
    ];
    let prepared = ["image", "json", "ffmpeg", "compression"];
    let mut prepare =
        vec!["prepare function=hello runtime=8".to_string(), "prepare function=readlist size=16".to_string()];
    prepare.extend(
        sized
            .iter()
            .filter(|(name, _)| prepared.contains(name))
            .map(|(name, size)| format!("prepare function={name} size={size}")),
    );
    let mut requests: Vec<String> = sized.iter().map(|(name, size)| format!("{name} size={size}")).collect();
    requests.extend(["hello", "hello input=b", "readlist input=b", "mmap size=17"].map(String::from));
    // At full size, where instructions are not emulated; `mmap` would have to have 512 MiB.
    if !is_emulated() {
        prepare.push("prepare function=recognition".to_string());
        for name in
            ["image", "json", "pyaes", "chameleon", "matmul", "ffmpeg", "compression", "recognition", "pagerank"]
        {
            requests.extend(["a", "b"].map(|input| format!("{name} input={input}")));
        }
    }
    (prepare, requests)
}

fn answers(vm: &mut Vm, requests: &[String]) -> BTreeMap<String, Answer> {
    requests.iter().map(|request| (request.clone(), vm.call(request))).collect()
}

#[test]
fn functions_compute_the_same_after_a_restore_and_something_else_for_each_input() {
    let (prepare, requests) = requests();
    let mut vm = Vm::boot(&functions_config(448));
    for request in &prepare {
        vm.call(request);
    }
    let before = answers(&mut vm, &requests);
    for (request, answer) in &before {
        let same = before.values().filter(|other| other.digest == answer.digest).count();
        assert_eq!(same, 1, "{request}: {answer:?}");
        assert!(answer.number("runtime_read") > 50 && answer.number("runtime_written") > 30, "{request}: {answer:?}");
    }
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    vm.snapshot(&snapshot, &[]);
    assert_eq!(answers(&mut vm, &requests), before, "the machine that was snapshotted");
    drop(vm);
    for policy in ["firecracker", "eager"] {
        assert_eq!(answers(&mut Vm::restore(&snapshot, policy), &requests), before, "{policy}");
    }
}

#[test]
fn runtime_image_is_touched_as_the_answer_says() {
    let mut vm = Vm::boot(&functions_config(128));
    vm.call("prepare function=hello runtime=32");
    let answer = vm.call("hello");
    let read = answer.number("runtime_read");
    let written = answer.number("runtime_written");
    let dir = scratch();
    let [snapshot, profile] = ["snapshot", "profile"].map(|name| dir.path().join(name));
    vm.snapshot(&snapshot, &[]);
    run_ok(&["profile", "record", "--snapshot", text(&snapshot), "--run", "hello", "--out", text(&profile)]);
    let shown: Value = serde_json::from_str(&run_ok(&["profile", "show", text(&profile), "--json"])).expect("JSON");
    let of = |key: &str| shown["pages"][key].as_u64().unwrap_or_else(|| panic!("no pages.{key} in {shown}"));
    // Beside the image there are the kernel's own pages.
    assert!((read..read + 100).contains(&of("read")), "{read}: {}", of("read"));
    assert!((written..written + 100).contains(&of("written")), "{written}: {}", of("written"));
}

#[test]
fn requests_that_cannot_be_served_are_refused_and_the_guest_lives_on() {
    let mut vm = Vm::boot(&functions_config(112));
    let refusals = [
        ("prepare", "prepare needs function="),
        ("prepare function=nothing", "no function nothing"),
        ("prepare function=hello", "needs up to 97 MiB of heap"),
        ("prepare function=hello runtime=99999999", "runtime=99999999 is not in"),
        ("prepare function=hello size=5", "hello has no other sizes"),
        ("prepare function=json runtime=1 size=64000000", "MiB of heap"),
        ("prepare function=image runtime=1 size=9", "size=9 is not in"),
        ("prepare function=readlist runtime=1 size=18446744073709551615", "is not in"),
        ("json", "not prepared: run prepare function=json first"),
        ("readlist", "not prepared"),
        ("recognition", "not prepared"),
        ("mmap", "needs up to 513 MiB of heap"),
        ("matmul size=8000", "MiB of heap"),
        ("matmul size=0", "size=0 is not in"),
        ("matmul input=c", "input=c is not a or b"),
        ("matmul input=a size=5", "exclude each other"),
        ("hello cpu=0", "hello has no key 'cpu'"),
    ];
    for (request, part) in refusals {
        let answer = vm.call_raw(request);
        assert!(answer.starts_with("err ") && answer.contains(part), "{request}: {answer}");
    }
    vm.call("prepare function=json runtime=2");
    assert!(vm.call_raw("prepare function=hello runtime=3").contains("has 2 MiB already, not 3"));
    assert!(vm.call_raw("json size=2000").contains("run prepare function=json size=2000 first"));
    // Memory comes back: many times what there is room for at once.
    let digest = vm.call("matmul size=600").digest;
    for _ in 0..30 {
        assert_eq!(vm.call("matmul size=600").digest, digest);
    }
    // The functions of the other guest are there too.
    assert_eq!(vm.call("fill pages=100").number("pages"), 100);
}

#[test]
fn functions_guest_as_a_file_boots_and_the_other_guest_has_no_functions() {
    let dir = scratch();
    let [elf, tiny] = ["functions.elf", "tiny.elf"].map(|name| dir.path().join(name));
    let said = run_ok(&["guest", "--functions", text(&elf), "--out", text(&tiny)]);
    assert_eq!(said.lines().count(), 2, "{said}");
    for (kernel, known) in [(&elf, true), (&tiny, false)] {
        for protocol in ["pvh", "linux64"] {
            let mut config = config(2, 128);
            config["boot-source"] = json!({ "kernel_image_path": kernel, "boot_args": "pt=4k init_on_free=1" });
            config["tvmm"] = json!({ "boot_protocol": protocol });
            let mut vm = Vm::boot(&config);
            let answer = vm.call_raw("matmul size=20");
            assert_eq!(answer.starts_with("ok "), known, "{answer}");
            assert!(known || answer.contains("unknown function 'matmul'"), "{answer}");
            assert_eq!(vm.call("info").value("vcpus"), "2");
        }
    }
}
