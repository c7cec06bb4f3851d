//! `tvmm bench run`, `report` and `diff`.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use crate::support::{run, run_err, run_ok, scratch, signal, test_name, text, tvmm};

const FLOWS: &str = "vanilla,reap,tiered,tiered-cache,warm";

fn study<'a>(out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["bench", "run", "E1,E5", "--functions", "hello", "--flows", FLOWS, "--runs", "1"];
    args.extend(["--out", text(out)]);
    args.extend(more);
    args
}

pub fn samples(out: &Path) -> Vec<Value> {
    let lines = std::fs::read_to_string(out.join("results.jsonl")).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str(line).expect("a line of JSON"));
    lines.skip(1).collect()
}

/// Experiment, flow and round of each sample.
fn keys(samples: &[Value]) -> BTreeSet<String> {
    samples.iter().map(|sample| format!("{} {} {}", sample["experiment"], sample["flow"], sample["round"])).collect()
}

#[test]
fn study_measures_draws_and_is_not_measured_twice() {
    let dir = scratch();
    let out = dir.path().join("results");
    let said = run_ok(&study(&out, &[]));
    assert!(said.contains("E1: Recorded with input A") && said.contains("E5: What brought pages in"), "{said}");
    let first = samples(&out);
    // E5 restores, so the VM that is kept is not in it.
    assert_eq!((first.len(), keys(&first).len()), (5 + 4, 5 + 4));
    for sample in &first {
        assert_eq!(sample["failed"], Value::Null, "{sample}");
        assert!(sample["values"]["answer_ms"].as_f64().unwrap() > 0.0, "{sample}");
    }
    let of = |flow: &str, value: &str| {
        let sample = first.iter().find(|sample| sample["experiment"] == "E5" && sample["flow"] == flow);
        sample.unwrap()["values"][value].as_f64().unwrap()
    };
    assert!(of("vanilla", "by_read_pages") > 0.0 && of("vanilla", "preloaded_pages") == 0.0);
    assert!(of("reap", "preloaded_pages") > 0.0);
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("<svg") && !page.contains("<script") && !page.contains("<h2>Failed"));
    assert!(out.join("e1-answer.svg").exists() && !out.join("stage").exists());

    let kept = std::fs::read(out.join("results.jsonl")).unwrap();
    run_ok(&study(&out, &[]));
    assert_eq!(std::fs::read(out.join("results.jsonl")).unwrap(), kept, "what was measured is kept");
    let drawn = dir.path().join("drawn");
    run_ok(&["bench", "report", text(&out), "--out", text(&drawn)]);
    assert_eq!(std::fs::read_to_string(drawn.join("report.html")).unwrap(), page);
    let diff = run_ok(&["bench", "diff", text(&out), text(&out)]);
    assert!(diff.contains("geometric mean of 9 ratios: 1.000"), "{diff}");
    assert!(
        run_err(&["bench", "diff", text(&out), text(&out), "--value", "nothing"]).contains("No nothing was measured")
    );
    let mut other = study(&out, &[]);
    other[8] = "2";
    assert!(run_err(&other).contains("was measured with rounds 1, and this is 2"));
}

#[test]
fn study_that_is_killed_goes_on_where_it_ended() {
    let dir = scratch();
    let out = dir.path().join("results");
    let mut child = tvmm().args(study(&out, &[])).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = std::time::Instant::now() + crate::support::TIMEOUT;
    let measured = || std::fs::read_to_string(out.join("results.jsonl")).map_or(0, |lines| lines.lines().count());
    while measured() < 4 {
        assert!(std::time::Instant::now() < deadline && child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    signal(child.id(), rustix::process::Signal::KILL);
    child.wait().unwrap();
    let before = samples(&out);
    run_ok(&study(&out, &[]));
    let after = samples(&out);
    assert_eq!(after[..before.len()], before);
    assert_eq!((after.len(), keys(&after).len()), (9, 9));
}

#[test]
fn another_vmm_is_measured_beside_and_one_that_fails_is_told() {
    let dir = scratch();
    let out = dir.path().join("results");
    // Any VMM with Firecracker's command line and API will do: tvmm has them.
    let vmm = tvmm().get_program().to_owned();
    let mut args = study(&out, &["--firecracker", vmm.to_str().unwrap()]);
    let flows =
        "vanilla,firecracker,firecracker-cache,firecracker-uffd-ext,firecracker-uffd-all,firecracker-uffd-all-cache";
    (args[2], args[6]) = ("E1", flows);
    run_ok(&args);
    let all = samples(&out);
    assert_eq!(all.len(), 6);
    assert!(all.iter().all(|sample| sample["values"]["answer_ms"].as_f64() > Some(0.0)), "{all:?}");
    // Page by page there are as many faults as pages, else one brings them all.
    let of = |flow: &str, value: &str| {
        let sample = all.iter().find(|sample| sample["flow"] == flow).unwrap();
        sample["values"][value].as_f64().unwrap()
    };
    assert!(of("firecracker-uffd-ext", "handler_faults") > 50.0);
    assert!(of("firecracker-uffd-ext", "handler_pages") <= of("firecracker-uffd-ext", "handler_faults"));
    assert_eq!(of("firecracker-uffd-all", "handler_pages"), 1024.0 * 256.0);
    let broken = dir.path().join("broken");
    let mut args = study(&broken, &["--firecracker", "/bin/false"]);
    (args[2], args[6]) = ("E1", "vanilla,firecracker,firecracker-uffd-ext");
    let output = run(&args);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        ["firecracker", "firecracker-uffd-ext"]
            .iter()
            .all(|flow| said.contains(&format!("E1, hello, {flow}: 1 failed"))),
        "{said}"
    );
    let page = std::fs::read_to_string(broken.join("report.html")).unwrap();
    assert!(page.contains("<h2>Failed"), "{page}");
}

#[test]
fn what_cannot_be_measured_is_refused_at_once() {
    let dir = scratch();
    let out = dir.path().join("results");
    let refused = |experiments: &str, more: &[&str]| {
        let mut args = vec!["bench", "run", experiments, "--out", text(&out)];
        args.extend(more);
        run_err(&args)
    };
    assert!(refused("E9", &[]).contains("no experiment \"E9\""));
    assert!(refused("E1", &["--functions", "goodbye"]).contains("no function \"goodbye\""));
    assert!(refused("E1", &["--flows", "waterfall"]).contains("no flow \"waterfall\""));
    assert!(refused("E4", &[]).contains("--slow-dir"));
    assert!(refused("E1", &["--flows", "firecracker"]).contains("--firecracker"));
    assert!(refused("E1", &["--firecracker", "/nowhere/vmm"]).contains("no /nowhere/vmm"));
    assert!(!out.exists());
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("results.jsonl"), "garbage\n").unwrap();
    assert!(refused("E1", &[]).contains("line 1"));
    assert!(run_err(&["bench", "report", text(&out)]).contains("line 1"));
    assert!(run_err(&["bench", "report", "/nowhere"]).contains("Cannot read"));
}

/// Not a test: a VMM that serves its socket, accepts, and never answers.
#[test]
#[ignore = "the VMM that the test below starts"]
fn silent_vmm_process() {
    let listener = std::os::unix::net::UnixListener::bind(std::env::var_os("SILENT_SOCKET").unwrap()).unwrap();
    let mut kept = Vec::new();
    for stream in listener.incoming() {
        kept.push(stream);
    }
}

#[test]
fn another_vmm_that_never_answers_ends_in_time_and_its_wait_is_told() {
    let dir = scratch();
    let out = dir.path().join("results");
    let vmm = dir.path().join("vmm");
    let test = std::env::current_exe().unwrap();
    let name = test_name(module_path!(), "silent_vmm_process");
    // Called as `vmm --api-sock PATH`.
    let script = "#!/bin/sh\n[ $1 = --help ] && exit\nSILENT_SOCKET=$2 exec TEST --exact NAME --ignored\n";
    std::fs::write(&vmm, script.replace("TEST", text(&test)).replace("NAME", &name)).unwrap();
    std::fs::set_permissions(&vmm, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut args = study(&out, &["--firecracker", text(&vmm)]);
    (args[2], args[6]) = ("E1", "firecracker");
    let output = run(&args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Waiting for the answer to PUT /boot-source") && said.contains("at most 30 s"), "{said}");
    assert!(said.contains("E1, hello, firecracker: 1 failed"), "{said}");
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("was not answered within 30000 ms"), "{page}");
}
