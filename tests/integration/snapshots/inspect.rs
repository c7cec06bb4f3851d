//! `tvmm inspect` finds damage wherever it is: in any layer of a chain, in holes of memory files, in files derived from
//! the snapshot. No restore shows the damage.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tvmm::snapshot::{Gfn, Location, PAGE_SIZE, Snapshot};

use crate::support::{Random, Vm, config, rounds, run, run_err, run_ok, scratch, text};

/// A chain `base`, `middle`, `tip`, the digest of its memory, and a profile beside the tip.
struct Victim {
    dir: tempfile::TempDir,
    digest: String,
}

const FUNCTION: &str = "touch pages=300 write=20 seed=5";

impl Victim {
    fn new() -> Victim {
        let dir = scratch();
        let mut vm = Vm::boot(&config(1, 32));
        vm.call("fill pages=400 seed=3");
        vm.snapshot(&dir.path().join("base"), &[]);
        for name in ["middle", "tip"] {
            vm.call("touch pages=200 write=30");
            vm.snapshot(&dir.path().join(name), &["--diff"]);
        }
        let digest = vm.call("check").digest;
        let victim = Victim { dir, digest };
        fs::create_dir(victim.path("tip").join("profile")).unwrap();
        let tip = victim.path("tip");
        let profile = victim.profile();
        let record = ["profile", "record", "--recorder", "uffd", "--run", FUNCTION];
        run_ok(&[&record[..], &["--snapshot", text(&tip), "--out", text(&profile)]].concat());
        victim
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn profile(&self) -> PathBuf {
        self.path("tip").join("profile/a.profile")
    }

    fn restore(&self, policy: &str) -> std::process::Output {
        let tip = self.path("tip");
        let profile = self.profile();
        let mut args = vec!["restore", "--snapshot", text(&tip), "--policy", policy, "--run", "check"];
        if policy.parse::<tvmm::tiering::policy::Policy>().unwrap().needs_profile() {
            args.extend(["--profile", text(&profile)]);
        }
        run(&args)
    }

    /// Returns what `inspect --json` of the tip prints, and what it says on standard error.
    fn inspect(&self) -> (Value, String) {
        let output = run(&["inspect", "--json", text(&self.path("tip"))]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        let is_intact = output.status.success();
        assert!(is_intact || output.status.code() == Some(1) && stderr.starts_with("tvmm: "), "{stderr}");
        assert_eq!(is_intact, stderr.is_empty(), "{stderr}");
        (serde_json::from_slice(&output.stdout).unwrap_or_default(), stderr)
    }
}

fn flip(path: &Path, offset: u64, bit: u8) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ bit], offset).unwrap();
}

fn open(path: &Path) -> Snapshot {
    Snapshot::open(&Location::Dir(path.to_path_buf())).unwrap()
}

/// A page that the layer holds, or one that it does not.
fn page(layer: &Snapshot, is_held: bool) -> Gfn {
    let pages = layer.layout().pages();
    let held = layer.page_map().unwrap().held();
    (0..pages).rev().map(Gfn).find(|gfn| held.contains(*gfn) == is_held).unwrap()
}

#[test]
fn damage_in_every_layer_of_a_chain_is_found_and_no_digest_is_told() {
    let victim = Victim::new();
    let (told, _) = victim.inspect();
    assert!(told["memory"]["content_digest"].is_string() && told["damage"].as_array().unwrap().is_empty(), "{told}");
    for (index, name) in ["base", "middle", "tip"].into_iter().enumerate() {
        let layer = open(&victim.path(name));
        let gpa = page(&layer, true).gpa();
        flip(&victim.path(name).join("memory"), gpa + 9, 1);
        let (told, said) = victim.inspect();
        assert!(said.contains(&format!("{name} is damaged: 1 of ")) && said.contains("guest-physical"), "{said}");
        assert_eq!(told["memory"]["content_digest"], Value::Null);
        let bad = &told["layers"][index]["bad"][0];
        let first = bad["gpa"].as_u64().unwrap();
        let bytes = bad["bytes"].as_u64().unwrap();
        assert!(first <= gpa && gpa < first + bytes, "{gpa:#x} is not in {bad}");
        flip(&victim.path(name).join("memory"), gpa + 9, 1);
    }
    // A parent's page map is only read by the snapshots above it.
    let pages = victim.path("middle").join("pages");
    flip(&pages, fs::metadata(&pages).unwrap().len() - 3, 1);
    assert!(victim.inspect().1.contains("middle/pages"));
    flip(&pages, fs::metadata(&pages).unwrap().len() - 3, 1);
    assert_eq!(victim.inspect().1, "");
}

#[test]
fn bytes_in_holes_of_a_memory_file_are_found_and_never_merged() {
    let victim = Victim::new();
    for name in ["base", "middle", "tip"] {
        let memory = victim.path(name).join("memory");
        let gpa = page(&open(&victim.path(name)), false).gpa();
        flip(&memory, gpa + 100, 4);
        let (told, said) = victim.inspect();
        let wanted = format!("the first at guest-physical {gpa:#x}");
        assert!(said.contains(&wanted) && said.contains(name) && said.contains("does not hold"), "{said}");
        assert_eq!(told["memory"]["content_digest"], Value::Null);
        let out = victim.path("merged");
        run_err(&["snapshot", "merge", text(&victim.path("tip")), "--out", text(&out)]);
        // Zeros that are written there, as a copy without holes has them, are no damage.
        flip(&memory, gpa + 100, 4);
        assert_eq!(victim.inspect().1, "");
    }
}

#[test]
fn damaged_images_plans_and_profiles_are_found_and_named() {
    let victim = Victim::new();
    assert!(victim.restore("reap").status.success());
    let (told, _) = victim.inspect();
    let derived = told["derived"].as_array().unwrap();
    let kinds: Vec<&str> = derived.iter().map(|file| file["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["plan", "image", "profile"]);
    assert!(derived.iter().all(|file| file["state"] == "intact"), "{told}");
    for file in derived {
        let path = Path::new(file["path"].as_str().unwrap());
        let offset = 40 + 3 * PAGE_SIZE.min(fs::metadata(path).unwrap().len() / 4);
        flip(path, offset, 8);
        let (told, said) = victim.inspect();
        assert!(said.contains(text(path)) && said.contains("damaged"), "{said}");
        let again = told["derived"].as_array().unwrap().iter().find(|again| again["path"] == file["path"]).unwrap();
        assert_eq!(again["state"], "damaged");
        // The snapshot itself is whole.
        assert!(told["memory"]["content_digest"].is_string());
        flip(path, offset, 8);
    }
    // An image knows its pages by the plan that it is for.
    let image = derived.iter().find(|file| file["kind"] == "image").unwrap()["path"].as_str().unwrap();
    flip(Path::new(image), 5, 8);
    assert!(victim.inspect().1.contains("the page at guest-physical"));
}

/// The regular files below `dir`.
fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files_below(&path)) } else { found.push(path) }
    }
    found.sort_unstable();
    found
}

/// Offset of the byte of `path` to flip: any byte; in memory files mostly a byte of a page that is held.
fn place(path: &Path, random: &mut Random) -> u64 {
    if !path.ends_with("memory") || random.below(4) == 0 {
        return random.below(fs::metadata(path).unwrap().len());
    }
    let layer = open(path.parent().unwrap());
    let held = layer.page_map().unwrap().held();
    let gfn = held.iter().nth(random.below(held.len()) as usize).unwrap();
    gfn.gpa() + random.below(PAGE_SIZE)
}

#[test]
fn a_byte_flipped_anywhere_is_found_by_inspect_and_no_restore_shows_it() {
    let victim = Victim::new();
    let policies = ["eager", "reap", "faasnap", "aquifer", "tiered"];
    for policy in policies {
        assert!(victim.restore(policy).status.success(), "{policy}");
    }
    let files = files_below(victim.dir.path());
    let of_kind = |extension: &str| files.iter().any(|path| path.extension().is_some_and(|found| found == extension));
    assert!(of_kind("image") && of_kind("plan") && of_kind("profile"), "{files:?}");
    let seed = 0x00c0_ffee_1234_5678;
    let mut wrong = Vec::new();
    let mut random = Random(seed);
    for round in 0..rounds(120) {
        let path = &files[round % files.len()];
        let at = place(path, &mut random);
        let bit = 1 << random.below(8);
        let policy = policies[random.below(policies.len() as u64) as usize];
        let good = fs::metadata(path).unwrap();
        let kept = (path.extension().is_some_and(|found| found == "plan")).then(|| fs::read(path).unwrap());
        flip(path, at, bit);
        fs::File::options().write(true).open(path).unwrap().set_modified(good.modified().unwrap()).unwrap();
        let what = format!("round {round}: bit {bit:#x} of byte {at} of {}, {policy}", path.display());
        if victim.inspect().1.is_empty() {
            wrong.push(format!("{what}: inspect finds nothing"));
        }
        // Pages that a policy maps from a memory file are not compared with their checksums before the guest reads
        // them.
        if policy == "eager" || !path.ends_with("memory") {
            let output = victim.restore(policy);
            let stdout = String::from_utf8_lossy(&output.stdout);
            let stderr = String::from_utf8_lossy(&output.stderr);
            match output.status.code() {
                Some(0) if stdout.contains(&victim.digest) => {}
                Some(1) if stderr.contains("tvmm: ") => {}
                code => wrong.push(format!("{what}: {code:?}, {stdout}{stderr}")),
            }
        }
        match kept {
            // A damaged plan is made again.
            Some(bytes) => fs::write(path, bytes).unwrap(),
            None => flip(path, at, bit),
        }
        fs::File::options().write(true).open(path).unwrap().set_modified(good.modified().unwrap()).unwrap();
    }
    assert!(wrong.is_empty(), "seed {seed:#x}:\n{}", wrong.join("\n"));
    assert_eq!(victim.inspect().1, "");
}
