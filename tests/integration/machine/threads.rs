//! A limit of threads (`pids.max`): work is done by fewer threads, or refused with the reason; nothing panics or spins.

use std::os::unix::process::CommandExt;
use std::process::Output;

use crate::skip::skip;
use crate::support::cgroup::ControlGroup;
use crate::support::{Vm, config, finish, run_ok, scratch, text, tvmm};

/// A control group that bounds the threads of what runs in it.
struct Bounded(ControlGroup);

impl Bounded {
    /// `None`, with the reason printed, where this user may not make one.
    fn new() -> Option<Bounded> {
        let group = ControlGroup::new("pids", "pids.max", "pids.max");
        if group.is_none() {
            skip!("cgroup", "no control group can be made that bounds threads");
        }
        group.map(Bounded)
    }

    /// Runs `tvmm` with at most `threads` threads.
    fn run(&self, threads: u32, args: &[&str]) -> Output {
        self.0.set_limit(u64::from(threads));
        let procs = std::ffi::CString::new(text(&self.0.procs())).unwrap();
        let mut command = tvmm();
        // SAFETY: between fork and exec only system calls are made, on memory made before.
        unsafe {
            command.pre_exec(move || {
                let procs = rustix::fs::open(&procs, rustix::fs::OFlags::WRONLY, rustix::fs::Mode::empty())?;
                rustix::io::write(&procs, b"0")?;
                Ok(())
            });
        }
        finish(command.args(args))
    }
}

#[test]
fn restores_with_few_threads_answer_or_say_what_is_missing() {
    let Some(group) = Bounded::new() else { return };
    let dir = scratch();
    let full = dir.path().join("full");
    let cold = dir.path().join("cold");
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=8000 seed=4");
    vm.snapshot(&full, &[]);
    run_ok(&["pool", "create", "--tier", "file", "--at", text(&cold)]);
    run_ok(&["pool", "add", text(&cold), text(&full)]);
    let near = ["restore", "--snapshot", text(&full), "--run", "hello"];
    let far = [&near[..], &["--cold", text(&cold)]].concat();
    let cases = [
        ("eager", &near[..], "eager"),
        ("file", &near, "firecracker"),
        ("lazy", &near, "firecracker-uffd"),
        ("far", &far, "eager"),
    ];
    for (name, args, policy) in cases {
        let args = [args, &["--policy", policy][..]].concat();
        for threads in [1, 2, 3, 4, 5, 6, 64] {
            let output = group.run(threads, &args);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let answered = String::from_utf8_lossy(&output.stdout).contains("ok run-");
            match output.status.code() {
                Some(0) => assert!(answered, "{name}, {threads}: {said}"),
                Some(1) => {
                    let last = said.lines().last().unwrap_or_default();
                    let names_it = ["thread", "limit of processes", "Resource temporarily unavailable"];
                    assert!(names_it.iter().any(|part| last.contains(part)), "{name}, {threads}: {said}");
                    assert!(threads < 64, "{name}: {said}");
                }
                _ => panic!("{name}, {threads}: {:?} {said}", output.status),
            }
            assert!(!said.contains("panicked"), "{name}, {threads}: {said}");
        }
    }
}

#[test]
fn memory_is_loaded_by_fewer_threads_where_there_may_be_no_more() {
    let Some(group) = Bounded::new() else { return };
    if std::thread::available_parallelism().map_or(1, std::num::NonZero::get) < 2 {
        skip!("cpus", "one CPU loads memory by one thread anyway");
        return;
    }
    let dir = scratch();
    let full = dir.path().join("full");
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=8000 seed=4");
    vm.snapshot(&full, &[]);
    // The main thread and the one that watches for stalls.
    let output = group.run(2, &["restore", "--snapshot", text(&full), "--policy", "eager", "--run", "hello"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("Fewer threads than wanted can be started"), "{said}");
    assert!(said.contains("threads=1"), "{said}");
}
