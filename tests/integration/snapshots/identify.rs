//! Files of the wrong kind: the refusal says what the file is, and which command shows it.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::support::{Vm, config, run_err, run_ok, scratch, text};

/// A file of every kind that tvmm writes or that people have beside them.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn make() -> Files {
        let files = Files { dir: scratch() };
        let mut vm = Vm::boot(&config(1, 64));
        vm.call("fill pages=600 seed=1");
        vm.snapshot(&files.path("full"), &[]);
        vm.pause();
        let [state, memory] = ["state", "mem"].map(|name| files.path(name));
        vm.api_ok("PUT", "/snapshot/create", Some(json!({ "snapshot_path": state, "mem_file_path": memory })));
        drop(vm);
        let full = files.text("full");
        let recorded = ["--snapshot", &full, "--run", "touch pages=100 seed=1", "--out", &files.text("a.profile")];
        run_ok(&[&["profile", "record"][..], &recorded].concat());
        run_ok(&["plan", "--snapshot", &full, "--policy", "eager", "--out", &files.text("a.plan")]);
        let profiled = ["--policy", "reap", "--profile", &files.text("a.profile"), "--run", "hello"];
        run_ok(&[&["restore", "--snapshot", &full][..], &profiled].concat());
        let image = std::fs::read_dir(files.path("full/plan")).unwrap().map(|entry| entry.unwrap().path());
        let image = image.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "image"));
        std::fs::copy(image.expect("reap has made an image"), files.path("a.image")).unwrap();
        run_ok(&["pool", "create", "--tier", "cxl", "--at", &files.text("pool"), "--size", "0.1"]);
        run_ok(&["pool", "create", "--tier", "file", "--at", &files.text("cold")]);
        run_ok(&["pool", "add", &files.text("cold"), &full]);
        std::fs::write(files.path("firecracker"), [&0x0710_1984_8664_0000_u64.to_le_bytes()[..], &[1; 999]].concat())
            .unwrap();
        run_ok(&["guest", "--out", &files.text("elf")]);
        let mut kernel = vec![0; 4096];
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        std::fs::write(files.path("bzimage"), kernel).unwrap();
        std::fs::write(files.path("vm.json"), config(1, 64).to_string()).unwrap();
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        text(&self.path(name)).to_string()
    }

    fn cold_index(&self) -> String {
        let objects = std::fs::read_dir(self.path("cold/objects")).unwrap().map(|entry| entry.unwrap().path());
        text(&objects.into_iter().find(|path| path.extension().is_some_and(|ext| ext == "index")).unwrap()).to_string()
    }
}

#[test]
fn file_of_another_format_is_named_with_the_command_that_shows_it() {
    let files = Files::make();
    let kinds = [
        ("full", "a snapshot's directory", format!("`tvmm inspect {}`", files.text("full"))),
        ("full/memory", "a file of a snapshot", format!("`tvmm inspect {}`", files.text("full"))),
        ("full/manifest.json", "a file of a snapshot", format!("`tvmm inspect {}`", files.text("full"))),
        ("state", "the state file of a snapshot in two files", "--mem-file MEMORY` shows it".into()),
        ("mem", "a file without a header", format!("`tvmm inspect STATE --mem-file {}`", files.text("mem"))),
        ("a.profile", "a profile", format!("`tvmm profile show {}`", files.text("a.profile"))),
        ("a.plan", "a restore plan", "`tvmm restore --snapshot DIR --plan".into()),
        ("a.image", "a working-set image", "`tvmm inspect DIR`".into()),
        ("pool", "a pool", format!("`tvmm pool show {}`", files.text("pool"))),
        ("pool/pool.tvmm", "a file of a pool", format!("`tvmm pool show {}`", files.text("pool"))),
        ("cold", "a pool of compressed chunks", format!("`tvmm pool show {}`", files.text("cold"))),
        ("cold/cold-pool.json", "a file of a pool", format!("`tvmm pool show {}`", files.text("cold"))),
        ("firecracker", "Firecracker's state file", "Only Firecracker restores it".into()),
        ("elf", "an ELF file", "`tvmm --config FILE` boots it".into()),
        ("bzimage", "a Linux kernel image", "`tvmm --config FILE` boots it".into()),
        ("vm.json", "a JSON file", "`tvmm --config FILE` boots it".into()),
    ];
    let full = files.text("full");
    for (name, what, shown_by) in &kinds {
        let path = files.text(name);
        let commands: [(&str, Vec<&str>); 5] = [
            ("full", vec!["inspect", &path]),
            ("full", vec!["restore", "--snapshot", &path]),
            ("a.profile", vec!["profile", "show", &path]),
            ("a.plan", vec!["restore", "--snapshot", &full, "--plan", &path]),
            ("pool cold", vec!["pool", "show", &path]),
        ];
        for (right, command) in commands {
            if right.split(' ').any(|right| right == *name) {
                continue;
            }
            let said = run_err(&command);
            assert!(said.contains(&format!("Cannot take {path} for ")), "{command:?}: {said}");
            assert!(said.contains(&format!("it is {what}")) && said.contains(shown_by), "{command:?}: {said}");
        }
    }
    let index = files.cold_index();
    assert!(run_err(&["inspect", &index]).contains(&format!("`tvmm pool show {}`", files.text("cold"))));
    run_ok(&["inspect", &full]);
    run_ok(&["inspect", &files.text("state"), "--mem-file", &files.text("mem")]);
    run_ok(&["profile", "show", &files.text("a.profile")]);
    run_ok(&["pool", "show", &files.text("pool")]);
    run_ok(&["pool", "show", &files.text("cold")]);
}

#[test]
fn every_input_of_a_command_is_looked_at() {
    let files = Files::make();
    let [full, profile, plan, pool, state, memory] =
        ["full", "a.profile", "a.plan", "pool", "state", "mem"].map(|name| files.text(name));
    let out = files.text("out");
    for (command, wrong, role) in [
        (vec!["inspect", &memory, "--mem-file", &state], &memory, "the state file of a snapshot"),
        (vec!["inspect", &state, "--mem-file", &profile], &profile, "the memory file of a snapshot"),
        (vec!["snapshot", "merge", &full, &profile, "--out", &out], &profile, "a snapshot's directory"),
        (vec!["plan", "--snapshot", &profile, "--policy", "eager"], &profile, "a snapshot's directory"),
        (vec!["plan", "--snapshot", &full, "--policy", "reap", "--profile", &plan], &plan, "a profile"),
        (vec!["plan", "--snapshot", &full, "--policy", "trenv", "--pool", &full], &full, "a pool"),
        (vec!["restore", "--snapshot", &full, "--policy", "reap", "--profile", &full], &full, "a profile"),
        (vec!["restore", "--snapshot", &full, "--cold", &profile], &profile, "a pool"),
        (vec!["profile", "record", "--snapshot", &plan, "--run", "hello", "--out", &out], &plan, "a snapshot's"),
        (vec!["profile", "merge", &profile, &plan, "--out", &out], &plan, "a profile"),
        (vec!["profile", "show", &profile, "--snapshot", &pool], &pool, "a snapshot's directory"),
        (vec!["pool", "add", &full, &full], &full, "a pool"),
        (vec!["pool", "add", &pool, &profile], &profile, "a snapshot's directory"),
        (vec!["pool", "add", &pool, &full, "--profile", &plan], &plan, "a profile"),
        (vec!["pool", "gc", &profile], &profile, "a pool"),
        (vec!["pool", "fsck", &full], &full, "a pool"),
        (vec!["serve-pages", "--dir", &full, "--listen", "tcp:127.0.0.1:0"], &full, "a pool"),
        (vec!["--config", &profile], &profile, "a machine's configuration"),
    ] {
        let said = run_err(&command);
        assert!(said.contains(&format!("Cannot take {wrong} for {role}")), "{command:?}: {said}");
    }
    assert!(!Path::new(&out).exists());
}

#[test]
fn damage_is_not_taken_for_another_format() {
    let files = Files::make();
    for name in ["state", "a.profile", "a.plan"] {
        let path = files.path(name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[40] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let [full, profile, plan, state, memory] =
        ["full", "a.profile", "a.plan", "state", "mem"].map(|name| files.text(name));
    for command in [
        vec!["inspect", &state, "--mem-file", &memory],
        vec!["profile", "show", &profile],
        vec!["restore", "--snapshot", &full, "--plan", &plan],
    ] {
        let said = run_err(&command);
        assert!(said.contains("is damaged"), "{command:?}: {said}");
    }
}
