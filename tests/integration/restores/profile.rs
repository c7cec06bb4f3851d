//! Profiles: what recorders say about a function whose reads and writes are known.
//!
//! The filled region of the guest is the ground truth: `touch` accesses each of its pages as a formula says, and
//! nothing else in the guest does. Outside of it (the guest's kernel, stacks, page tables) recorders are compared with
//! `uffd`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Vm, config, run_err, run_ok, scratch, text};

const FILLED: u64 = 8192;

/// The finaliser of MurmurHash3, as in the guest's `digest.rs`.
fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ x >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ x >> 33
}

fn mix2(a: u64, b: u64) -> u64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    mix(mix(a.wrapping_add(GOLDEN)) ^ b.wrapping_mul(GOLDEN))
}

/// Arguments of `touch`: it touches `pages` pages and writes `write` percent, by stride or (with a seed) shuffled.
#[derive(Clone, Copy, Debug)]
struct Touch {
    pages: u64,
    write: u64,
    stride: u64,
    seed: u64,
}

impl Touch {
    fn function(&self) -> String {
        let Touch { pages, write, stride, seed } = self;
        match seed {
            0 => format!("touch pages={pages} write={write} stride={stride}"),
            _ => format!("touch pages={pages} write={write} seed={seed}"),
        }
    }

    /// The `i`-th page touched: the guest's `permute.rs`, for a total and strides that are powers of two.
    fn page(&self, i: u64) -> u64 {
        if self.seed == 0 {
            let cycle = FILLED / self.stride;
            return (i / cycle + i % cycle * self.stride) % FILLED;
        }
        let half = (FILLED.next_power_of_two().ilog2()).div_ceil(2);
        let mut x = i;
        loop {
            let mask = (1 << half) - 1;
            let mut left = x >> half;
            let mut right = x & mask;
            for round in 0..4 {
                (left, right) = (right, left ^ mix2(self.seed.wrapping_add(round), right) & mask);
            }
            x = left << half | right;
            if x < FILLED {
                return x;
            }
        }
    }

    /// Pages in the order in which they are touched, and whether each is written.
    fn expected(&self) -> Vec<(u64, bool)> {
        let touched = (0..self.pages).map(|i| self.page(i));
        touched.map(|page| (page, mix2(self.seed, page) % 100 < self.write)).collect()
    }
}

const PATTERNS: [Touch; 4] = [
    Touch { pages: 4096, write: 0, stride: 1, seed: 0 },
    Touch { pages: 2048, write: 30, stride: 4, seed: 0 },
    Touch { pages: 2048, write: 50, stride: 1, seed: 9 },
    Touch { pages: 4096, write: 100, stride: 1, seed: 0 },
];

/// A snapshot with 32 MiB filled; the directory, and the first filled page.
fn filled() -> (TempDir, PathBuf, u64) {
    let dir = scratch();
    let out = dir.path().join("filled");
    let mut vm = Vm::boot(&config(1, 128));
    let answer = vm.call(&format!("fill pages={FILLED} seed=3"));
    assert_eq!(answer.value("runs"), "1");
    let gpa = u64::from_str_radix(answer.value("gpa").trim_start_matches("0x"), 16).unwrap();
    vm.snapshot(&out, &[]);
    (dir, out, gpa / 4096)
}

fn record(snapshot: &Path, recorder: &str, function: &str, out: &Path, more: &[&str]) -> Value {
    let mut args = vec!["profile", "record", "--snapshot", text(snapshot), "--recorder", recorder];
    args.extend(["--run", function, "--out", text(out)]);
    args.extend(more);
    run_ok(&args);
    show(snapshot, out)
}

fn show(snapshot: &Path, profile: &Path) -> Value {
    let shown = run_ok(&["profile", "show", text(profile), "--snapshot", text(snapshot), "--json"]);
    serde_json::from_str(&shown).unwrap()
}

/// The pages of `[gfn, pages]` runs, in their order.
fn pages(runs: &Value) -> Vec<u64> {
    let run = |run: &Value| (run[0].as_u64().unwrap(), run[1].as_u64().unwrap());
    runs.as_array().unwrap().iter().map(run).flat_map(|(first, pages)| first..first + pages).collect()
}

fn set(shown: &Value, keys: &[&str]) -> BTreeSet<u64> {
    keys.iter().flat_map(|key| pages(&shown[*key])).collect()
}

/// The share of the found pages that is right, and the share of the right pages that was found.
fn precision_and_recall(found: &BTreeSet<u64>, right: &BTreeSet<u64>) -> (f64, f64) {
    let both = found.intersection(right).count() as f64;
    let share = |of: usize| if of == 0 { 1.0 } else { both / of as f64 };
    (share(found.len()), share(right.len()))
}

#[test]
fn uffd_is_exact_to_the_page_order_included() {
    let (dir, snapshot, base) = filled();
    for touch in PATTERNS {
        let shown = record(&snapshot, "uffd", &touch.function(), &dir.path().join("p"), &[]);
        let in_region = |page: &u64| (base..base + FILLED).contains(page);
        let expected = touch.expected();
        let order: Vec<u64> = pages(&shown["in_order"]).into_iter().filter(in_region).collect();
        assert!(order == expected.iter().map(|(page, _)| base + page).collect::<Vec<_>>(), "order of {touch:?}");
        for (key, wanted) in [("written", true), ("read", false)] {
            let found: BTreeSet<u64> = set(&shown, &[key]).into_iter().filter(in_region).collect();
            let right = expected.iter().filter(|(_, written)| *written == wanted).map(|(page, _)| base + page);
            assert!(found == right.collect(), "{key} of {touch:?}");
        }
        assert_eq!(
            (shown["knows_classes"].as_bool(), shown["knows_order"].as_bool(), shown["runs"].as_u64()),
            (Some(true), Some(true), Some(1))
        );
        let pages = &shown["pages"];
        assert!(pages["loading_set"].as_u64() <= pages["working_set"].as_u64() && pages["loading_set"].is_u64());
    }
}

#[test]
fn other_recorders_see_what_they_claim_to_see() {
    let (dir, snapshot, base) = filled();
    println!("| recorder | function | touched: precision, recall | written: precision, recall |");
    for touch in PATTERNS {
        let expected = touch.expected();
        let touched: BTreeSet<u64> = expected.iter().map(|(page, _)| base + page).collect();
        let written: BTreeSet<u64> = expected.iter().filter(|(_, w)| *w).map(|(page, _)| base + page).collect();
        for recorder in ["uffd", "pagemap", "mincore", "dirty-log"] {
            let shown = record(&snapshot, recorder, &touch.function(), &dir.path().join(recorder), &[]);
            let of = |keys: &[&str]| -> BTreeSet<u64> {
                set(&shown, keys).into_iter().filter(|page| (base..base + FILLED).contains(page)).collect()
            };
            let all = precision_and_recall(&of(&["read", "written", "unclassified"]), &touched);
            let write = precision_and_recall(&of(&["written"]), &written);
            println!(
                "| {recorder} | `{}` | {:.3}, {:.3} | {:.3}, {:.3} |",
                touch.function(),
                all.0,
                all.1,
                write.0,
                write.1
            );
            match recorder {
                "uffd" => assert_eq!((all, write), ((1.0, 1.0), (1.0, 1.0)), "{touch:?}"),
                "pagemap" => {
                    assert_eq!(write, (1.0, 1.0), "{touch:?}");
                    assert_eq!(all.1, 1.0, "{touch:?}");
                    // Exact where the kernel can be kept from mapping neighbours; it says so itself.
                    assert!(all.0 == 1.0 || shown["knows_classes"] == false, "{touch:?}: {}", all.0);
                }
                "mincore" => {
                    assert_eq!(all.1, 1.0, "{touch:?}");
                    assert_eq!((shown["order"].as_str(), shown["read"][0].is_null()), (Some("layers"), true));
                }
                _ => {
                    assert!(write.1 == 1.0 && write.0 > 0.9, "{touch:?}: {write:?}");
                    assert_eq!(shown["sees_reads"], false);
                }
            }
        }
    }
}

#[test]
fn repeated_runs_agree_and_merging_says_how_much() {
    let (dir, snapshot, _) = filled();
    let path = |name: &str| dir.path().join(name);
    let again = record(&snapshot, "pagemap", "touch pages=500 write=50", &path("again"), &["--repeat", "3"]);
    assert_eq!((again["runs"].as_u64(), again["recorder"].as_str()), (Some(3), Some("merged")));
    let a = record(&snapshot, "uffd", "touch pages=1000", &path("a"), &[]);
    let b = record(&snapshot, "uffd", "touch pages=3000", &path("b"), &[]);
    for (by, larger) in [("union", &b), ("intersection", &a)] {
        let merged = path(by);
        run_ok(&["profile", "merge", text(&path("a")), text(&path("b")), "--by", by, "--out", text(&merged)]);
        let merged = show(&snapshot, &merged);
        let least = 1000;
        let most = larger["pages"]["working_set"].as_u64().unwrap() + 100;
        assert!((least..most).contains(&merged["pages"]["working_set"].as_u64().unwrap()), "{by}");
        assert_eq!(merged["knows_order"], true);
    }
    let html = path("p.html");
    run_ok(&["profile", "show", text(&path("a")), "--snapshot", text(&snapshot), "--html", text(&html)]);
    assert!(std::fs::read_to_string(html).unwrap().contains("<svg"));
    assert!(run_ok(&["profile", "show", text(&path("a"))]).contains("heat map"));
}

#[test]
fn profile_of_another_snapshot_or_no_profile_is_refused() {
    let (dir, snapshot, _) = filled();
    let other = dir.path().join("other");
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("hello");
    vm.snapshot(&other, &[]);
    let profile = dir.path().join("p");
    let id = |shown: &Value| shown["snapshot"].as_str().unwrap().to_string();
    let of_other = id(&record(&other, "dirty-log", "hello", &profile, &[]));
    let error = run_err(&["profile", "show", text(&profile), "--snapshot", text(&snapshot)]);
    assert!(error.contains(&of_other) && error.contains("is of no use for snapshot"), "{error}");
    record(&snapshot, "dirty-log", "hello", &dir.path().join("q"), &[]);
    let both = [profile.clone(), dir.path().join("q")];
    let error = run_err(&["profile", "merge", text(&both[0]), text(&both[1]), "--out", text(&dir.path().join("m"))]);
    assert!(error.contains(&of_other), "{error}");

    let bad = dir.path().join("bad");
    std::fs::write(&bad, "not a profile").unwrap();
    run_err(&["profile", "show", text(&bad)]);
    let record = |recorder: &str, function: &str| {
        let mut args = vec!["profile", "record", "--snapshot", text(&other), "--recorder", recorder];
        args.extend(["--run", function, "--out", text(&bad)]);
        run_err(&args)
    };
    assert!(record("guess", "hello").contains("uffd, mincore, pagemap, dirty-log"));
    assert!(record("uffd", "no-such-function").contains("the function failed"));
    assert!(record("uffd", " ").contains("--run takes one function"));
    assert_eq!(std::fs::read(&bad).unwrap(), b"not a profile");
}

#[test]
fn pages_of_all_layers_of_a_chain_are_recorded() {
    let dir = scratch();
    let base = dir.path().join("base");
    let tip = dir.path().join("tip");
    let mut vm = Vm::boot(&config(1, 128));
    let first = vm.call(&format!("fill pages={} seed=3", FILLED / 2));
    vm.snapshot(&base, &[]);
    let second = vm.call(&format!("fill pages={} seed=4", FILLED / 2));
    vm.snapshot(&tip, &["--diff"]);
    let gfn = |answer: &crate::support::Answer| {
        assert_eq!(answer.value("runs"), "1");
        u64::from_str_radix(answer.value("gpa").trim_start_matches("0x"), 16).unwrap() / 4096
    };
    let touch = Touch { pages: 2048, write: 30, stride: 4, seed: 0 };
    let place = |page: u64| if page < FILLED / 2 { gfn(&first) + page } else { gfn(&second) + page - FILLED / 2 };
    let touched: BTreeSet<u64> = touch.expected().iter().map(|(page, _)| place(*page)).collect();
    let written: BTreeSet<u64> = touch.expected().iter().filter(|(_, w)| *w).map(|(page, _)| place(*page)).collect();
    for recorder in ["uffd", "pagemap", "mincore", "dirty-log"] {
        let shown = record(&tip, recorder, &touch.function(), &dir.path().join(recorder), &[]);
        let all = set(&shown, &["read", "written", "unclassified"]);
        match recorder {
            "mincore" => assert!(all.is_superset(&touched)),
            "dirty-log" => assert!(set(&shown, &["written"]).is_superset(&written)),
            _ => {
                assert!(all.is_superset(&touched) && set(&shown, &["written"]).is_superset(&written), "{recorder}");
                assert!(all.len() < touched.len() + 200, "{recorder}: {}", all.len());
                // Of each fill, a quarter is touched; the guest's own pages come on top.
                let bucket = |name: &str| shown["buckets"][name].as_u64().unwrap();
                assert!((1024..1200).contains(&bucket("init")), "{recorder}: {}", bucket("init"));
                assert!((1024..1200).contains(&bucket("runtime")), "{recorder}: {}", bucket("runtime"));
            }
        }
    }
}

#[test]
fn a_snapshot_comes_with_a_profile_of_the_pages_that_were_used() {
    let dir = scratch();
    let base = dir.path().join("base");
    crate::support::pool::filled(&base, 2000, 1);
    let mut vm = Vm::restore(&base, "firecracker");
    vm.wait_for_socket();
    // Enough copies for a profile, however many pages the kernel maps around those that are read.
    vm.call("touch pages=1000 write=60 seed=3");
    let first = dir.path().join("first");
    vm.snapshot(&first, &["--diff", "--verify", "--profile"]);
    let digest = vm.call("check").digest;
    let profile = first.join("plan/used.profile");
    let shown = run_ok(&["profile", "show", text(&profile)]);
    assert!(shown.contains("pagemap"), "{shown}");
    let by_profile = ["--profile", text(&profile)];
    let mut next = Vm::restore_with(&first, "tiered", &by_profile);
    next.wait_for_socket();
    let report = next.api_ok("GET", "/tvmm/report", None);
    let preloaded = report["restore"]["engine"]["planned"]["preload"].as_u64().unwrap();
    assert!(preloaded >= 60, "{report}");
    next.call("touch pages=20 write=100 seed=4");
    // The pages that were brought ahead stay in the profile of the next one.
    let second = dir.path().join("second");
    next.snapshot(&second, &["--diff", "--verify", "--profile"]);
    let changed = next.call("check").digest;
    assert_ne!(changed, digest);
    let profile = second.join("plan/used.profile");
    let mut last = Vm::restore_with(&second, "tiered", &["--profile", text(&profile)]);
    last.wait_for_socket();
    let report = last.api_ok("GET", "/tvmm/report", None);
    assert!(report["restore"]["engine"]["planned"]["preload"].as_u64().unwrap() >= preloaded, "{report}");
    assert_eq!(last.call("check").digest, changed);
    // Nothing tells which pages of those that `eager` has copied were used.
    let eager = Vm::restore(&base, "eager");
    eager.wait_for_socket();
    let out = dir.path().join("eager");
    eager.snapshot(&out, &["--profile"]);
    assert!(!out.join("plan/used.profile").exists());
    let booted = Vm::boot(&config(1, 64));
    booted.wait_for_socket();
    booted.pause();
    let body = json!({ "snapshot_path": dir.path().join("none"), "tvmm": { "profile": true } });
    assert!(booted.api_fault("PUT", "/snapshot/create", Some(body)).contains("that was restored"));
    assert!(!dir.path().join("none").exists());
}
