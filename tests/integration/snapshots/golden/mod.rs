//! Golden artefacts: snapshots that released formats have left behind, see `tests/golden/README.md`.

mod host;
mod set;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tvmm::snapshot::{
    Chain, Content, Extent, Gfn, Image, ImageOrigin, ImageSpec, ImageState, Location, PAGE_SIZE, check_image,
};

use crate::support::artefact::{NoCache, inspect};
use crate::support::{Vm, config, run_ok, scratch, text};
use host::Host;

pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

const BLOCK: usize = 64;

/// `memory` without its zeros: offset (u64 LE), length (u64 LE), bytes; again and again.
fn pack(memory: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    let mut at = 0;
    while at < memory.len() {
        let is_zero = |start: usize| memory[start..start + BLOCK].iter().all(|&byte| byte == 0);
        let end = (at..memory.len()).step_by(BLOCK).find(|&start| is_zero(start)).unwrap_or(memory.len());
        if end > at {
            packed.extend((at as u64).to_le_bytes());
            packed.extend(((end - at) as u64).to_le_bytes());
            packed.extend(&memory[at..end]);
        }
        at = end + BLOCK;
    }
    packed
}

/// The packed bytes at `path`, or those compressed at `path` with `.zst` behind it.
fn packed(path: &Path) -> Vec<u8> {
    if path.exists() {
        return fs::read(path).unwrap();
    }
    let compressed = fs::read(format!("{}.zst", text(path))).unwrap();
    zstd::decode_all(compressed.as_slice()).unwrap()
}

/// When unpacked files were last written: plans know by that whether a memory file is still the same.
fn written() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
}

/// Makes the sparse file of `len` bytes again.
fn unpack(mut packed: &[u8], len: u64, target: &Path) {
    let file = fs::File::create(target).unwrap();
    file.set_len(len).unwrap();
    while let Some((head, rest)) = packed.split_at_checked(16) {
        let [offset, count] = [0, 8].map(|at| u64::from_le_bytes(head[at..at + 8].try_into().unwrap()));
        let (bytes, rest) = rest.split_at(count as usize);
        file.write_all_at(bytes, offset).unwrap();
        packed = rest;
    }
    assert!(packed.is_empty());
    file.set_modified(written()).unwrap();
}

/// Makes a snapshot directory of a golden one.
fn expand(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in ["manifest.json", "vmstate", "pages"] {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let manifest: Value = serde_json::from_slice(&fs::read(from.join("manifest.json")).unwrap()).unwrap();
    let len = manifest["sizes"]["memory"].as_u64().unwrap();
    unpack(&packed(&from.join("memory.packed")), len, &to.join("memory"));
}

/// A golden format's snapshots as they were, in `to`; and what was true of them when they were taken.
pub fn expand_all(version: &str, to: &Path) -> Value {
    let from = golden().join(version);
    for name in ["full", "diff"] {
        expand(&from.join(name), &to.join(name));
    }
    serde_json::from_slice(&fs::read(from.join("expected.json")).unwrap()).unwrap()
}

/// The facts about a snapshot that every later version must read alike.
fn facts(snapshot: &Path) -> Value {
    let told = inspect(snapshot);
    serde_json::json!({
        "id": told["manifest"]["id"],
        "kind": told["manifest"]["kind"],
        "format": told["manifest"]["format"],
        "pages_held": told["memory"]["pages_held"],
        "pages_zero": told["memory"]["pages_zero"],
        "content_digest": told["memory"]["content_digest"],
        "layers": told["layers"].as_array().unwrap().len(),
    })
}

#[test]
fn snapshots_of_format_1_are_read_as_they_were_written() {
    let dir = scratch();
    let expected = expand_all("v1", dir.path());
    for name in ["full", "diff"] {
        assert_eq!(facts(&dir.path().join(name)), expected[name]["facts"], "{name}");
    }
    let merged = dir.path().join("merged");
    run_ok(&["snapshot", "merge", text(&dir.path().join("diff")), "--out", text(&merged)]);
    assert_eq!(facts(&merged)["content_digest"], expected["diff"]["facts"]["content_digest"]);
}

/// The guest of `v1` saw AVX-512F.
const V1_GUEST_SAW: host::Feature = host::Feature { leaf: 7, subleaf: 0, register: "ebx", bits: 1 << 16 };

#[test]
fn snapshots_of_format_1_restore_where_the_host_allows_and_are_refused_elsewhere_with_what_it_lacks() {
    let dir = scratch();
    let expected = expand_all("v1", dir.path());
    for (name, policy) in [("full", "eager"), ("full", "firecracker"), ("diff", "eager"), ("diff", "firecracker")] {
        let snapshot = dir.path().join(name);
        let host = Host::of(&snapshot, V1_GUEST_SAW);
        let digest = expected[name]["check"].as_str().unwrap();
        host.restores_or_refuses(&["--snapshot", text(&snapshot), "--policy", policy], digest);
    }
}

/// The image that a golden one is of: the last held pages, a zero page, the first held page.
fn golden_spec(chain: &Chain) -> ImageSpec {
    let runs = chain.resolve().unwrap();
    let is_held = |run: &&tvmm::snapshot::ResolvedRun| run.content != Content::Zero;
    let held: Vec<Extent> = runs.iter().filter(is_held).map(|run| run.extent).collect();
    let zero = runs.iter().find(|run| run.content == Content::Zero).unwrap().extent;
    let last = held[held.len() - 1];
    let pages = last.pages.min(2);
    let last = Extent { first: Gfn(last.end().0 - pages), pages };
    let one = |extent: Extent| Extent { first: extent.first, pages: 1 };
    ImageSpec { extents: vec![last, one(zero), one(held[0])] }
}

/// The pages of an image, read where the snapshot has them.
fn golden_pages(chain: &Chain, spec: &ImageSpec) -> Vec<u8> {
    let mut bytes = vec![0; spec.file_len() as usize];
    let mut rest = bytes.as_mut_slice();
    for extent in &spec.extents {
        let (to, behind) = rest.split_at_mut(extent.bytes() as usize);
        chain.tip().memory().read_exact_at(to, chain.layout().file_offset(extent.first).unwrap()).unwrap();
        rest = behind;
    }
    bytes
}

#[test]
fn images_are_read_as_they_were_written_and_those_without_checksums_are_made_again() {
    let dir = scratch();
    expand_all("v1", dir.path());
    let full = dir.path().join("full");
    let chain = Chain::open(&Location::Dir(full.clone())).unwrap();
    let spec = golden_spec(&chain);
    let plans = full.join("plan");
    let pages = golden_pages(&chain, &spec);
    fs::create_dir(&plans).unwrap();
    let entry = fs::read_dir(golden().join("image2")).unwrap().next().unwrap().unwrap();
    let path = plans.join(entry.file_name());
    fs::copy(entry.path(), &path).unwrap();
    let (image, origin) = Image::open(&chain, &spec, &NoCache).unwrap();
    assert_eq!((origin, image.path()), (ImageOrigin::Found, path.as_path()));
    image.verify(0, &[&pages]).unwrap();
    let intact = ImageState::Intact { pages: pages.len() as u64 / PAGE_SIZE };
    assert_eq!(check_image(&path, chain.tip().id(), &[]).unwrap(), intact);
    // The form before: pages alone, here wrong ones.
    fs::write(&path, vec![7; pages.len()]).unwrap();
    let specs = std::slice::from_ref(&spec);
    assert_eq!(check_image(&path, chain.tip().id(), specs).unwrap(), ImageState::WithoutChecksums);
    let (image, origin) = Image::open(&chain, &spec, &NoCache).unwrap();
    assert_eq!(origin, ImageOrigin::MadeAgain);
    image.verify(0, &[&pages]).unwrap();
    assert!(fs::read(&path).unwrap().starts_with(&pages));
}

/// Makes an image as `image2` was made. Refuses to touch what exists.
#[test]
#[ignore = "makes a new golden image: set TVMM_GOLDEN to its folder"]
fn make_golden_image() {
    let target = golden().join(std::env::var("TVMM_GOLDEN").expect("TVMM_GOLDEN is the name of the new artefact"));
    fs::create_dir(&target).expect("the artefact is new");
    let dir = scratch();
    expand_all("v1", dir.path());
    let chain = Chain::open(&Location::Dir(dir.path().join("full"))).unwrap();
    let (image, _) = Image::open(&chain, &golden_spec(&chain), &NoCache).unwrap();
    fs::copy(image.path(), target.join(image.path().file_name().unwrap())).unwrap();
}

#[test]
fn golden_artefacts_stay_small() {
    let bytes = |dir: &Path| -> u64 {
        let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
        files.filter(|metadata| metadata.is_file()).map(|metadata| metadata.len()).sum()
    };
    let v1 = golden().join("v1");
    let total: u64 = ["", "full", "diff"].iter().map(|name| bytes(&v1.join(name))).sum();
    assert!(total < 300 << 10, "{total} bytes");
    let set1 = golden().join("set1");
    let total: u64 =
        ["", "full", "diff", "merged", "child", "cold/objects"].iter().map(|name| bytes(&set1.join(name))).sum();
    assert!(total < 800 << 10, "{total} bytes");
}

/// Makes an artefact as `v1` was made, and the next format's will be. Refuses to touch what exists.
#[test]
#[ignore = "makes a new golden artefact: set TVMM_GOLDEN to its name"]
fn make_golden_artefact() {
    let target = golden().join(std::env::var("TVMM_GOLDEN").expect("TVMM_GOLDEN is the name of the new artefact"));
    fs::create_dir(&target).expect("the artefact is new");
    let dir = scratch();
    let mut config = config(1, 5);
    config["boot-source"] = serde_json::json!({ "boot_args": "init_on_free=1" });
    let mut vm = Vm::boot(&config);
    vm.call("fill pages=12 seed=1");
    let mut expected = serde_json::json!({});
    for name in ["full", "diff"] {
        let snapshot = dir.path().join(name);
        if name == "diff" {
            vm.call("free filled=1");
            vm.call("fill pages=4 seed=2");
            vm.call("touch pages=4 write=50 seed=3");
        }
        expected[name] = serde_json::json!({ "check": vm.call("check").digest });
        vm.snapshot(&snapshot, if name == "diff" { &["--diff"] } else { &[] });
        expected[name]["facts"] = facts(&snapshot);
        let to = target.join(name);
        fs::create_dir(&to).unwrap();
        for file in ["manifest.json", "vmstate", "pages"] {
            fs::copy(snapshot.join(file), to.join(file)).unwrap();
        }
        fs::write(to.join("memory.packed"), pack(&fs::read(snapshot.join("memory")).unwrap())).unwrap();
    }
    fs::write(target.join("expected.json"), format!("{expected:#}\n")).unwrap();
}
