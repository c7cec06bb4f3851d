//! Files that no tvmm wrote: damaged, cut, forged. Each gives an error with a name, none a panic.

use std::fs;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::NoCache;
use super::*;

const HEADER: usize = 64;
const ENTRY: usize = 40;

fn u32_le(value: u32) -> [u8; 4] {
    value.to_le_bytes()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Makes the header's and the table's checksums right again: a forger can do that too.
fn reseal(bytes: &mut [u8]) {
    let count = u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize;
    if let Some(table) = bytes.get(HEADER..HEADER.saturating_add(count.saturating_mul(ENTRY))) {
        let crc = crc32c::crc32c(table);
        put(bytes, 48, &u32_le(crc));
    }
    let crc = crc32c::crc32c(&bytes[..60]);
    put(bytes, 60, &u32_le(crc));
}

fn forged(change: impl FnOnce(&mut Vec<u8>)) -> Error {
    let mut bytes = write_container(&sections());
    change(&mut bytes);
    reseal(&mut bytes);
    Container::parse(bytes).unwrap_err()
}

#[test]
fn container_round_trips() {
    let container = Container::parse(write_container(&sections())).unwrap();
    assert_eq!(container.writer(), env!("CARGO_PKG_VERSION"));
    assert_eq!(container.copy_sections(|_| true).unwrap(), sections());
    assert_eq!(container.sections()[4].kind, SectionKind::Other(1000));
    assert_eq!(Container::parse(write_container(&[])).unwrap().sections(), []);
}

#[test]
fn container_has_the_documented_bytes() {
    let section = Section { kind: SectionKind::Vcpu, instance: 2, version: 9, payload: b"abc".to_vec() };
    let bytes = write_container(&[section]);
    assert_eq!(bytes.len(), 107);
    assert_eq!(bytes[..8], *b"TVMMSNAP");
    assert_eq!(bytes[8..12], [1, 0, 0, 0]);
    assert_eq!(bytes[12..16], u32_le(64));
    assert_eq!(bytes[16..20], u32_le(1));
    assert_eq!(bytes[20..24], u32_le(40));
    assert_eq!(bytes[24..32], 107_u64.to_le_bytes());
    assert_eq!(bytes[32..32 + env!("CARGO_PKG_VERSION").len()], *env!("CARGO_PKG_VERSION").as_bytes());
    assert_eq!(bytes[48..52], u32_le(crc32c::crc32c(&bytes[64..104])));
    assert_eq!(bytes[52..60], [0; 8]);
    assert_eq!(bytes[60..64], u32_le(crc32c::crc32c(&bytes[..60])));
    assert_eq!(bytes[64..80], [u32_le(3), u32_le(9), u32_le(2), u32_le(0)].concat());
    assert_eq!(bytes[80..96], [104_u64.to_le_bytes(), 3_u64.to_le_bytes()].concat());
    // CRC32C("abc") from the polynomial's definition, not from this crate.
    assert_eq!(bytes[96..104], [u32_le(0x364b_3fb7), u32_le(0)].concat());
    assert_eq!(bytes[104..], *b"abc");
}

#[test]
fn every_flipped_byte_of_header_and_table_is_refused() {
    let bytes = write_container(&sections());
    for at in 0..HEADER + ENTRY * sections().len() {
        for bit in 0..8 {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << bit;
            assert!(Container::parse(bytes).is_err(), "bit {bit} of byte {at}");
        }
    }
}

#[test]
fn every_flipped_byte_of_a_payload_is_refused_when_it_is_asked_for() {
    let bytes = write_container(&sections());
    let mut at = HEADER + ENTRY * sections().len();
    for section in sections() {
        for _ in &section.payload {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x10;
            let container = Container::parse(bytes).unwrap();
            let got = container.section(section.kind, section.instance);
            assert!(matches!(got, Err(Error::Checksum { .. })), "byte {at}");
            at += 1;
        }
    }
    assert_eq!(at, bytes.len());
}

#[test]
fn every_truncation_is_refused() {
    let bytes = write_container(&sections());
    for len in 0..bytes.len() {
        let error = Container::parse(bytes[..len].to_vec()).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{len}: {error}");
    }
    let error = Container::parse([bytes, vec![0]].concat()).unwrap_err();
    assert!(error.to_string().contains("1 bytes follow its end"), "{error}");
}

#[test]
fn forged_lengths_counts_and_offsets_are_refused() {
    let huge = (100_u64 << 30).to_le_bytes();
    assert!(matches!(forged(|b| put(b, 24, &huge)), Error::Truncated { need: 0x19_0000_0000, .. }));
    assert!(matches!(forged(|b| put(b, 16, &u32_le(u32::MAX))), Error::Malformed { .. }));
    assert!(matches!(forged(|b| put(b, 16, &u32_le(4096))), Error::Truncated { .. }));
    assert!(matches!(forged(|b| put(b, 16, &u32_le(4))), Error::Malformed { .. }));
    assert!(matches!(forged(|b| put(b, 12, &u32_le(65))), Error::Malformed { .. }));
    assert!(matches!(forged(|b| put(b, 20, &u32_le(0))), Error::Malformed { .. }));
    assert!(matches!(forged(|b| put(b, 52, &u32_le(1))), Error::Malformed { .. }));
    assert!(matches!(forged(|b| put(b, 56, &u32_le(1))), Error::Malformed { .. }));
    for entry in 0..sections().len() {
        let at = HEADER + entry * ENTRY;
        for length in [huge, u64::MAX.to_le_bytes(), 0x7000_u64.to_le_bytes()] {
            assert!(matches!(forged(|b| put(b, at + 24, &length)), Error::Malformed { .. }));
            assert!(matches!(forged(|b| put(b, at + 16, &length)), Error::Malformed { .. }));
        }
        assert!(matches!(forged(|b| put(b, at + 12, &u32_le(1))), Error::Malformed { .. }));
        assert!(matches!(forged(|b| put(b, at + 36, &u32_le(1))), Error::Malformed { .. }));
    }
    let twice = forged(|b| put(b, HEADER + 2 * ENTRY + 8, &u32_le(0)));
    assert!(twice.to_string().contains("section 3 instance 0 twice"), "{twice}");
}

#[test]
fn future_format_names_its_writer() {
    let error = forged(|b| {
        put(b, 8, &[2, 0]);
        put(b, 32, b"7.1.0\0\0\0");
    });
    let message = error.to_string();
    assert!(message.contains("was written by tvmm 7.1.0 in format 2.0, this build reads 1.x"), "{message}");
    // A later minor version is readable.
    let mut bytes = write_container(&sections());
    put(&mut bytes, 10, &[9]);
    reseal(&mut bytes);
    assert!(Container::parse(bytes).is_ok());
}

/// A snapshot directory to be damaged, with its manifest as JSON.
struct Victim {
    base: tempfile::TempDir,
    sealed: Sealed,
}

impl Victim {
    fn new() -> Victim {
        let base = tempfile::tempdir().unwrap();
        let sealed = sample().write_full(dir(base.path(), "v"));
        Victim { base, sealed }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.base.path().join("v").join(name)
    }

    fn flip(&self, name: &str, at: u64) {
        let file = fs::OpenOptions::new().read(true).write(true).open(self.path(name)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }

    fn open(&self) -> Result<Snapshot> {
        Snapshot::open(&self.sealed.location)
    }

    /// Changes the manifest and gives it the id that it then has.
    fn forge_manifest(&self, change: impl FnOnce(&mut Manifest)) {
        let mut manifest = self.open().unwrap().manifest().clone();
        change(&mut manifest);
        manifest.id = manifest.compute_id("forged").unwrap();
        fs::write(self.path("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
    }
}

#[test]
fn unsealed_directory_says_so() {
    let victim = Victim::new();
    fs::remove_file(victim.path("manifest.json")).unwrap();
    let error = victim.open().unwrap_err();
    assert!(matches!(error, Error::NotSealed { .. }));
    assert!(error.to_string().contains("/v is not sealed"), "{error}");
    assert!(matches!(Snapshot::open(&dir(victim.base.path(), "none")), Err(Error::Io { .. })));
}

#[test]
fn damaged_memory_is_found_with_its_address() {
    let victim = Victim::new();
    let model = sample();
    // The 121st page of the file is the 21st of the second range, which starts 3 pages above 4 GiB.
    let index = 121;
    assert_ne!(model.pages[index], 0);
    victim.flip("memory", (index * PAGE + 1234) as u64);
    let snapshot = victim.open().unwrap();
    let report = snapshot.verify(&mut |_, _| {}).unwrap();
    assert_eq!((report.bad_chunks, report.bad.len()), (1, 1));
    assert!(report.bad[0].extent.contains(model.gfn(index)));
    assert!(report.bad[0].extent.pages <= CHUNK_PAGES);
    let error = report.into_result(snapshot.object()).unwrap_err();
    assert!(error.to_string().contains("guest-physical 0x1000"), "{error}");

    // Damage must not get a fresh checksum.
    let chain = Chain::open(&victim.sealed.location).unwrap();
    let merged = merge(&chain, dir(victim.base.path(), "m"), &NoCache, &mut |_, _| {});
    assert!(matches!(merged, Err(Error::BadMemory { bad: 1, .. })));
    assert_eq!(fs::read_dir(victim.base.path()).unwrap().count(), 1);
}

#[test]
fn memory_of_another_length_is_refused() {
    let victim = Victim::new();
    let file = fs::OpenOptions::new().write(true).open(victim.path("memory")).unwrap();
    file.set_len(129 * PAGE_SIZE).unwrap();
    assert!(matches!(victim.open(), Err(Error::Truncated { .. })));
    file.set_len(131 * PAGE_SIZE).unwrap();
    assert!(matches!(victim.open(), Err(Error::Malformed { .. })));
    // Cut only after it was opened.
    file.set_len(130 * PAGE_SIZE).unwrap();
    let chain = Chain::open(&victim.sealed.location).unwrap();
    file.set_len(0).unwrap();
    assert!(matches!(chain.tip().verify(&mut |_, _| {}), Err(Error::Io { .. })));
    assert!(matches!(page_digest(&chain), Err(Error::Io { .. })));
}

#[test]
fn files_of_another_snapshot_are_refused() {
    let victim = Victim::new();
    let mut other = sample();
    other.pages[3] = 200;
    other.write_full(dir(victim.base.path(), "o"));
    fs::copy(victim.base.path().join("o/pages"), victim.path("pages")).unwrap();
    assert!(matches!(victim.open().unwrap().page_map(), Err(Error::DigestMismatch { .. } | Error::Malformed { .. })));
    let mut state = sections();
    state[0].payload[0] ^= 1;
    fs::write(victim.path("vmstate"), write_container(&state)).unwrap();
    assert!(matches!(victim.open(), Err(Error::DigestMismatch { part: "state", .. })));
    fs::write(victim.path("vmstate"), write_container(&state[1..])).unwrap();
    assert!(matches!(victim.open(), Err(Error::Malformed { .. })));
}

#[test]
fn things_that_are_no_files_are_refused_without_waiting() {
    let victim = Victim::new();
    fs::remove_file(victim.path("vmstate")).unwrap();
    fs::create_dir(victim.path("vmstate")).unwrap();
    assert!(matches!(victim.open(), Err(Error::NotAFile { .. })));
    fs::remove_dir(victim.path("vmstate")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", victim.path("vmstate")).unwrap();
    assert!(matches!(victim.open(), Err(Error::NotAFile { .. })));
    fs::remove_file(victim.path("vmstate")).unwrap();
    fs::File::create(victim.path("vmstate")).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(victim.open(), Err(Error::TooLarge { .. })));
}

#[test]
fn every_flipped_byte_of_the_small_files_is_refused() {
    let victim = Victim::new();
    for name in ["vmstate", "pages", "manifest.json"] {
        let original = fs::read(victim.path(name)).unwrap();
        for at in 0..original.len() {
            let mut bytes = original.clone();
            bytes[at] ^= 1;
            fs::write(victim.path(name), &bytes).unwrap();
            let opened = victim.open().and_then(|snapshot| snapshot.page_map().map(|_| ()));
            // White space of the JSON is the one thing that may change.
            let blank = name == "manifest.json" && original[at].is_ascii_whitespace();
            assert!(opened.is_err() || blank, "byte {at} of {name}");
        }
        fs::write(victim.path(name), &original).unwrap();
    }
    assert!(victim.open().is_ok());
}

#[test]
fn edited_manifest_is_refused() {
    let victim = Victim::new();
    let json = fs::read_to_string(victim.path("manifest.json")).unwrap();
    let edit = |from: &str, to: &str| {
        let edited = json.replacen(from, to, 1);
        assert_ne!(edited, json);
        fs::write(victim.path("manifest.json"), edited).unwrap();
        victim.open().unwrap_err()
    };
    assert!(matches!(edit("\"xcr0\": 1", "\"xcr0\": 2"), Error::ManifestJson { .. } | Error::IdMismatch { .. }));
    assert!(matches!(edit("GenuineTest", "GenuineTesu"), Error::IdMismatch { .. }));
    assert!(matches!(edit("{", "{\"more\": 1,"), Error::ManifestJson { .. }));
    let future = edit("\"format\": 1", "\"more\": 1, \"format\": 2");
    assert!(matches!(future, Error::FutureFormat { .. }), "{future}");
    let bytes = vec![b'['; 1 << 20];
    fs::write(victim.path("manifest.json"), bytes).unwrap();
    assert!(matches!(victim.open(), Err(Error::ManifestJson { .. })));
}

#[test]
fn forged_manifest_that_contradicts_the_files_is_refused() {
    let malformed = |change: fn(&mut Manifest)| {
        let victim = Victim::new();
        victim.forge_manifest(change);
        let opened = victim.open().and_then(|snapshot| snapshot.page_map().cloned());
        assert!(matches!(opened, Err(Error::Malformed { .. })), "{opened:?}");
    };
    malformed(|manifest| manifest.pages_held += 1);
    malformed(|manifest| manifest.pages_zero = u64::MAX);
    malformed(|manifest| manifest.sizes.memory = u64::MAX);
    malformed(|manifest| manifest.sizes.vmstate = 0);
    malformed(|manifest| manifest.sizes.pages = u64::MAX);
    // Same length of the memory file, but the pages are elsewhere.
    malformed(|manifest| manifest.layout = MemoryLayout::from_gpa_ranges(&[(1 << 30, 130 * PAGE_SIZE)]).unwrap());
    let victim = Victim::new();
    victim.forge_manifest(|manifest| manifest.kind = SnapshotKind::Diff);
    assert!(matches!(victim.open(), Err(Error::BadParentage { .. })));
}

#[test]
fn page_map_that_claims_all_pages_there_can_be_is_refused_cheaply() {
    let victim = Victim::new();
    let all = PageSet::from_iter([Extent::new(Gfn(0), 1 << 32)]).serialize();
    let section = |kind, payload: &[u8]| Section { kind, instance: 0, version: 1, payload: payload.to_vec() };
    let pages = [
        section(SectionKind::PagesHeld, &all),
        section(SectionKind::PagesZero, &PageSet::new().serialize()),
        section(SectionKind::ChunkChecksums, &[]),
    ];
    let bytes = write_container(&pages);
    fs::write(victim.path("pages"), &bytes).unwrap();
    victim.forge_manifest(|manifest| {
        manifest.sizes.pages = bytes.len() as u64;
        manifest.digests.pages = reader::section_digest(&pages);
    });
    let error = victim.open().unwrap().page_map().unwrap_err();
    assert!(error.to_string().contains("outside guest memory"), "{error}");
}

/// A full snapshot, and a diff to it.
fn pair(base: &Path) -> (Sealed, Sealed) {
    let before = sample();
    let mut after = sample();
    after.pages[9] ^= 3;
    let parent = before.write_full(dir(base, "p"));
    let child = after.write_diff(&before, &parent, dir(base, "c"));
    (parent, child)
}

#[test]
fn wrong_parent_is_refused() {
    let base = tempfile::tempdir().unwrap();
    let (parent, child) = pair(base.path());
    fs::rename(base.path().join("p"), base.path().join("q")).unwrap();
    let missing = Chain::open(&child.location).unwrap_err();
    assert!(matches!(missing, Error::Parent { .. }));
    assert!(std::error::Error::source(&missing).is_some());
    let mut other = sample();
    other.pages[0] = 99;
    let other = other.write_full(dir(base.path(), "p"));
    let error = Chain::open(&child.location).unwrap_err();
    assert!(
        matches!(error, Error::WrongParent { expected, found, .. } if expected == parent.id && found == other.id),
        "{error}"
    );
}

#[test]
fn parent_that_is_its_own_parent_is_refused() {
    let base = tempfile::tempdir().unwrap();
    let (_, child) = pair(base.path());
    // The location is not part of the identity, so a forger may point it back at the child.
    let path = base.path().join("c/manifest.json");
    let json = fs::read_to_string(&path).unwrap();
    fs::write(&path, json.replace("\"../p\"", "\".\"")).unwrap();
    let error = Chain::open(&child.location).unwrap_err();
    assert!(matches!(error, Error::WrongParent { .. }), "{error}");
}

#[test]
fn directories_that_are_no_chain_are_refused() {
    let base = tempfile::tempdir().unwrap();
    pair(base.path());
    let [p, c] = ["p", "c"].map(|name| base.path().join(name));
    let refused = |dirs: &[std::path::PathBuf]| Chain::from_dirs(dirs).unwrap_err();
    assert!(matches!(refused(&[]), Error::NotAChain { .. }));
    assert!(matches!(refused(std::slice::from_ref(&c)), Error::NotAChain { .. }));
    assert!(matches!(refused(&[p.clone(), p.clone()]), Error::NotAChain { .. }));
    assert!(matches!(refused(&[p.clone(), c.clone(), c.clone()]), Error::WrongParent { .. }));
    assert!(matches!(refused(&vec![p.clone(); MAX_MERGED_DEPTH + 1]), Error::NotAChain { .. }));
    assert_eq!(Chain::from_dirs(&[p, c]).unwrap().layers().len(), 2);
}

/// A full snapshot `0` and diffs `1`, `2` and so on, each with nothing in it.
fn chain_of(base: &Path, layers: usize) -> Sealed {
    let layout = MemoryLayout::from_gpa_ranges(&[(0, PAGE_SIZE)]).unwrap();
    let full = SnapshotWriter::create(dir(base, "0"), layout, SnapshotKind::Full, None).unwrap();
    let full = full.seal(seal_input()).unwrap();
    (1..layers).fold(full, |parent, index| on_top(&parent, dir(base, &index.to_string())).unwrap())
}

/// A diff with nothing in it.
fn on_top(parent: &Sealed, target: Location) -> Result<Sealed> {
    let layout = MemoryLayout::from_gpa_ranges(&[(0, PAGE_SIZE)]).unwrap();
    let parent = Parent { id: parent.id, location: parent.location.clone() };
    SnapshotWriter::create(target, layout, SnapshotKind::Diff, Some(parent))?.seal(seal_input())
}

fn merged(chain: &Chain, target: Location) -> Sealed {
    merge(chain, target, &NoCache, &mut |_, _| {}).unwrap()
}

#[test]
fn chain_is_written_as_long_as_it_can_be_read_and_no_longer() {
    let base = tempfile::tempdir().unwrap();
    let tip = chain_of(base.path(), MAX_CHAIN_DEPTH);
    assert_eq!(Chain::open(&tip.location).unwrap().layers().len(), MAX_CHAIN_DEPTH);
    let refused = on_top(&tip, dir(base.path(), "more"));
    assert!(matches!(refused, Err(Error::ChainFull { limit: MAX_CHAIN_DEPTH, .. })), "{refused:?}");
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), MAX_CHAIN_DEPTH, "nothing is left of it");
}

#[test]
fn chain_that_is_too_long_can_be_merged_whole_and_by_parts_with_children_that_stay_valid() {
    let base = tempfile::tempdir().unwrap();
    let last = chain_of(base.path(), MAX_CHAIN_DEPTH);
    // As tvmm 0.1 wrote one: a child of a merged snapshot, in whose place there are all the layers again.
    let short = merged(&Chain::open(&last.location).unwrap(), dir(base.path(), "short"));
    let moved = |from: &str, to: &str| fs::rename(base.path().join(from), base.path().join(to)).unwrap();
    let child = on_top(&Sealed { id: last.id, ..short }, dir(base.path(), "child")).unwrap();
    moved("short", "aside");
    moved(&(MAX_CHAIN_DEPTH - 1).to_string(), "short");
    let refused = Chain::open(&child.location);
    assert!(matches!(refused, Err(Error::ChainTooLong { limit: MAX_CHAIN_DEPTH, .. })), "{refused:?}");

    let whole = Chain::open_to_merge(&child.location).unwrap();
    assert_eq!(whole.layers().len(), MAX_CHAIN_DEPTH + 1);
    let whole = merged(&whole, dir(base.path(), "whole"));
    assert_eq!(Chain::open(&whole.location).unwrap().layers().len(), 1);
    // By parts: the lower part, merged, stands in for its tip, named or in its place.
    let lower = dir(base.path(), "short");
    let part = merged(&Chain::open(&lower).unwrap(), dir(base.path(), "part"));
    assert_ne!(part.id, last.id);
    let dirs = ["part", "child"].map(|name| base.path().join(name));
    assert_eq!(Chain::from_dirs(&dirs).unwrap().layers().len(), 2);
    fs::remove_dir_all(base.path().join("short")).unwrap();
    moved("part", "short");
    assert_eq!(Chain::open(&child.location).unwrap().layers().len(), 2);
    // And merged once more, it still does.
    let again = merged(&Chain::open(&lower).unwrap(), dir(base.path(), "again"));
    let again = Snapshot::open(&again.location).unwrap();
    assert!(again.stands_for(last.id) && again.stands_for(part.id) && !again.stands_for(child.id));
    let upper = on_top(&child, dir(base.path(), "upper")).unwrap();
    assert_eq!(Chain::open(&upper.location).unwrap().layers().len(), 3);
}

#[test]
fn only_a_full_snapshot_stands_for_others() {
    let base = tempfile::tempdir().unwrap();
    let (parent, child) = pair(base.path());
    for (snapshot, count, good) in [(&parent, 64, true), (&parent, 65, false), (&child, 1, false)] {
        let path = snapshot.location.memory_path().with_file_name("manifest.json");
        let mut manifest = Manifest::parse("x", &fs::read(path).unwrap()).unwrap();
        manifest.stands_for = vec![parent.id; count];
        manifest.id = manifest.compute_id("x").unwrap();
        let json = serde_json::to_vec(&manifest).unwrap();
        assert_eq!(Manifest::parse("x", &json).is_ok(), good, "{count}");
    }
}

#[test]
fn diff_is_not_written_without_the_parents_that_it_needs() {
    let base = tempfile::tempdir().unwrap();
    let (parent, child) = pair(base.path());
    let needed = |sealed: &Sealed| Some(Parent { id: sealed.id, location: sealed.location.clone() });
    let create = |parent, layout| SnapshotWriter::create(dir(base.path(), "d"), layout, SnapshotKind::Diff, parent);
    let refused = |result: Result<SnapshotWriter>| assert!(matches!(result, Err(Error::NoParent { .. })), "{result:?}");
    let other_layout = MemoryLayout::from_gpa_ranges(&[(0, 130 * PAGE_SIZE)]).unwrap();
    refused(create(needed(&parent), other_layout));
    refused(create(needed(&Sealed { id: child.id, ..parent.clone() }), small_layout()));
    // The parent, or the parent's parent, was there when the guest stood still, and is gone when the diff is sealed.
    for (lost, of) in [("c", &child), ("p", &child), ("p", &parent)] {
        let writer = create(needed(of), small_layout()).unwrap();
        fs::rename(base.path().join(lost), base.path().join("aside")).unwrap();
        let sealed = writer.seal(seal_input());
        assert!(matches!(sealed, Err(Error::NoParent { .. })), "{sealed:?}");
        refused(create(needed(of), small_layout()));
        fs::rename(base.path().join("aside"), base.path().join(lost)).unwrap();
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 2, "nothing is left of it");
    }
}

#[test]
fn a_snapshot_that_no_reader_accepts_is_not_sealed() {
    let base = tempfile::tempdir().unwrap();
    let writer = SnapshotWriter::create(dir(base.path(), "a"), small_layout(), SnapshotKind::Full, None).unwrap();
    let mut input = seal_input();
    // More than a manifest may have in bytes.
    input.host.kernel_release = "x".repeat(5 << 20);
    let sealed = writer.seal(input);
    assert!(matches!(sealed, Err(Error::Unreadable { .. })), "{sealed:?}");
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Container::parse(bytes.clone());
        let _ = Manifest::parse("x", &bytes);
        let mut headed = write_container(&sections());
        let at = headed.len().min(12 + bytes.len());
        headed[12..at].copy_from_slice(&bytes[..at - 12]);
        reseal(&mut headed);
        if let Ok(container) = Container::parse(headed) {
            container.sections().iter().for_each(|info| drop(container.payload(info).map(<[u8]>::len)));
        }
    }

    #[test]
    fn forged_fields_never_panic(edits in prop::collection::vec((12_usize..264, any::<u32>()), 1..6)) {
        let mut bytes = write_container(&sections());
        edits.iter().for_each(|(at, value)| put(&mut bytes, at & !3, &u32_le(*value)));
        reseal(&mut bytes);
        if let Ok(container) = Container::parse(bytes) {
            container.sections().iter().for_each(|info| drop(container.payload(info).map(<[u8]>::len)));
        }
    }
}
