//! Signed snapshots: a restore for trusted keys takes nothing that the owner of one of them has not signed.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::snapshots::golden::{expand_all, golden};
use crate::support::artefact::names_below;
use crate::support::pool::filled;
use crate::support::service::Service;
use crate::support::skip::skip;
use crate::support::{Vm, config, finish, run, run_err, run_ok, scratch, text, tvmm};

const CHUNK: u64 = 64 << 10;

/// A pair of keys, `NAME.key` and `NAME.pub`.
struct Keys {
    secret: PathBuf,
    public: PathBuf,
}

impl Keys {
    fn make(dir: &Path, name: &str) -> Keys {
        let [secret, public] = ["key", "pub"].map(|end| dir.join(format!("{name}.{end}")));
        run_ok(&["snapshot", "keygen", "--key", text(&secret), "--pub", text(&public)]);
        Keys { secret, public }
    }

    fn sign(&self, snapshot: &Path) {
        run_ok(&["snapshot", "sign", text(snapshot), "--key", text(&self.secret)]);
    }

    /// The arguments of a restore that trusts this key.
    fn restore<'a>(&'a self, snapshot: &'a Path, run: &'a str) -> [&'a str; 7] {
        ["restore", "--snapshot", text(snapshot), "--trust", text(&self.public), "--run", run]
    }
}

fn copied(from: &Path, to: &Path) {
    assert!(Command::new("cp").args(["-r", text(from), text(to)]).status().unwrap().success());
}

/// True if this host has the stock tool.
fn has_minisign() -> bool {
    Command::new("minisign").arg("-v").output().is_ok_and(|output| output.status.success())
}

#[test]
fn a_signed_snapshot_is_restored_by_every_policy_and_its_copies_are_as_good() {
    let dir = scratch();
    let keys = Keys::make(dir.path(), "owner");
    assert_eq!(fs::metadata(&keys.secret).unwrap().permissions().mode() & 0o777, 0o600);
    let other = Keys::make(dir.path(), "other");
    let full = dir.path().join("full");
    let digest = filled(&full, 2000, 1);
    keys.sign(&full);
    let copy = dir.path().join("copy");
    copied(&full, &copy);
    for policy in ["firecracker", "firecracker-uffd", "trenv", "catalyzer", "eager"] {
        let answer = run_ok(&[&keys.restore(&copy, "check")[..], &["--policy", policy]].concat());
        assert_eq!(answer.split(' ').nth(2), Some(digest.as_str()), "{policy}");
    }
    // One of several keys suffices, in any order.
    let both = ["--trust", text(&other.public)];
    run_ok(&[&keys.restore(&full, "hello")[..], &both].concat());
    run_ok(&[&other.restore(&full, "hello")[..], &["--trust", text(&keys.public)]].concat());
    let said = run_err(&other.restore(&full, "hello"));
    assert!(said.contains("none of the trusted keys made it"), "{said}");
    let shown = run_ok(&["inspect", text(&full), "--trust", text(&keys.public)]);
    assert!(shown.contains("signature  good"), "{shown}");
    // A pair of keys is never overwritten.
    let new = dir.path().join("new");
    let again = ["snapshot", "keygen", "--key", text(&keys.secret), "--pub", text(&new)];
    assert!(run_err(&again).contains(text(&keys.secret)));
    let again = ["snapshot", "keygen", "--key", text(&new), "--pub", text(&keys.public)];
    assert!(run_err(&again).contains(text(&keys.public)) && !new.exists());
}

#[test]
fn the_stock_tool_checks_what_tvmm_signs_and_tvmm_what_it_signs() {
    if !has_minisign() {
        return skip!("minisign", "there is no command minisign (Debian: package minisign)");
    }
    let dir = scratch();
    let keys = Keys::make(dir.path(), "owner");
    let full = dir.path().join("full");
    filled(&full, 100, 1);
    keys.sign(&full);
    let statement = full.join("signed.json");
    let stock = |args: &[&str]| finish(Command::new("minisign").args(args));
    let checked = stock(&["-V", "-m", text(&statement), "-p", text(&keys.public)]);
    assert!(checked.status.success(), "{checked:?}");
    // Without a key tvmm writes only the statement, for a key that is elsewhere.
    let [secret, public] = ["stock.key", "stock.pub"].map(|name| dir.path().join(name));
    let made = stock(&["-G", "-W", "-s", text(&secret), "-p", text(&public)]);
    assert!(made.status.success(), "{made:?}");
    fs::remove_file(full.join("signed.json.minisig")).unwrap();
    assert!(run_ok(&["snapshot", "sign", text(&full)]).contains(text(&statement)));
    let trusting = ["restore", "--snapshot", text(&full), "--trust", text(&public), "--run", "hello"];
    assert!(run_err(&trusting).contains("is not signed"));
    let signed = stock(&["-S", "-s", text(&secret), "-m", text(&statement)]);
    assert!(signed.status.success(), "{signed:?}");
    run_ok(&trusting);
    // A key of the stock tool signs here, too; one with a password does not.
    run_ok(&["snapshot", "sign", text(&full), "--key", text(&secret)]);
    run_ok(&trusting);
}

/// Changes a byte of the memory, and then a word of the same page so that the CRC32C of their chunk stays: in the
/// middle of what the guest has filled.
fn forge(memory: &Path) {
    let file = fs::File::options().read(true).write(true).open(memory).unwrap();
    let mut bytes = vec![0; CHUNK as usize];
    let is_full = |at: &u64| {
        file.read_exact_at(&mut bytes, *at).unwrap();
        bytes.chunks(4096).all(|page| page.iter().any(|byte| *byte != 0))
    };
    let full: Vec<u64> =
        (0..file.metadata().unwrap().len() / CHUNK).map(|chunk| chunk * CHUNK).filter(is_full).collect();
    let at = full[full.len() / 2];
    file.read_exact_at(&mut bytes, at).unwrap();
    let wanted = crc32c::crc32c(&bytes);
    bytes[100] ^= 1;
    // A CRC is linear: each bit of the word that is flipped changes it by the same value, whatever the others are.
    let now = crc32c::crc32c(&bytes);
    let flip = |bytes: &mut [u8], bit: usize| bytes[200 + bit / 8] ^= 1 << (bit % 8);
    let mut basis: Vec<(u32, u32)> = Vec::new();
    let reduce = |basis: &[(u32, u32)], (mut value, mut bits): (u32, u32)| {
        for (known, of) in basis {
            if value ^ known < value {
                value ^= known;
                bits ^= of;
            }
        }
        (value, bits)
    };
    for bit in 0..32 {
        flip(&mut bytes, bit);
        let reduced = reduce(&basis, (crc32c::crc32c(&bytes) ^ now, 1 << bit));
        flip(&mut bytes, bit);
        basis.push(reduced);
        basis.sort_unstable_by(|a, b| b.cmp(a));
    }
    let (rest, bits) = reduce(&basis, (wanted ^ now, 0));
    assert_eq!(rest, 0, "the changes of 32 bits span all checksums");
    (0..32).filter(|bit| bits >> bit & 1 == 1).for_each(|bit| flip(&mut bytes, bit));
    assert_eq!(crc32c::crc32c(&bytes), wanted);
    file.write_all_at(&bytes, at).unwrap();
}

#[test]
fn memory_forged_to_its_checksums_runs_unless_a_signature_is_demanded() {
    let dir = scratch();
    let keys = Keys::make(dir.path(), "owner");
    let full = dir.path().join("full");
    filled(&full, 10_000, 1);
    keys.sign(&full);
    forge(&full.join("memory"));
    let args = ["restore", "--snapshot", text(&full), "--verify", "full", "--run", "hello"];
    assert!(run(&args).status.success(), "checksums are no signature");
    let said = run_err(&keys.restore(&full, "hello"));
    assert!(said.contains("its memory is not what was signed") && said.contains(text(&full)), "{said}");
    let said = run_err(&["inspect", text(&full), "--trust", text(&keys.public)]);
    assert!(said.contains("its memory is not what was signed"), "{said}");
}

#[test]
fn any_change_is_refused_before_the_changed_file_is_parsed() {
    let dir = scratch();
    let keys = Keys::make(dir.path(), "owner");
    let full = dir.path().join("full");
    filled(&full, 500, 1);
    keys.sign(&full);
    let refused = |what: &str, change: &dyn Fn(&Path)| {
        let broken = dir.path().join("broken");
        copied(&full, &broken);
        change(&broken);
        let said = run_err(&keys.restore(&broken, "hello"));
        assert!(said.starts_with("tvmm: Cannot trust") && said.contains(what), "{what}: {said}");
        fs::remove_dir_all(&broken).unwrap();
    };
    for name in ["manifest.json", "vmstate", "pages"] {
        let not_signed = format!("its {name} is not what was signed");
        // Neither as JSON nor as a container is any of these read.
        refused(&not_signed, &|broken| fs::write(broken.join(name), "garbage").unwrap());
        refused(&not_signed, &|broken| {
            let file = fs::File::options().append(true).open(broken.join(name)).unwrap();
            file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        });
        refused(&not_signed, &|broken| {
            let mut bytes = fs::read(broken.join(name)).unwrap();
            bytes.push(b' ');
            fs::write(broken.join(name), bytes).unwrap();
        });
    }
    // A page that is not held is zero, signed or not.
    let stray = |broken: &Path| {
        let file = fs::File::options().read(true).write(true).open(broken.join("memory")).unwrap();
        let end = file.metadata().unwrap().len();
        file.write_all_at(b"x", end - 4096 * 40).unwrap();
    };
    let broken = dir.path().join("stray");
    copied(&full, &broken);
    stray(&broken);
    let said = run_err(&keys.restore(&broken, "hello"));
    assert!(said.contains("guest-physical 0x") || said.contains("memory is not what was signed"), "{said}");

    refused("is not signed", &|broken| fs::remove_file(broken.join("signed.json")).unwrap());
    refused("is not signed", &|broken| fs::remove_file(broken.join("signed.json.minisig")).unwrap());
    refused("is refused", &|broken| {
        let path = broken.join("signed.json");
        let text = fs::read_to_string(&path).unwrap().replace("\"format\": 1", "\"format\": 2");
        fs::write(path, text).unwrap();
    });
    let signature = fs::read_to_string(full.join("signed.json.minisig")).unwrap();
    let lines: Vec<&str> = signature.lines().collect();
    let short = [lines[0], lines[1], lines[2], "AAAA"].join("\n");
    let renamed = signature.replace("trusted comment: tvmm snapshot", "trusted comment: tvmm Snapshot");
    assert_ne!(renamed, signature);
    for bad in ["", "untrusted comment: x", &short, &renamed, &"\n".repeat(9), &signature.replace("RU", "RW")] {
        refused("is refused", &|broken| fs::write(broken.join("signed.json.minisig"), bad).unwrap());
    }
}

#[test]
fn files_that_are_no_keys_and_no_signatures_are_refused() {
    let dir = scratch();
    let keys = Keys::make(dir.path(), "owner");
    let full = dir.path().join("full");
    filled(&full, 100, 1);
    keys.sign(&full);
    let trusting =
        |key: &Path| run_err(&["restore", "--snapshot", text(&full), "--trust", text(key), "--run", "hello"]);
    assert!(trusting(&keys.secret).contains("is no public key of minisign's"));
    assert!(trusting(&full.join("manifest.json")).contains("is no public key of minisign's"));
    assert!(trusting(&dir.path().join("none")).contains("Cannot open"));
    assert!(trusting(Path::new("/dev/zero")).contains("is not a regular file"));
    let said = run_err(&["snapshot", "sign", text(&full), "--key", text(&keys.public)]);
    assert!(said.contains("is no secret key without a password"), "{said}");
    let signature = full.join("signed.json.minisig");
    fs::File::options().write(true).open(&signature).unwrap().set_len(1 << 40).unwrap();
    assert!(trusting(&keys.public).contains("more than the limit"));
    fs::remove_file(&signature).unwrap();
    assert!(Command::new("mkfifo").arg(&signature).status().unwrap().success());
    assert!(trusting(&keys.public).contains("is not a regular file"));
    fs::remove_file(&signature).unwrap();
    // A damaged snapshot is not signed.
    let memory = fs::File::options().read(true).write(true).open(full.join("memory")).unwrap();
    let mut bytes = vec![0; 4096];
    let page = (0..).find(|page| {
        memory.read_exact_at(&mut bytes, page * 4096).unwrap();
        bytes.iter().any(|byte| *byte != 0)
    });
    memory.write_all_at(&[bytes[0] ^ 1], page.unwrap() * 4096).unwrap();
    let said = run_err(&["snapshot", "sign", text(&full), "--key", text(&keys.secret)]);
    assert!(said.contains("guest-physical 0x") && !signature.exists(), "{said}");
}

#[test]
fn every_layer_of_a_chain_needs_a_signature() {
    let dir = scratch();
    let keys = Keys::make(dir.path(), "owner");
    let [base, tip, merged] = ["base", "tip", "merged"].map(|name| dir.path().join(name));
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=500 seed=1");
    vm.snapshot(&base, &[]);
    vm.call("fill pages=50 seed=2");
    vm.snapshot(&tip, &["--diff"]);
    drop(vm);
    let told = run(&["snapshot", "sign", text(&tip), "--key", text(&keys.secret)]);
    assert!(told.status.success() && String::from_utf8_lossy(&told.stderr).contains("/base too"), "{told:?}");
    let said = run_err(&keys.restore(&tip, "hello"));
    assert!(said.contains("is not signed") && said.contains("/base"), "{said}");
    keys.sign(&base);
    run_ok(&keys.restore(&tip, "hello"));
    // The parent's memory counts.
    forge(&base.join("memory"));
    let said = run_err(&keys.restore(&tip, "hello"));
    assert!(said.contains("its memory is not what was signed") && said.contains("/base"), "{said}");
    // A merged snapshot is a new one.
    run_ok(&["snapshot", "merge", text(&tip), "--out", text(&merged)]);
    assert!(run_err(&keys.restore(&merged, "hello")).contains("is not signed"));
}

#[test]
fn the_two_file_form_is_signed_and_the_api_demands_it() {
    let dir = scratch();
    let keys = Keys::make(dir.path(), "owner");
    let [state, memory] = ["state", "memory"].map(|name| dir.path().join(name));
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=500 seed=3");
    vm.pause();
    vm.api_ok("PUT", "/snapshot/create", Some(json!({ "snapshot_path": state, "mem_file_path": memory })));
    drop(vm);
    let load = |tvmm| {
        let backend = json!({ "backend_type": "File", "backend_path": memory });
        Some(json!({ "snapshot_path": state, "mem_backend": backend, "resume_vm": true, "tvmm": tvmm }))
    };
    let trusting = json!({ "trusted_keys": [keys.public] });
    let said = Vm::wait_for_api().api_fault("PUT", "/snapshot/load", load(trusting.clone()));
    assert!(said.contains("is not signed") && said.contains("state.signed.json"), "{said}");
    let sign = ["snapshot", "sign", text(&state), "--mem-file", text(&memory), "--key", text(&keys.secret)];
    run_ok(&sign);
    let mut vm = Vm::wait_for_api();
    vm.api_ok("PUT", "/snapshot/load", load(trusting.clone()));
    vm.call("check");
    fs::write(&state, "garbage").unwrap();
    let said = Vm::wait_for_api().api_fault("PUT", "/snapshot/load", load(trusting));
    assert!(said.contains("its snapshot is not what was signed"), "{said}");
}

#[test]
fn copies_of_drives_are_signed_too() {
    let dir = scratch();
    let keys = Keys::make(dir.path(), "owner");
    let [image, copied, drives] = ["image", "copied", "drives"].map(|name| dir.path().join(name));
    fs::write(&image, vec![7; 3 << 20]).unwrap();
    fs::create_dir(&drives).unwrap();
    let mut with_drive = config(1, 64);
    with_drive["drives"] = json!([{ "drive_id": "disk", "path_on_host": image, "is_root_device": false,
        "is_read_only": false }]);
    let mut vm = Vm::boot(&with_drive);
    vm.call("blk op=write sectors=64 seed=1 chunk=64");
    vm.snapshot(&copied, &["--copy-drives"]);
    drop(vm);
    keys.sign(&copied);
    let args = [&keys.restore(&copied, "blk op=check sectors=64 seed=1 chunk=64")[..], &["--drive-dir", text(&drives)]];
    assert!(run_ok(&args.concat()).contains("bad=0"));
    let copy = fs::File::options().write(true).open(copied.join("drive-disk")).unwrap();
    copy.write_all_at(b"x", 2 << 20).unwrap();
    let said = run_err(&args.concat());
    assert!(said.contains("its drive-disk is not what was signed"), "{said}");
}

#[test]
fn memory_that_no_signature_binds_cannot_be_trusted() {
    let dir = scratch();
    let keys = Keys::make(dir.path(), "owner");
    let full = dir.path().join("full");
    for more in [["--pool", "numa:0"], ["--cold", "/nonexistent"]] {
        let output = run(&[&keys.restore(&full, "hello")[..], &more].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && said.contains("A signature binds"), "{said}");
    }
    let backend = json!({ "backend_type": "Uffd", "backend_path": dir.path().join("none.sock") });
    let load = json!({ "snapshot_path": full, "mem_backend": backend, "tvmm": { "trusted_keys": [keys.public] } });
    let said = Vm::wait_for_api().api_fault("PUT", "/snapshot/load", Some(load));
    assert!(said.contains("A signature binds"), "{said}");
}

#[test]
fn plans_and_images_beside_a_signed_snapshot_are_not_used() {
    let dir = scratch();
    let keys = Keys::make(dir.path(), "owner");
    let [full, profile, plans] = ["full", "p.profile", "plans"].map(|name| dir.path().join(name));
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=700 seed=5");
    vm.snapshot(&full, &[]);
    drop(vm);
    let touch = "touch pages=600 write=40 seed=5";
    run_ok(&["profile", "record", "--snapshot", text(&full), "--run", touch, "--out", text(&profile)]);
    let by_profile = ["--policy", "reap", "--profile", text(&profile)];
    run_ok(&[&["restore", "--snapshot", text(&full), "--run", touch][..], &by_profile].concat());
    let folder = full.join("plan");
    let made: Vec<String> = names_below(&folder).into_iter().filter(|path| Path::new(path).is_file()).collect();
    assert!(made.iter().any(|name| name.ends_with(".plan")), "{made:?}");
    // Whatever is there now, a restore for trusted keys does not look at it.
    for path in &made {
        fs::write(path, "garbage").unwrap();
    }
    keys.sign(&full);
    let place = ["--plan-dir", text(&plans)];
    run_ok(&[&keys.restore(&full, touch)[..], &by_profile, &place].concat());
    let kept = names_below(&plans);
    assert!(kept.iter().any(|name| name.ends_with(".plan")), "{kept:?}");
    // Without --plan-dir they go to the user's cache directory.
    let home = dir.path().join("home");
    let mut command = tvmm();
    command.args(keys.restore(&full, touch)).args(by_profile).env("XDG_CACHE_HOME", &home);
    assert!(finish(&mut command).status.success());
    assert!(names_below(&home).iter().any(|name| name.ends_with(".plan")));
    assert!(made.iter().all(|path| fs::read(path).unwrap() == b"garbage"));
}

#[test]
fn a_service_for_trusted_keys_restores_only_what_they_have_signed() {
    let dir = scratch();
    let keys = Keys::make(dir.path(), "owner");
    let state = dir.path().join("state");
    let service = Service::start(&state, &["--trust", text(&keys.public)]);
    service.snapshot_touch("base");
    let touch = |tvmm| json!({ "func_name": "touch", "ssId": "base", "params": "pages=64 write=10", "tvmm": tvmm });
    let said = service.refused(422, "POST", "/invocations", Some(touch(json!({}))));
    assert!(said.contains("is not signed"), "{said}");
    // Clients can neither name other keys nor do without.
    for tvmm in [json!({ "trusted_keys": [] }), json!({ "trusted_keys": [keys.public] })] {
        let said = service.refused(400, "POST", "/invocations", Some(touch(tvmm)));
        assert!(said.contains("unknown field `trusted_keys`"), "{said}");
    }
    let said = service.refused(400, "POST", "/invocations", Some(touch(json!({ "pools": [state.join("pool")] }))));
    assert!(said.contains("A signature binds"), "{said}");
    keys.sign(&state.join("snapshots/base"));
    service.invoke(touch(json!({})));
    // A copy takes the signature along.
    service.ok("PUT", "/snapshots?from_snapshot=base&ssId=copy", None);
    let mut copy = touch(json!({}));
    copy["ssId"] = json!("copy");
    service.invoke(copy);
    let output = run(&["serve", "--dir", text(&state), "--listen-unix", "/nonexistent/s", "--trust", "/nonexistent/k"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent/k"), "{output:?}");
}

/// The signatures that the first version of the format has made, by the key beside them.
#[test]
fn golden_signatures_are_good() {
    let dir = scratch();
    expand_all("v1", dir.path());
    let from = golden().join("signed1");
    for name in ["full", "diff"] {
        for file in ["signed.json", "signed.json.minisig"] {
            fs::copy(from.join(name).join(file), dir.path().join(name).join(file)).unwrap();
        }
    }
    let diff = dir.path().join("diff");
    let key = from.join("key.pub");
    let shown = run_ok(&["inspect", text(&diff), "--trust", text(&key)]);
    assert!(shown.contains("signature  good"), "{shown}");
    // The same statements are made today.
    for name in ["full", "diff"] {
        let statement = dir.path().join(name).join("signed.json");
        let golden = fs::read(&statement).unwrap();
        run_ok(&["snapshot", "sign", text(&dir.path().join(name))]);
        assert_eq!(fs::read(&statement).unwrap(), golden, "{name}");
    }
}
