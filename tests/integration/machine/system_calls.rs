//! Seccomp: each thread of a VM's process has a filter, and a call that it does not allow ends the process.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::service::Service;
use crate::support::{Vm, config, http, run, run_err, scratch, text};

/// The name of each thread of a process, with its mode of seccomp and its number of filters.
fn threads(pid: u32) -> Vec<(String, u32, u32)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process is there");
    let of_task = |task: PathBuf| {
        let status = std::fs::read_to_string(task.join("status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let number = |name: &str| field(name).and_then(|text| text.parse().ok());
        Some((field("Name:")?.to_owned(), number("Seccomp:")?, number("Seccomp_filters:")?))
    };
    tasks.filter_map(|task| of_task(task.expect("a task").path())).collect()
}

/// Returns the names of the threads, all of which must have filters, those of `narrow` one of their own.
fn all_filtered(pid: u32, narrow: &[&str]) -> Vec<String> {
    let threads = threads(pid);
    let main = threads.iter().map(|(_, _, filters)| *filters).min().expect("a thread");
    for (name, mode, filters) in &threads {
        assert_eq!(*mode, 2, "{name}: {threads:?}");
        let is_narrow = narrow.iter().any(|narrow| name.starts_with(narrow));
        assert!(!is_narrow || *filters > main, "{name} has no filter of its own: {threads:?}");
    }
    for name in narrow {
        assert!(threads.iter().any(|(thread, _, _)| thread.starts_with(name)), "{name} is missing: {threads:?}");
    }
    threads.into_iter().map(|(name, _, _)| name).collect()
}

const NARROW: [&str; 2] = ["api", "vcpu"];

#[test]
fn every_thread_of_booted_restored_and_forked_vms_has_a_filter() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let vm = Vm::boot_with(&config(2, 32), &["--seccomp"]);
    all_filtered(vm.pid(), &NARROW);
    vm.snapshot(&snapshot, &[]);
    let mut restored = Vm::restore_with(&snapshot, "firecracker-uffd", &["--seccomp"]);
    restored.call("hello");
    all_filtered(restored.pid(), &["api", "vcpu0", "vcpu1", "faults"]);
    // The children of children too: what they inherit is not added once more.
    let mut socket = restored.socket().to_owned();
    let mut children = Vec::new();
    for name in ["child", "grandchild"] {
        let out = dir.path().join(format!("{name}.sock"));
        let (status, answer) = http(&socket, "PUT", "/tvmm/fork", &json!({ "count": 1, "out_sock": out }).to_string());
        assert_eq!(status, 200, "{answer}");
        let pid = answer["children"][0]["pid"].as_u64().expect("a process") as u32;
        all_filtered(pid, &NARROW);
        children.push((pid, threads(pid).iter().map(|(_, _, filters)| *filters).max()));
        socket = out;
    }
    assert_eq!(children[0].1, children[1].1);
    for (pid, _) in children {
        crate::support::signal(pid, rustix::process::Signal::TERM);
    }
}

#[test]
fn vms_of_the_service_have_filters_if_it_is_told_so() {
    for (args, mode) in [(&["--seccomp"][..], 2), (&[], 0)] {
        let dir = scratch();
        let service = Service::start(dir.path(), args);
        service.put_touch();
        service.ok("POST", "/vms", Some(json!({ "func_name": "touch" })));
        // The VM's, and those of processes that are kept ready.
        let threads: Vec<_> = service.children().into_iter().flat_map(threads).collect();
        assert!(threads.iter().any(|(name, _, _)| name == "vcpu0"), "{threads:?}");
        assert!(threads.iter().all(|(_, each, _)| *each == mode), "{threads:?}");
    }
}

#[test]
fn last_word_on_filters_counts() {
    let cases = [(&["--seccomp", "--no-seccomp"][..], 0), (&["--no-seccomp", "--seccomp"], 2), (&["--no-seccomp"], 0)];
    for (args, expected) in cases {
        let vm = Vm::boot_with(&config(1, 32), args);
        let threads = threads(vm.pid());
        assert!(threads.iter().all(|(_, mode, _)| *mode == expected), "{args:?}: {threads:?}");
    }
}

/// The filters that tvmm is built with, without the rules of `call` for threads of `kind`.
fn filters_without(dir: &Path, kind: &str, call: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/seccomp/x86_64.json");
    let mut filters: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let rules = filters[kind]["filter"].as_array_mut().expect("rules");
    let before = rules.len();
    rules.retain(|rule| rule["syscall"] != call);
    assert!(rules.len() < before, "{kind} has no rule for {call}");
    let path = dir.join(format!("without-{call}.json"));
    std::fs::write(&path, filters.to_string()).unwrap();
    path
}

#[test]
fn call_without_a_rule_ends_the_process_with_its_name_an_exit_code_and_a_metric() {
    let dir = scratch();
    let cases = [("vcpu", "ioctl", "ioctl (16)", "vcpu0"), ("start", "eventfd2", "eventfd2 (290)", "tvmm")];
    for (kind, call, named, thread) in cases {
        let filters = filters_without(dir.path(), kind, call);
        let metrics = dir.path().join(format!("metrics-{kind}"));
        let mut config = config(1, 32);
        config["metrics"] = json!({ "metrics_path": metrics });
        let path = dir.path().join("vm.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let output = run(&["--config", text(&path), "--run", "hello", "--seccomp-filter", text(&filters)]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(148), "{said}");
        let expected = format!("tvmm: Cannot make the system call {named} in thread {thread}: ");
        assert!(said.lines().last().is_some_and(|line| line.starts_with(&expected)), "{said}");
        if kind == "vcpu" {
            let written = std::fs::read_to_string(&metrics).unwrap();
            let line: Value = serde_json::from_str(written.lines().last().expect("a line")).unwrap();
            assert_eq!(line["seccomp"]["num_faults"], 1, "{written}");
            assert!(line["utc_timestamp_ms"].as_u64().is_some_and(|ms| ms > 1_700_000_000_000), "{written}");
        }
    }
}

#[test]
fn file_of_filters_is_in_force_and_passed_on() {
    let dir = scratch();
    // The main thread keeps its first filter, for there is an API.
    let filters = filters_without(dir.path(), "main", "epoll_wait");
    let vm = Vm::boot_with(&config(1, 32), &["--seccomp-filter", text(&filters)]);
    all_filtered(vm.pid(), &NARROW);
    let out = dir.path().join("child.sock");
    let child = vm.api_ok("PUT", "/tvmm/fork", Some(json!({ "count": 1, "out_sock": out })));
    let pid = child["children"][0]["pid"].as_u64().expect("a process") as u32;
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
    crate::support::signal(pid, rustix::process::Signal::TERM);
    assert!(arguments.contains(&format!("--seccomp-filter {} ", filters.display())), "{arguments}");
}

#[test]
fn file_that_is_no_file_of_filters_is_refused() {
    let dir = scratch();
    let path = dir.path().join("filters.json");
    let filter = json!({ "default_action": "trap", "filter_action": "allow", "filter": [{ "syscall": "read" }] });
    let kinds = ["start", "main", "api", "vcpu", "devices", "faults", "loaders"];
    let all: Value =
        kinds.iter().map(|kind| ((*kind).to_owned(), filter.clone())).collect::<serde_json::Map<_, _>>().into();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut changed = all.clone();
        change(&mut changed);
        changed.to_string()
    };
    let cases = [
        (String::new(), "EOF while parsing"),
        ("[]".to_owned(), "invalid type"),
        (with(&|all| drop(all.as_object_mut().unwrap().remove("faults"))), "no filter of kind `faults`"),
        (with(&|all| all["vmm"] = filter.clone()), "`vmm` is unknown"),
        (with(&|all| all["api"]["filter"][0]["syscall"] = json!("fly")), "fly"),
        (with(&|all| all["api"]["default_action"] = json!("allow")), "are equal"),
        (with(&|all| all["api"]["colour"] = json!("red")), "colour"),
    ];
    for (content, expected) in cases {
        std::fs::write(&path, &content).unwrap();
        let said = run_err(&["--api-sock", text(&dir.path().join("s")), "--seccomp-filter", text(&path)]);
        let begin = format!("tvmm: Cannot use the seccomp filters {}: ", path.display());
        assert!(said.starts_with(&begin) && said.contains(expected), "{expected}: {said}");
    }
    let said = run_err(&["--api-sock", text(&dir.path().join("s")), "--seccomp-filter", "/nonexistent/filters"]);
    assert!(said.contains("Cannot read the seccomp filters /nonexistent/filters: No such file"), "{said}");
    let both = run(&["--api-sock", "/nonexistent/s", "--no-seccomp", "--seccomp-filter", text(&path)]);
    assert_eq!(both.status.code(), Some(2));
}
