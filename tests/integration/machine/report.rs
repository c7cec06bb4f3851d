//! `--run` and `--report`: exit codes, where the time went, what the VM cost.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{TIMEOUT, Vm, answer_to_run, config, run, run_ok, scratch, text, tvmm};

fn write_config(dir: &Path, config: &Value) -> String {
    let path = dir.join("vm.json");
    std::fs::write(&path, config.to_string()).unwrap();
    text(&path).to_string()
}

fn boot_and_run(config: &Value, function: &str, more: &[&str]) -> Output {
    let dir = scratch();
    let path = write_config(dir.path(), config);
    run(&[&["--config", &path, "--run", function][..], more].concat())
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn answered_request_exits_with_zero_and_prints_the_answer() {
    let output = boot_and_run(&config(1, 64), "hello", &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.lines().any(|line| line.starts_with("ok run-")), "{stdout}");
}

#[test]
fn refused_request_exits_with_one_and_prints_the_answer() {
    let output = boot_and_run(&config(1, 64), "nonsense", &[]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.lines().any(|line| line.starts_with("err run-")), "{stdout}");
}

#[test]
fn restore_of_a_vm_that_was_saved_during_a_request_prints_the_answer_to_its_own() {
    let dir = scratch();
    let path = write_config(dir.path(), &config(1, 64));
    let out = dir.path().join("full");
    let vm = Vm::spawn(scratch(), &["--config", &path, "--run", "spin ms=2000"]);
    crate::support::service::wait_until("the VM runs", || vm.socket().exists());
    // The request begins meanwhile.
    std::thread::sleep(Duration::from_millis(400));
    vm.snapshot(&out, &[]);
    let said = run_ok(&["restore", "--snapshot", text(&out), "--run", "hello"]);
    // The guest's answer to the request of the saved process comes first.
    assert_eq!(answer_to_run(&said).digest, "a0ac0ed9675fab36", "{said}");
}

#[test]
fn request_without_an_answer_in_time_exits_with_one_and_says_so() {
    let started = Instant::now();
    let output = boot_and_run(&config(1, 64), "spin ms=30000", &["--run-timeout", "1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("did not answer --run within 1 second"), "{}", stderr(&output));
    assert!(started.elapsed().as_secs() < 20, "it ended with the guest, not with the timeout");
}

#[test]
fn guest_that_ends_first_exits_with_one_and_says_so() {
    let mut config = config(1, 64);
    config["boot-source"] = json!({ "boot_args": "pt=nonsense" });
    let output = boot_and_run(&config, "hello", &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("ended before it answered"), "{}", stderr(&output));
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains("panic "), "what the guest said is shown: {stdout}");
}

#[test]
fn failing_run_still_writes_its_report() {
    let dir = scratch();
    let path = dir.path().join("report.json");
    let output = boot_and_run(&config(1, 64), "nonsense", &["--report", text(&path)]);
    assert_eq!(output.status.code(), Some(1));
    let report = read_report(&path);
    assert!(report["answer"].as_str().unwrap().starts_with("err run-"), "{report:#}");
}

fn read_report(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// `(name, start, end)` of each slice, µs.
fn slices(report: &Value) -> Vec<(String, f64, f64)> {
    let slice = |slice: &Value| {
        let [start, length] = ["start_us", "length_us"].map(|key| slice[key].as_f64().unwrap());
        (slice["slice"].as_str().unwrap().to_string(), start, start + length)
    };
    report["slices"].as_array().unwrap().iter().map(slice).collect()
}

/// The part of `[0, until)` that the slices cover, µs.
fn covered(slices: &[(String, f64, f64)], until: f64) -> f64 {
    let mut parts: Vec<(f64, f64)> = slices.iter().map(|&(_, start, end)| (start, end.min(until))).collect();
    parts.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut sum = 0.0;
    let mut at = 0.0_f64;
    for (start, end) in parts {
        sum += (end - start.max(at)).max(0.0);
        at = at.max(end);
    }
    sum
}

fn assert_sound(report: &Value, wanted: &[&str], outside_us: f64) {
    let slices = slices(report);
    for name in wanted {
        assert!(slices.iter().any(|slice| slice.0 == *name), "no slice {name}: {report:#}");
    }
    let of = |name: &str| slices.iter().find(|slice| slice.0 == name).unwrap();
    assert!(slices.iter().all(|&(_, start, end)| start >= 0.0 && end >= start && end <= outside_us), "{report:#}");
    assert_eq!(slices[0].0, "spawn");
    assert_eq!(slices[0].1, 0.0);
    // Slices that prepare the guest begin in the order of the report, and are over when the guest is entered.
    let guest = slices.iter().position(|slice| slice.0 == "resume").unwrap();
    assert!(slices[..guest].windows(2).all(|pair| pair[0].1 <= pair[1].1), "{report:#}");
    let [exit, output] = ["first_exit_us", "first_output_us"].map(|key| report[key].as_f64().unwrap());
    let entered = of("execute").1;
    assert!(slices[..guest].iter().all(|slice| slice.2 <= exit), "{report:#}");
    assert!(entered <= exit && exit <= output && output <= of("execute").2, "{report:#}");
    assert!((of("resume").2 - exit).abs() < 1.0 && (of("first_response").2 - output).abs() < 1.0, "{report:#}");
    assert!(of("execute").2 <= of("stop").1, "{report:#}");
    // No time goes missing before the guest runs.
    let share = covered(&slices, exit) / exit;
    assert!(share > 0.95, "slices tell of {:.0} % of the time: {report:#}", share * 100.0);
}

/// Runs tvmm with `--report` and `--start-time-us`; the report, and how long it took from outside, µs.
fn reported(dir: &Path, args: &[&str]) -> (Value, f64) {
    reported_by(tvmm(), dir, args)
}

fn reported_by(mut tvmm: Command, dir: &Path, args: &[&str]) -> (Value, f64) {
    let path = dir.join("report.json");
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let start = (now.tv_sec * 1_000_000 + now.tv_nsec / 1000).to_string();
    let clock = Instant::now();
    let output = tvmm.args(args).args(["--report", text(&path), "--start-time-us", &start]).output().unwrap();
    let outside_us = clock.elapsed().as_micros() as f64;
    assert!(output.status.success(), "{}", stderr(&output));
    let report = read_report(&path);
    assert_eq!(report["start_source"], "parent");
    (report, outside_us + 1.0)
}

const GUEST: [&str; 5] = ["resume", "first_response", "execute", "stop", "spawn"];

#[test]
fn boot_report_has_every_slice_and_they_add_up() {
    let dir = scratch();
    let config = write_config(dir.path(), &config(1, 64));
    let (report, outside) = reported(dir.path(), &["--config", &config, "--run", "hello"]);
    assert_eq!(report["operation"], "boot");
    assert_eq!(report["restore"], Value::Null);
    assert!(report["answer"].as_str().unwrap().starts_with("ok run-"));
    assert!(report["exits"]["exit_io_out"]["count"].as_u64().unwrap() > 0, "{report:#}");
    assert_sound(&report, &[&GUEST[..], &["setup", "map", "vm_create", "kernel_load", "state_load"]].concat(), outside);
}

#[test]
fn restore_report_has_every_slice_and_says_what_was_placed_where() {
    let dir = scratch();
    let out = dir.path().join("full");
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=1000 seed=1");
    vm.snapshot(&out, &[]);
    for policy in ["eager", "firecracker"] {
        let args = ["restore", "--snapshot", text(&out), "--policy", policy, "--run", "check"];
        let (report, outside) = reported(dir.path(), &args);
        assert_eq!(report["operation"], "restore");
        let restore = &report["restore"];
        assert_eq!((&restore["policy"], &restore["layers"]), (&json!(policy), &json!(1)));
        let planned = &restore["engine"]["planned"];
        let [preload, mapped, zero] = ["preload", "cow-file", "zero"].map(|key| planned[key].as_u64().unwrap());
        assert_eq!(preload + mapped + zero, (64 << 20) / 4096);
        let preloaded = restore["engine"]["bytes_preloaded"].as_u64().unwrap();
        assert_eq!(preloaded, preload * 4096);
        assert!(if policy == "eager" { preload >= 1000 && mapped == 0 } else { preload == 0 && mapped >= 1000 });
        let guest_kib = report["memory"]["guest_private_kib"].as_u64().unwrap();
        assert!(if policy == "eager" { guest_kib >= 4000 } else { guest_kib < 4000 }, "{report:#}");
        let wanted = [&GUEST[..], &["setup", "state_load", "map", "preload", "vm_create"]].concat();
        assert_sound(&report, &wanted, outside);
    }
}

#[test]
fn an_idle_vmm_costs_at_most_3_mib_besides_guest_memory() {
    // The limit is for the static release build (TVMM_BINARY). The build of this test is larger, debug information and
    // the unoptimised code of its own crate, and linked to the system's C library: it gets as much again.
    let limit_kib = if std::env::var_os("TVMM_BINARY").is_some() { 3 * 1024 } else { 6 * 1024 };
    let dir = scratch();
    let out = dir.path().join("full");
    let mut vm = Vm::boot(&config(1, 512));
    vm.call("fill pages=16384 seed=1");
    vm.snapshot(&out, &[]);
    drop(vm);
    // A copy of its own: pages of the binary that other tests' processes have mapped would count in part.
    let binary = dir.path().join("tvmm");
    std::fs::copy(tvmm().get_program(), &binary).unwrap();
    for policy in ["eager", "firecracker"] {
        let args = ["restore", "--snapshot", text(&out), "--policy", policy];
        let mut vm = Vm::spawn_of(Command::new(&binary), scratch(), &args);
        vm.call("check");
        let guest = vm.api_ok("GET", "/tvmm/report", None)["memory"]["guest_pss_kib"].as_u64().unwrap();
        // Seen from outside: a report is a request, whose code is mapped until the VM was quiet for 10 s.
        let rollup = PathBuf::from(format!("/proc/{}/smaps_rollup", vm.pid()));
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let text = std::fs::read_to_string(&rollup).unwrap();
            let line = text.lines().find(|line| line.starts_with("Pss:")).unwrap();
            let all: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
            let vmm = all - guest;
            if vmm <= limit_kib {
                eprintln!("{policy}: {vmm} KiB besides guest memory");
                break;
            }
            assert!(Instant::now() < deadline, "{policy}: {vmm} KiB besides guest memory, at most {limit_kib}");
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}
