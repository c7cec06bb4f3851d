//! `tvmm bench burst`, and the flows of `tvmm bench run` whose VMs wait for a request.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use super::bench::samples;
use crate::support::{finish, run, run_err, run_ok, scratch, text, tvmm};

fn of<'a>(samples: &'a [Value], experiment: &str, case: &str, flow: &str) -> &'a Value {
    let is_it =
        |sample: &&Value| sample["experiment"] == experiment && sample["case"] == case && sample["flow"] == flow;
    samples.iter().find(is_it).unwrap_or_else(|| panic!("no {experiment}, {case}, {flow} in {samples:?}"))
}

fn value(sample: &Value, name: &str) -> f64 {
    sample["values"][name].as_f64().unwrap_or_else(|| panic!("no {name} in {sample}"))
}

/// Runs `tvmm bench` with its files for temporary use in `dir`, and checks that nothing of it is left.
fn bench_without_a_trace(dir: &Path, args: &[&str]) -> Output {
    let temporary = dir.join("temporary");
    std::fs::create_dir_all(&temporary).unwrap();
    let output = finish(tvmm().arg("bench").args(args).env("TMPDIR", &temporary));
    assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0, "files for temporary use are removed");
    for entry in std::fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path().join("cmdline");
        // A process may end while it is looked at.
        let command = std::fs::read(&path).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&command).contains(text(dir)), "{} is left", path.display());
    }
    output
}

fn burst<'a>(out: &'a Path, flows: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["burst", "--counts", "1,3", "--flows", flows, "--runs", "1", "--out", text(out)];
    [&args[..], more].concat()
}

#[test]
fn waiting_vms_are_measured_beside_the_warm_one() {
    let dir = scratch();
    let out = dir.path().join("results");
    let flows = "tiered-cache,warm,standby,standby-vsock,rewound,forked,repurposed";
    let args = ["run", "E1,E3,E6", "--functions", "hello", "--flows", flows, "--runs", "2", "--out", text(&out)];
    let output = bench_without_a_trace(dir.path(), &[&args[..], &["--parallel", "2", "--vms", "2"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let all = samples(&out);
    // E3: of one snapshot, and of one each. Of the flows `warm`, `forked` and `repurposed` there is one VM.
    assert_eq!(all.len(), 7 * 2 + 4 * 2 * 2 + 4, "{all:?}");
    for sample in &all {
        assert_eq!(sample["failed"], Value::Null, "{sample}");
        let name = if sample["experiment"] == "E6" { "local_mib_per_vm" } else { "answer_ms" };
        assert!(value(sample, name) > 0.0, "{sample}");
    }
    let rewound = of(&all, "E1", "hello", "rewound");
    assert!(value(rewound, "rewound_pages") > 500.0 && value(rewound, "rewind_ms") > 0.0, "{rewound}");
    for flow in ["standby", "standby-vsock"] {
        let standby = of(&all, "E1", "hello", flow);
        assert!(value(standby, "local_dram_kib") > 0.0, "{standby}");
        // The guest's first instruction comes before its answer.
        let entry = value(standby, "to_entry_ms");
        let exit = value(standby, "to_first_exit_ms");
        assert!(0.0 < entry && entry <= exit && exit <= value(standby, "answer_ms"), "{standby}");
    }
    let forked = of(&all, "E1", "hello", "forked");
    assert!(value(forked, "stood_still_ms") > 0.0, "{forked}");
    assert!(value(forked, "stood_still_ms") <= value(forked, "fork_ms"), "{forked}");
    let repurposed = of(&all, "E1", "hello", "repurposed");
    assert!(value(repurposed, "repurpose_ms") > 0.0, "{repurposed}");
    // A VM that did not wait for its request has no such time.
    for sample in [rewound, forked, repurposed] {
        assert_eq!(sample["values"]["to_entry_ms"], Value::Null, "{sample}");
    }
    let at_once = of(&all, "E3", "hello ×2, 2 snapshot(s)", "standby");
    assert!(value(at_once, "answer_ms") <= value(at_once, "answer_max_ms"), "{at_once}");
    let kept = std::fs::read(out.join("results.jsonl")).unwrap();
    let again = bench_without_a_trace(dir.path(), &[&args[..], &["--parallel", "2", "--vms", "2"]].concat());
    assert!(again.status.success());
    assert_eq!(std::fs::read(out.join("results.jsonl")).unwrap(), kept, "what was measured is kept");
}

#[test]
fn a_burst_has_a_time_for_each_vm_and_is_drawn() {
    let dir = scratch();
    let out = dir.path().join("results");
    let vmm = tvmm().get_program().to_owned();
    let flows = "vanilla,tiered-cache,standby,standby-vsock,rewound,firecracker-cache";
    let args = burst(&out, flows, &["--runtime", "8", "--firecracker", vmm.to_str().unwrap()]);
    let output = bench_without_a_trace(dir.path(), &args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("burst: Many VMs asked at the same moment") && said.contains("hello ×3"), "{said}");
    let all = samples(&out);
    assert_eq!(all.len(), 2 * 6);
    for (case, count) in [("hello ×1", 1), ("hello ×3", 3)] {
        for flow in flows.split(',') {
            let sample = of(&all, "burst", case, flow);
            assert_eq!(sample["failed"], Value::Null, "{sample}");
            let times = sample["answers_ms"].as_array().unwrap().iter().map(|ms| ms.as_f64().unwrap());
            let mut times: Vec<f64> = times.collect();
            times.sort_by(f64::total_cmp);
            assert_eq!(times.len(), count, "{sample}");
            assert!(times[0] > 0.0);
            assert_eq!(value(sample, "answer_ms"), times[(count - 1) / 2]);
            assert_eq!(value(sample, "answer_p95_ms"), times[count - 1]);
            assert_eq!(value(sample, "answer_max_ms"), times[count - 1]);
            assert!(value(sample, "alone_mib") > 0.0 && value(sample, "load_before_cpus") >= 0.0);
            if flow.starts_with("standby") {
                assert!(value(sample, "to_entry_ms") <= value(sample, "to_first_exit_ms"), "{sample}");
                assert!(value(sample, "to_first_exit_p95_ms") <= value(sample, "answer_max_ms"), "{sample}");
            }
        }
    }
    for name in ["burst-hello-answer_ms.svg", "burst-hello-answer_p95_ms.svg"] {
        assert!(std::fs::read_to_string(out.join(name)).unwrap().contains("firecracker-cache"), "{name}");
    }
    assert!(std::fs::read_to_string(out.join("report.html")).unwrap().contains("<h2>burst"));
    let other = burst(&out, flows, &["--firecracker", vmm.to_str().unwrap()]);
    let said = run_err(&[&["bench"], &other[..]].concat());
    assert!(said.contains("was measured with runtime MiB 8, and this is nothing"), "{said}");
    let diff = run_ok(&["bench", "diff", text(&out), text(&out)]);
    assert!(diff.contains("geometric mean of 12 ratios: 1.000"), "{diff}");
}

#[test]
fn a_vm_of_a_burst_that_fails_is_told_and_the_others_end() {
    let dir = scratch();
    let out = dir.path().join("results");
    let vmm = dir.path().join("vmm");
    // Called as `vmm --api-sock PATH`.
    let script = "#!/bin/sh\ncase $2 in */1.sock) echo 'out of luck' >&2; exit 3;; esac\nexec TVMM \"$@\"\n";
    std::fs::write(&vmm, script.replace("TVMM", tvmm().get_program().to_str().unwrap())).unwrap();
    std::fs::set_permissions(&vmm, PermissionsExt::from_mode(0o755)).unwrap();
    let output = bench_without_a_trace(dir.path(), &burst(&out, "firecracker", &["--firecracker", text(&vmm)]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("burst, hello ×3, firecracker: 1 failed"), "{said}");
    assert!(said.contains("1 of 3 VMs failed, the first because") && said.contains("out of luck"), "{said}");
    assert!(!said.contains("hello ×1,"), "one VM alone has its socket: {said}");
    let all = samples(&out);
    assert_eq!(all.len(), 2);
    assert_eq!(of(&all, "burst", "hello ×3", "firecracker")["answers_ms"], Value::Null);
}

#[test]
fn a_burst_that_the_host_has_no_room_for_is_refused_before_it_is_measured() {
    let dir = scratch();
    let out = dir.path().join("results");
    let tvmm = tvmm().get_program().to_owned();
    let limited =
        format!("ulimit -n 300; exec {} bench burst --counts 1,100 --out {}", text(tvmm.as_ref()), text(&out));
    let output = finish(std::process::Command::new("sh").args(["-c", &limited]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Cannot ask 100 VMs at once: they need 900 open files") && said.contains("300"), "{said}");
    assert!(!out.exists());
    // A guest with 512 MiB of its own, 1,024 times.
    let args = ["burst", "--functions", "mmap", "--counts", "1,1024", "--flows", "standby", "--out", text(&out)];
    let output = bench_without_a_trace(dir.path(), &[&args[..], &["--runtime", "0"]].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Cannot have 1024 VMs of mmap by standby at once: each needs"), "{said}");
    assert!(samples(&out).is_empty(), "no burst was measured");
    assert!(!out.join("stage").exists());
}

#[test]
fn bursts_that_cannot_be_measured_are_refused_at_once() {
    let dir = scratch();
    let out = dir.path().join("results");
    let refused = |flows: &str, more: &[&str]| run_err(&[&["bench"], &burst(&out, flows, more)[..]].concat());
    for flow in ["warm", "forked", "repurposed"] {
        assert!(refused(flow, &[]).contains(&format!("Cannot ask VMs of {flow} at once")), "{flow}");
    }
    let vmm = tvmm().get_program().to_owned();
    let with_vmm = ["--firecracker", vmm.to_str().unwrap()];
    assert!(refused("firecracker-uffd-ext", &with_vmm).contains("Cannot ask VMs of firecracker-uffd-ext at once"));
    assert!(refused("firecracker", &[]).contains("--firecracker"));
    assert!(refused("standby-pool", &[]).contains("--pool"));
    assert!(refused("waterfall", &[]).contains("no flow \"waterfall\""));
    assert!(refused("standby", &["--functions", "goodbye"]).contains("no function \"goodbye\""));
    assert!(run_err(&["bench", "run", "burst", "--out", text(&out)]).contains("no experiment \"burst\""));
    for counts in ["0", "5000", "many"] {
        let output = run(&["bench", "burst", "--counts", counts, "--out", text(&out)]);
        assert_eq!(output.status.code(), Some(2), "{counts}");
    }
    assert!(!out.exists());
}
