//! Encrypted snapshots: without the key no byte of the guest can be read, and none can be put in its place.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use tvmm::backends::cold;
use tvmm::snapshot::{Chain, Cold, ColdSpec, Location, SecretKey};
use tvmm::tiering::cold::ColdReader;

use crate::snapshots::golden::{expand_all, golden};
use crate::support::pool::filled;
use crate::support::{TIMEOUT, Vm, config, run, run_err, run_ok, scratch, text};

/// A key in a file.
fn key(dir: &Path, name: &str, digits: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, format!("{}\n", digits.repeat(32))).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

/// An encrypted snapshot, without the original.
struct Encrypted {
    dir: tempfile::TempDir,
    digest: String,
    key: PathBuf,
}

impl Encrypted {
    fn new(pages: u64) -> Encrypted {
        let dir = scratch();
        let plain = dir.path().join("plain");
        let digest = filled(&plain, pages, 1);
        let key = key(dir.path(), "key", "a1");
        let encrypted = Encrypted { dir, digest, key };
        encrypted.encrypt(&plain, "encrypted");
        fs::remove_dir_all(&plain).unwrap();
        encrypted
    }

    fn encrypt(&self, plain: &Path, name: &str) -> PathBuf {
        let out = self.dir.path().join(name);
        run_ok(&["snapshot", "encrypt", text(plain), "--key", text(&self.key), "--out", text(&out)]);
        out
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("encrypted")
    }

    fn restore<'a>(&'a self, snapshot: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
        let args = ["restore", "--snapshot", text(snapshot), "--decrypt-key", text(&self.key), "--run", "check"];
        [&args[..], more].concat()
    }
}

fn copied(from: &Path, to: &Path) {
    assert!(Command::new("cp").args(["-r", text(from), text(to)]).status().unwrap().success());
}

/// The two files of the object in the snapshot's cold pool: index and data.
fn object(snapshot: &Path) -> [PathBuf; 2] {
    let objects = snapshot.join("cold/objects");
    let names = fs::read_dir(objects).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    ["index", "chunks"].map(|end| names.iter().find(|path| path.extension().unwrap() == end).unwrap().clone())
}

#[test]
fn every_policy_restores_an_encrypted_snapshot_and_its_pages_are_nowhere_in_clear() {
    let encrypted = Encrypted::new(3000);
    let path = encrypted.path();
    assert!(!path.join("memory").exists());
    for policy in ["eager", "firecracker", "firecracker-uffd", "catalyzer", "trenv"] {
        let answer = run_ok(&encrypted.restore(&path, &["--policy", policy]));
        assert_eq!(answer.split(' ').nth(2), Some(encrypted.digest.as_str()), "{policy}");
    }
    let command = format!("command:cat {}", text(&encrypted.key));
    let by_command = ["restore", "--snapshot", text(&path), "--decrypt-key", &command, "--run", "check"];
    assert_eq!(run_ok(&by_command).split(' ').nth(2), Some(encrypted.digest.as_str()));
    // A page server hands out chunks that it cannot read.
    let cold = path.join("cold");
    run_ok(&encrypted.restore(&path, &["--cold", text(&cold)]));
    assert!(run(&["pool", "fsck", text(&cold)]).status.success());
    // Containers begin with their magic, encrypted ones do not.
    for file in ["vmstate", "pages"] {
        let bytes = fs::read(path.join(file)).unwrap();
        assert!(bytes.starts_with(b"TVMMSEAL") && !bytes.windows(8).any(|window| window == b"TVMMSNAP"), "{file}");
    }
    let mut vm = Vm::wait_for_api();
    let load = json!({ "snapshot_path": path, "resume_vm": true, "tvmm": { "decrypt_key": encrypted.key } });
    vm.api_ok("PUT", "/snapshot/load", Some(load));
    assert_eq!(vm.call("check").digest, encrypted.digest);
    let line = fs::read(format!("/proc/{}/cmdline", vm.pid())).unwrap();
    assert!(!line.windows(64).any(|window| window == "a1".repeat(32).as_bytes()));
}

#[test]
fn a_key_that_is_missing_wrong_or_exposed_is_refused() {
    let encrypted = Encrypted::new(100);
    let path = encrypted.path();
    let said = run_err(&["restore", "--snapshot", text(&path), "--run", "hello"]);
    assert!(said.contains("is encrypted") && said.contains("--decrypt-key"), "{said}");
    let said = run_err(&["restore", "--snapshot", text(&path), "--cold", text(&path.join("cold")), "--run", "hello"]);
    assert!(said.contains("is encrypted"), "{said}");
    let other = key(encrypted.dir.path(), "other", "b2");
    let with = |key: &str| run_err(&["restore", "--snapshot", text(&path), "--decrypt-key", key, "--run", "hello"]);
    assert!(with(text(&other)).contains("was encrypted with another key"));
    assert!(with("/nonexistent/key").contains("/nonexistent/key"));
    let short = encrypted.dir.path().join("short");
    fs::write(&short, "a1a1").unwrap();
    fs::set_permissions(&short, fs::Permissions::from_mode(0o600)).unwrap();
    let said = with(text(&short));
    assert!(said.contains("64 lower-case hexadecimal digits") && !said.contains("a1a1"), "{said}");
    fs::set_permissions(&other, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(with(text(&other)).contains("chmod 600"));
    assert!(with("command:exit 7").contains("failed"));
    assert!(with("command:echo a1").contains("64 lower-case"));
    // In the place of an encrypted snapshot there is one in clear text.
    let plain = encrypted.dir.path().join("plain");
    filled(&plain, 100, 1);
    let said = run_err(&encrypted.restore(&plain, &[]));
    assert!(said.contains("is not encrypted"), "{said}");
    let pool = encrypted.dir.path().join("pool");
    run_ok(&["pool", "create", "--tier", "remote", "--at", text(&pool)]);
    run_ok(&["pool", "add", text(&pool), text(&plain)]);
    let same = encrypted.encrypt(&plain, "same");
    let said = run_err(&encrypted.restore(&same, &["--cold", text(&pool)]));
    assert!(said.contains("is not encrypted"), "{said}");
    for more in [["--pool", "numa:0"], ["--mem-file", "/nonexistent"]] {
        let output = run(&encrypted.restore(&path, &more));
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
}

#[test]
fn changed_cut_and_swapped_bytes_are_refused() {
    let encrypted = Encrypted::new(2000);
    let refused = |what: &str, change: &dyn Fn(&Path)| {
        let broken = encrypted.dir.path().join("broken");
        copied(&encrypted.path(), &broken);
        change(&broken);
        let said = run_err(&encrypted.restore(&broken, &["--policy", "eager", "--fault-timeout", "5"]));
        assert!(said.contains(what), "{what}: {said}");
        fs::remove_dir_all(&broken).unwrap();
    };
    let flip = |path: PathBuf, at: u64| {
        let file = fs::File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };
    for name in ["vmstate", "pages"] {
        refused("Cannot decrypt", &|broken| flip(broken.join(name), 100));
        refused("is truncated", &|broken| fs::write(broken.join(name), b"TVMMSEAL").unwrap());
    }
    refused("Cannot decrypt", &|broken| fs::copy(broken.join("pages"), broken.join("vmstate")).map(drop).unwrap());
    refused("chunk 0", &|broken| flip(object(broken)[1].clone(), 10));
    refused("its data", &|broken| {
        let file = fs::File::options().write(true).open(&object(broken)[1]).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    });
}

/// An index that was forged with all its checksums, by a writer without the key.
#[test]
fn chunks_in_other_places_are_refused_though_their_checksums_are_good() {
    use tvmm::snapshot::{Container, Section, SectionKind, write_container};
    let encrypted = Encrypted::new(2000);
    let [index, _] = object(&encrypted.path());
    let container = Container::read(&index, 1 << 20).unwrap();
    let sections = || {
        [96, 97, 98].map(|number| {
            let kind = SectionKind::Other(number);
            let payload = container.section(kind, 0).unwrap().to_vec();
            Section { kind, instance: 0, version: 1, payload }
        })
    };
    let forged = |change: &dyn Fn(&mut Vec<Section>)| {
        let mut sections = Vec::from(sections());
        change(&mut sections);
        fs::write(&index, write_container(&sections)).unwrap();
        run_err(&encrypted.restore(&encrypted.path(), &["--policy", "eager"]))
    };
    // Entries of 17 bytes: window, stored length, CRC, method, mask of 32 pages.
    let swap_windows = |sections: &mut Vec<Section>| {
        let table = &mut sections[1].payload;
        let full: Vec<usize> = (0..table.len() / 17).filter(|at| table[at * 17 + 13..][..4] == [255; 4]).collect();
        let [a, b] = [full[0] * 17, full[1] * 17];
        (0..4).for_each(|byte| table.swap(a + byte, b + byte));
    };
    let said = forged(&swap_windows);
    assert!(said.contains("Cannot decrypt") && said.contains("index"), "{said}");
    let said = forged(&|sections| drop(sections.pop()));
    assert!(said.contains("is malformed") || said.contains("stores") || said.contains("is not encrypted"), "{said}");
    let said = forged(&|sections| sections[2].payload.truncate(63));
    assert!(said.contains("its encryption has 63 bytes"), "{said}");
}

#[test]
fn what_cannot_be_encrypted_whole_is_refused() {
    let dir = scratch();
    let key = key(dir.path(), "key", "a1");
    let [base, tip, out] = ["base", "tip", "out"].map(|name| dir.path().join(name));
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=50 seed=1");
    vm.snapshot(&base, &[]);
    vm.call("fill pages=50 seed=2");
    vm.snapshot(&tip, &["--diff"]);
    let encrypt = |snapshot: &Path| {
        let said = run_err(&["snapshot", "encrypt", text(snapshot), "--key", text(&key), "--out", text(&out)]);
        assert!(!out.exists() && fs::read_dir(dir.path()).unwrap().count() == 3, "{said}");
        said
    };
    assert!(encrypt(&tip).contains("it is a diff"));
    assert!(encrypt(dir.path()).contains("is not sealed"));
    run_ok(&["snapshot", "encrypt", text(&base), "--key", text(&key), "--out", text(&out)]);
    let again = run_err(&["snapshot", "encrypt", text(&base), "--key", text(&key), "--out", text(&out)]);
    assert!(again.contains("already exists"), "{again}");
}

/// The first version of the format, with `a1` 32 times as its key, on every host.
#[test]
fn golden_encrypted_snapshot_has_the_state_and_the_memory_of_the_original() {
    let dir = scratch();
    expand_all("v1", dir.path());
    let path = golden().join("encrypted1");
    let key: SecretKey = "a1".repeat(32).parse().unwrap();
    let plain = Chain::open(&Location::Dir(dir.path().join("full"))).unwrap();
    let chain = Chain::open_elsewhere(&Location::Dir(path.clone()), Some(&key)).unwrap();
    assert_eq!(chain.tip().id(), plain.tip().id());
    assert_eq!(chain.tip().copy_state().unwrap(), plain.tip().copy_state().unwrap());
    assert_eq!(chain.resolve().unwrap(), plain.resolve().unwrap());
    let cold = Cold { pools: vec![ColdSpec::Dir(path.join("cold"))], cache: None, key: None };
    let pool = cold::open(&cold, &chain, TIMEOUT, Some(&key)).unwrap().unwrap();
    let expected = fs::read(dir.path().join("full/memory")).unwrap();
    let mut memory = vec![0; expected.len()];
    ColdReader::new(&pool, 0).read(0, &mut memory).unwrap();
    assert!(memory == expected, "the memory differs");
    let other: SecretKey = "b2".repeat(32).parse().unwrap();
    assert!(cold::open(&cold, &chain, TIMEOUT, Some(&other)).is_err());
    assert!(cold::open(&cold, &chain, TIMEOUT, None).is_err());
}
