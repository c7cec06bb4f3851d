//! Images are compared with their checksums on every way into a guest, and made of verified pages only.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tvmm::snapshot::{
    Background, BackgroundAction, Chain, Content, Extent, Fill, Gfn, ImageSpec, Location, PAGE_SIZE, PageSource,
    Placement, PlannedExtent, RestorePlan,
};
use tvmm::tiering::costs::Costs;
use tvmm::tiering::plan_file::PlanFile;
use tvmm::tiering::policy::{Budget, PolicyInput};

use crate::support::service::wait_until;
use crate::support::slow_file::SlowFile;
use crate::support::{Vm, config, finish, run, run_err, run_ok, scratch, text, tvmm};

/// A snapshot with 600 filled pages, its digest, and where those pages begin.
struct Filled {
    dir: tempfile::TempDir,
    digest: String,
    filled: Extent,
}

impl Filled {
    fn new() -> Filled {
        let dir = scratch();
        let mut vm = Vm::boot(&config(1, 64));
        let gpa = vm.call("fill pages=600 seed=3").value("gpa").to_string();
        let gpa = u64::from_str_radix(gpa.trim_start_matches("0x"), 16).unwrap();
        let digest = vm.call("check").digest;
        vm.snapshot(&dir.path().join("base"), &[]);
        Filled { dir, digest, filled: Extent { first: Gfn::containing(gpa), pages: 600 } }
    }

    fn base(&self) -> PathBuf {
        self.dir.path().join("base")
    }

    /// The images beside the snapshot.
    fn images(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.base().join("plan")) else { return Vec::new() };
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "image")).collect()
    }

    /// The image, if there is exactly one.
    fn image(&self) -> PathBuf {
        let images = self.images();
        assert_eq!(images.len(), 1, "{images:?}");
        images[0].clone()
    }

    /// Saves a plan that takes the filled pages from an image, placed as `place` says, with all else mapped.
    fn save_plan(&self, place: impl Fn(Extent, PageSource) -> PlannedExtent, steps: &[BackgroundAction]) -> PathBuf {
        let chain = Chain::open(&Location::Dir(self.base())).unwrap();
        let mut plan = RestorePlan::new(chain.tip().id(), "image", Vec::new());
        for run in chain.resolve().unwrap() {
            let Content::Bytes(source) = run.content else {
                plan.extents.push(PlannedExtent::zero(run.extent));
                continue;
            };
            let mut first = run.extent.first;
            let end = run.extent.end();
            while first < end {
                let filled = self.filled;
                let stop = [filled.first, filled.end(), end].into_iter().filter(|stop| *stop > first).min().unwrap();
                let extent = Extent { first, pages: stop.0 - first.0 };
                let source =
                    PageSource { offset: source.offset + (first.0 - run.extent.first.0) * PAGE_SIZE, ..source };
                first = stop;
                if !filled.contains(extent.first) {
                    plan.extents.push(PlannedExtent::from(extent, Placement::CowFile, source));
                    continue;
                }
                plan.extents.push(place(extent, PageSource::image(0, 0)));
                plan.images = vec![ImageSpec { extents: vec![extent] }];
                plan.background = steps.iter().map(|&action| Background { action, extent }).collect();
            }
        }
        assert_eq!(plan.images[0].file_len(), 600 * PAGE_SIZE);
        let resolved = chain.resolve().unwrap();
        let costs = Costs::default();
        let budget = Budget::default();
        let input =
            PolicyInput { chain: &chain, resolved: &resolved, tiers: &[], profile: None, costs: &costs, budget };
        let expected = input.estimate(&plan);
        let path = self.dir.path().join("image.plan");
        PlanFile::new(plan, expected, &chain).unwrap().save(&path).unwrap();
        path
    }

    fn restore(&self, how: &[&str]) -> std::process::Output {
        run(&[&["restore", "--snapshot", text(&self.base())], how, &["--run", "check"]].concat())
    }
}

fn flip(path: &Path, offset: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], offset).unwrap();
}

#[test]
fn a_flipped_byte_of_an_image_ends_the_restore_however_the_image_is_placed() {
    use BackgroundAction::{BreakCow, Install, ReadAhead};
    let snapshot = Filled::new();
    type Place = fn(Extent, PageSource) -> PlannedExtent;
    let ways: [(&str, Place, &[BackgroundAction]); 8] = [
        ("copied", |extent, source| PlannedExtent::preload(extent, source, Fill::Copy), &[]),
        ("installed", |extent, source| PlannedExtent::preload(extent, source, Fill::Install), &[]),
        ("broken", |extent, source| PlannedExtent::preload(extent, source, Fill::BreakCow), &[]),
        ("mapped", |extent, source| PlannedExtent::from(extent, Placement::CowFile, source), &[]),
        ("read ahead", |extent, source| PlannedExtent::from(extent, Placement::CowFile, source), &[ReadAhead]),
        ("in place", |extent, source| PlannedExtent::from(extent, Placement::InPlace, source), &[BreakCow]),
        ("lazy", |extent, source| PlannedExtent::from(extent, Placement::Lazy, source), &[]),
        ("installed later", |extent, source| PlannedExtent::from(extent, Placement::Lazy, source), &[Install]),
    ];
    for (name, place, steps) in ways {
        let plan = snapshot.save_plan(place, steps);
        let good = snapshot.restore(&["--plan", text(&plan)]);
        let told = String::from_utf8(good.stdout).unwrap();
        assert!(good.status.success() && told.contains(&snapshot.digest), "{name}: {told}");
        let image = snapshot.image();
        for page in [0, 301, 599] {
            flip(&image, page * PAGE_SIZE + 77);
            let bad = snapshot.restore(&["--plan", text(&plan)]);
            let stderr = String::from_utf8(bad.stderr).unwrap();
            let gpa = format!("guest-physical {:#x}", snapshot.filled.first.gpa() + page * PAGE_SIZE);
            assert_eq!(bad.status.code(), Some(1), "{name}: {stderr}");
            for said in [text(&image), &gpa, "does not match its checksum", "Delete the file"] {
                assert!(stderr.contains(said), "{name}: {said} is missing: {stderr}");
            }
            flip(&image, page * PAGE_SIZE + 77);
        }
        assert!(snapshot.restore(&["--plan", text(&plan)]).status.success(), "{name}");
    }
}

#[test]
fn a_guest_runs_on_while_a_snapshot_of_it_waits_for_the_comparison_of_images() {
    let snapshot = Filled::new();
    let base = snapshot.base();
    let plan = snapshot.save_plan(|extent, source| PlannedExtent::from(extent, Placement::CowFile, source), &[]);
    assert!(snapshot.restore(&["--plan", text(&plan)]).status.success());
    let image = snapshot.image();
    let partials = || {
        let names = fs::read_dir(snapshot.dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_str().unwrap().ends_with(".partial")).count()
    };
    for (more, is_damaged) in [("--resume", false), ("--live", false), ("--resume", true), ("--live", true)] {
        if is_damaged {
            flip(&image, 301 * PAGE_SIZE + 77);
        }
        let Some(slow) = SlowFile::over(&image) else { return };
        slow.hold_below(600 * PAGE_SIZE);
        let restore = ["restore", "--snapshot", text(&base), "--plan", text(&plan), "--verify", "off"];
        let mut vm = Vm::spawn(scratch(), &restore);
        vm.call("hello");
        wait_until("the comparison waits for the image", || slow.held() > 0);
        let out = snapshot.dir.path().join("diff");
        let mut command = tvmm();
        command.args(["snapshot", "--api-sock", text(vm.socket()), "--out", text(&out), "--diff", more]);
        let asked = std::thread::spawn(move || finish(&mut command));
        wait_until("the snapshot has begun", || partials() == 1);
        wait_until("the VM runs", || vm.state() == "Running");
        vm.call("hello");
        assert!(!asked.is_finished() && !out.exists(), "nothing is saved before the comparison");
        slow.let_go();
        let output = asked.join().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.success(), !is_damaged, "{more}: {stderr}");
        assert_eq!((out.exists(), partials()), (!is_damaged, 0), "{more}");
        if is_damaged {
            assert!(stderr.contains("Cannot take a snapshot") && stderr.contains("checksum"), "{more}: {stderr}");
            let (exit, stderr) = vm.wait();
            assert!(exit.code() == Some(1) && stderr.contains(text(&image)), "{more}: {stderr}");
            drop(slow);
            flip(&image, 301 * PAGE_SIZE + 77);
            continue;
        }
        drop(vm);
        drop(slow);
        assert_eq!(Vm::restore(&out, "eager").call("check").digest, snapshot.digest, "{more}");
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn an_image_is_not_made_of_damaged_pages() {
    let snapshot = Filled::new();
    let plan = snapshot.save_plan(|extent, source| PlannedExtent::preload(extent, source, Fill::Copy), &[]);
    let memory = snapshot.base().join("memory");
    let modified = fs::metadata(&memory).unwrap().modified().unwrap();
    flip(&memory, (snapshot.filled.first.0 + 100) * PAGE_SIZE);
    fs::File::options().write(true).open(&memory).unwrap().set_modified(modified).unwrap();
    let base = snapshot.base();
    let said = run_err(&["restore", "--snapshot", text(&base), "--plan", text(&plan), "--run", "check"]);
    assert!(said.contains("damaged chunks of memory") && said.contains("guest-physical"), "{said}");
    assert_eq!(snapshot.images(), Vec::<PathBuf>::new());
}

#[test]
fn an_image_without_checksums_of_an_older_version_is_made_again() {
    let snapshot = Filled::new();
    let plan = snapshot.save_plan(|extent, source| PlannedExtent::preload(extent, source, Fill::Install), &[]);
    assert!(snapshot.restore(&["--plan", text(&plan)]).status.success());
    let image = snapshot.image();
    let good = fs::read(&image).unwrap();
    // Older versions wrote the pages alone. One page is wrong, which they could not notice.
    fs::File::options().write(true).open(&image).unwrap().set_len(600 * PAGE_SIZE).unwrap();
    flip(&image, 5 * PAGE_SIZE);
    let output = snapshot.restore(&["--plan", text(&plan)]);
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stdout.contains(&snapshot.digest), "{stdout}{stderr}");
    assert!(stderr.contains("made again") && stderr.contains(text(&image)), "{stderr}");
    assert_eq!(fs::read(&image).unwrap(), good);
}

#[test]
fn an_image_with_a_damaged_or_cut_end_is_refused() {
    let snapshot = Filled::new();
    let plan = snapshot.save_plan(|extent, source| PlannedExtent::preload(extent, source, Fill::Copy), &[]);
    assert!(snapshot.restore(&["--plan", text(&plan)]).status.success());
    let base = snapshot.base();
    let image = snapshot.image();
    let good = fs::read(&image).unwrap();
    let restore = ["restore", "--snapshot", text(&base), "--plan", text(&plan), "--run", "check"];
    let trailer = 600 * PAGE_SIZE as usize;
    for at in (trailer..good.len()).step_by(101).chain(good.len() - 16..good.len()) {
        let mut bad = good.clone();
        bad[at] ^= 0x20;
        fs::write(&image, &bad).unwrap();
        let said = run_err(&restore);
        assert!(said.contains("Cannot use the image") && said.contains("Delete it"), "byte {at}: {said}");
    }
    for len in [0, PAGE_SIZE as usize, trailer - 1, trailer + 1, good.len() - 1] {
        fs::write(&image, &good[..len]).unwrap();
        let said = run_err(&restore);
        assert!(said.contains("Cannot use the image"), "{len} bytes: {said}");
    }
    fs::write(&image, [&good[..], &[0]].concat()).unwrap();
    assert!(run_err(&restore).contains("Cannot use the image"));
    // The image of other pages under this one's name.
    let other = Filled::new();
    let plan = other.save_plan(|extent, source| PlannedExtent::preload(extent, source, Fill::Copy), &[]);
    assert!(other.restore(&["--plan", text(&plan)]).status.success());
    fs::copy(other.image(), &image).unwrap();
    assert!(run_err(&restore).contains("it holds other pages than its name says"));
    fs::write(&image, &good).unwrap();
    run_ok(&restore);
}
