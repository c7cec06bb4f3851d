//! Snapshots that are damaged, cut, mixed up, forged, or from another host: each is refused in one line that says what
//! is wrong with which file. Forged ones have every checksum and digest right.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tvmm::snapshot::{
    Container, Gfn, HostFacts, Location, PAGE_SIZE, SealInput, Section, SectionKind, Snapshot, SnapshotKind,
    SnapshotWriter,
};

use crate::support::artefact::NoCache;
use crate::support::{Vm, config, run, run_err, run_ok, scratch, text};

const HEADER: usize = 64;
const ENTRY: usize = 40;
const POLICIES: [&str; 2] = ["eager", "firecracker"];

/// A good full snapshot to be harmed.
struct Victim {
    dir: TempDir,
    /// Guest-physical address of the first page that the guest filled.
    filled_gpa: u64,
}

impl Victim {
    fn new() -> Victim {
        let dir = scratch();
        let mut vm = Vm::boot(&config(1, 32));
        let filled_gpa = vm.call("fill pages=64 seed=3").value("gpa").parse_number();
        vm.snapshot(&dir.path().join("full"), &[]);
        Victim { dir, filled_gpa }
    }

    /// The same with diffs `d1`, `d2` and `d3` on top.
    fn with_diffs() -> Victim {
        let dir = scratch();
        let mut vm = Vm::boot(&config(1, 32));
        let filled_gpa = vm.call("fill pages=64 seed=3").value("gpa").parse_number();
        vm.snapshot(&dir.path().join("full"), &[]);
        for name in ["d1", "d2", "d3"] {
            vm.call("touch pages=8 write=100");
            vm.snapshot(&dir.path().join(name), &["--diff"]);
        }
        Victim { dir, filled_gpa }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path("full").join(name)
    }

    /// Returns tvmm's refusal of the snapshot `name`, which is the same by every policy.
    fn refused(&self, name: &str) -> String {
        let snapshot = self.path(name);
        let say = |policy| run_err(&["restore", "--snapshot", text(&snapshot), "--policy", policy, "--run", "hello"]);
        let said = POLICIES.map(say);
        assert_eq!(said[0], said[1]);
        assert!(said[0].contains(text(self.dir.path())) || said[0].contains("ection "), "names no object: {}", said[0]);
        said[0].clone()
    }

    /// Replaces a file of the snapshot and returns tvmm's refusal. The file is good again afterwards.
    fn refused_with(&self, name: &str, bytes: &[u8]) -> String {
        let good = fs::read(self.file(name)).unwrap();
        fs::write(self.file(name), bytes).unwrap();
        let said = self.refused_for(name);
        fs::write(self.file(name), good).unwrap();
        said
    }

    /// Returns tvmm's refusal of the snapshot whose file `name` is bad. Not every policy reads the page map of a full
    /// snapshot: `firecracker` maps the memory file whole, as Firecracker does, and never looks.
    fn refused_for(&self, name: &str) -> String {
        if name != "pages" {
            return self.refused("full");
        }
        let snapshot = self.path("full");
        let said = run_err(&["restore", "--snapshot", text(&snapshot), "--policy", "eager", "--run", "hello"]);
        assert_eq!(run_err(&["inspect", text(&snapshot)]), said);
        said
    }

    fn open(&self) -> Snapshot {
        Snapshot::open(&Location::Dir(self.path("full"))).unwrap()
    }

    /// Writes a snapshot like the victim, but with this state and host: what a forger with our own library can do.
    fn forge(&self, name: &str, change: impl FnOnce(&mut Vec<Section>, &mut HostFacts)) {
        let good = self.open();
        let manifest = good.manifest();
        let mut state = good.copy_state().unwrap();
        let mut host = manifest.host.clone();
        change(&mut state, &mut host);
        let target = Location::Dir(self.path(name));
        let mut writer = SnapshotWriter::create(target, manifest.layout.clone(), SnapshotKind::Full, None).unwrap();
        for run in good.page_map().unwrap().held().runs() {
            let mut bytes = vec![0; run.bytes() as usize];
            good.memory().read_exact_at(&mut bytes, good.layout().file_offset(run.first).unwrap()).unwrap();
            writer.write_run(run.first, &bytes).unwrap();
        }
        writer.seal(SealInput { state, host, machine: manifest.machine.clone(), cache: &NoCache }).unwrap();
    }

    /// Returns tvmm's refusal of such a forgery.
    fn forged(&self, change: impl FnOnce(&mut Vec<Section>, &mut HostFacts)) -> String {
        self.forge("forged", change);
        let said = self.refused("forged");
        fs::remove_dir_all(self.path("forged")).unwrap();
        said
    }
}

trait ParseNumber {
    fn parse_number(&self) -> u64;
}

impl ParseNumber for str {
    fn parse_number(&self) -> u64 {
        let hexadecimal = self.strip_prefix("0x").map(|digits| u64::from_str_radix(digits, 16).unwrap());
        hexadecimal.unwrap_or_else(|| self.parse().unwrap())
    }
}

/// Makes a container's own checksums right again after its header or table was edited (docs/snapshot-format.md).
fn reseal(bytes: &mut [u8]) {
    let count = u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize;
    let table = crc32c::crc32c(&bytes[HEADER..HEADER + count * ENTRY]);
    bytes[48..52].copy_from_slice(&table.to_le_bytes());
    let header = crc32c::crc32c(&bytes[..60]);
    bytes[60..64].copy_from_slice(&header.to_le_bytes());
}

/// Offsets at which the parts of a container begin and end.
fn boundaries(bytes: &[u8]) -> Vec<usize> {
    let container = Container::parse(bytes.to_vec()).unwrap();
    let mut at = HEADER + ENTRY * container.sections().len();
    let mut all = vec![0, HEADER, at];
    for section in container.sections() {
        at += section.len() as usize;
        all.push(at);
    }
    assert_eq!(at, bytes.len());
    all
}

fn section(state: &mut [Section], kind: SectionKind) -> &mut Section {
    state.iter_mut().find(|section| section.kind == kind).unwrap()
}

fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
}

/// Pseudo-random bytes, the same in every run.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 32) as u8
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn forged_copy_without_a_change_restores() {
    let victim = Victim::new();
    victim.forge("forged", |_, _| {});
    for policy in POLICIES {
        run_ok(&["restore", "--snapshot", text(&victim.path("forged")), "--policy", policy, "--run", "hello"]);
    }
}

#[test]
fn snapshot_that_is_missing_is_refused() {
    let victim = Victim::new();
    assert!(victim.refused("nothing").contains("nothing"));
    fs::write(victim.path("file"), "").unwrap();
    victim.refused("file");
    fs::create_dir(victim.path("empty")).unwrap();
    assert!(victim.refused("empty").contains("is not sealed: it has no manifest.json"));
}

#[test]
fn snapshot_with_a_file_missing_is_refused_and_the_file_named() {
    let victim = Victim::new();
    for name in ["vmstate", "pages", "memory", "manifest.json"] {
        let aside = victim.path("aside");
        fs::rename(victim.file(name), &aside).unwrap();
        let said = victim.refused_for(name);
        assert!(said.contains(name), "{name}: {said}");
        fs::create_dir(victim.file(name)).unwrap();
        assert!(victim.refused_for(name).contains("is not a regular file"));
        fs::remove_dir(victim.file(name)).unwrap();
        fs::rename(aside, victim.file(name)).unwrap();
    }
}

#[test]
fn snapshot_cut_at_any_section_boundary_is_refused() {
    let victim = Victim::new();
    for name in ["vmstate", "pages"] {
        let good = fs::read(victim.file(name)).unwrap();
        let ends = boundaries(&good);
        for end in ends.iter().flat_map(|&end| [end, end + 1, end.saturating_sub(1)]).filter(|&end| end < good.len()) {
            let said = victim.refused_with(name, &good[..end]);
            assert!(said.contains(name) && said.contains("truncated"), "{name} cut at {end}: {said}");
        }
        let said = victim.refused_with(name, &[&good[..], b"x"].concat());
        assert!(said.contains("1 bytes follow its end"), "{said}");
    }
}

#[test]
fn snapshot_with_any_header_or_table_byte_flipped_is_refused() {
    let victim = Victim::new();
    for name in ["vmstate", "pages"] {
        let good = fs::read(victim.file(name)).unwrap();
        let table_end = boundaries(&good)[2];
        for at in (0..table_end).step_by(3) {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            let said = victim.refused_with(name, &bytes);
            assert!(said.contains(name), "byte {at} of {name}: {said}");
        }
    }
}

#[test]
fn snapshot_with_a_byte_flipped_in_any_section_is_refused() {
    let victim = Victim::new();
    for name in ["vmstate", "pages"] {
        let good = fs::read(victim.file(name)).unwrap();
        let ends = boundaries(&good)[2..].to_vec();
        for pair in ends.windows(2).filter(|pair| pair[0] < pair[1]) {
            for at in [pair[0], (pair[0] + pair[1]) / 2, pair[1] - 1] {
                let mut bytes = good.clone();
                bytes[at] ^= 0x10;
                let said = victim.refused_with(name, &bytes);
                assert!(said.contains("is damaged: its section"), "byte {at} of {name}: {said}");
            }
        }
    }
}

#[test]
fn full_snapshot_with_a_bad_page_map_restores_by_firecracker_only_unverified() {
    let victim = Victim::new();
    flip(&victim.file("pages"), 100);
    let snapshot = victim.path("full");
    let restore = ["restore", "--snapshot", text(&snapshot), "--policy", "firecracker", "--run", "check"];
    let said = run_err(&restore);
    assert!(said.contains("is damaged: its section"), "{said}");
    run_ok(&[&restore[..], &["--verify", "off"]].concat());
}

#[test]
fn snapshot_with_a_changed_manifest_is_refused() {
    let victim = Victim::new();
    let good = fs::read(victim.file("manifest.json")).unwrap();
    for at in (0..good.len()).step_by(17).filter(|&at| !good[at].is_ascii_whitespace()) {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        victim.refused_with("manifest.json", &bytes);
    }
    for bytes in [&b""[..], b"{}", b"null", &good[..good.len() / 2], &vec![b'['; 1 << 20]] {
        let said = victim.refused_with("manifest.json", bytes);
        assert!(said.contains("manifest of "), "{said}");
    }
}

#[test]
fn snapshot_of_a_future_version_is_refused_and_the_version_named() {
    let victim = Victim::new();
    let mut vmstate = fs::read(victim.file("vmstate")).unwrap();
    vmstate[8] = 2;
    vmstate[32..48].copy_from_slice(b"7.1.0\0\0\0\0\0\0\0\0\0\0\0");
    reseal(&mut vmstate);
    let said = victim.refused_with("vmstate", &vmstate);
    assert!(said.contains("was written by tvmm 7.1.0 in format 2.0, this build reads 1.x"), "{said}");

    let manifest = fs::read_to_string(victim.file("manifest.json")).unwrap();
    let future = manifest.replacen("\"format\": 1", "\"format\": 2, \"colour\": \"red\"", 1);
    let said = victim.refused_with("manifest.json", future.as_bytes());
    assert!(said.contains("in format 2, this build reads 1"), "{said}");

    let said = victim.forged(|state, _| section(state, SectionKind::Vcpu).version = 2);
    assert!(said.contains("Vcpu 0") && said.contains("it has version 2, this build reads version 1"), "{said}");
}

#[test]
fn lengths_and_counts_beyond_the_file_are_refused_before_anything_is_allocated() {
    let victim = Victim::new();
    let huge = (100_u64 << 30).to_le_bytes();
    for name in ["vmstate", "pages"] {
        let good = fs::read(victim.file(name)).unwrap();
        for (at, value) in [(24, &huge[..]), (HEADER + 24, &huge[..]), (HEADER + ENTRY + 16, &huge[..])] {
            let mut bytes = good.clone();
            bytes[at..at + value.len()].copy_from_slice(value);
            reseal(&mut bytes);
            let said = victim.refused_with(name, &bytes);
            assert!(said.contains("107374182400"), "{said}");
        }
        let mut bytes = good.clone();
        bytes[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        let header = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&header.to_le_bytes());
        assert!(victim.refused_with(name, &bytes).contains("claims 4294967295 sections"));
        // A hole of 1 TiB behind the last byte.
        fs::OpenOptions::new().write(true).open(victim.file(name)).unwrap().set_len(1 << 40).unwrap();
        assert!(victim.refused_for(name).contains("more than the limit"));
        fs::write(victim.file(name), good).unwrap();
    }
}

#[test]
fn snapshot_whose_memory_has_another_length_is_refused() {
    let victim = Victim::new();
    let memory = fs::OpenOptions::new().write(true).open(victim.file("memory")).unwrap();
    for length in [0, PAGE_SIZE, (32 << 20) - 1] {
        memory.set_len(length).unwrap();
        let said = victim.refused("full");
        assert!(said.contains("memory is truncated"), "{said}");
    }
    memory.set_len((32 << 20) + PAGE_SIZE).unwrap();
    assert!(victim.refused("full").contains("memory is malformed"));
}

#[test]
fn flipped_byte_of_memory_is_refused_by_eager_and_found_by_inspect_with_its_address() {
    let victim = Victim::new();
    let gpa = victim.filled_gpa + 5 * PAGE_SIZE;
    let snapshot = victim.path("full");
    let offset = victim.open().layout().file_offset(Gfn::containing(gpa)).unwrap();
    run_ok(&["inspect", text(&snapshot)]);
    flip(&victim.file("memory"), offset + 100);

    let eager = run_err(&["restore", "--snapshot", text(&snapshot), "--policy", "eager", "--run", "hello"]);
    let inspected = run_err(&["inspect", text(&snapshot)]);
    for said in [&eager, &inspected] {
        let address = said.split("guest-physical ").nth(1).unwrap_or_else(|| panic!("no address: {said}"));
        let address: String = address.chars().take_while(char::is_ascii_alphanumeric).collect();
        let first = address.parse_number();
        assert!(first <= gpa && gpa < first + 16 * PAGE_SIZE, "{gpa:#x} is not in the chunk at {first:#x}: {said}");
    }
    let output = run(&["inspect", "--json", text(&snapshot)]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["memory"]["chunks_bad"], 1);
    assert_eq!(output.status.code(), Some(1));

    // Lazy mapping does not check pages that the guest does not touch.
    let lazy = ["restore", "--snapshot", text(&snapshot), "--policy", "firecracker", "--verify", "off"];
    run_ok(&[&lazy[..], &["--run", "hello"]].concat());
    // And damage never gets a fresh checksum.
    let merged = victim.path("merged");
    run_err(&["snapshot", "merge", text(&snapshot), "--out", text(&merged)]);
    assert!(!merged.exists());
}

#[test]
fn directory_in_progress_is_refused() {
    let victim = Victim::new();
    let layout = victim.open().layout().clone();
    let target = Location::Dir(victim.path("next"));
    let mut writer = SnapshotWriter::create(target, layout, SnapshotKind::Full, None).unwrap();
    writer.write_run(Gfn(0), &[1; PAGE_SIZE as usize]).unwrap();
    let names = fs::read_dir(victim.dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let partial = names.map(|name| name.into_string().unwrap()).find(|name| name.ends_with(".partial")).unwrap();
    assert!(victim.refused(&partial).contains("is not sealed"));
    drop(writer);
    assert!(!victim.path(&partial).exists());
}

#[test]
fn parent_that_is_another_snapshot_is_refused() {
    let victim = Victim::with_diffs();
    run_ok(&["restore", "--snapshot", text(&victim.path("d3")), "--run", "hello"]);
    fs::rename(victim.path("d1"), victim.path("aside")).unwrap();
    fs::rename(victim.path("d2"), victim.path("d1")).unwrap();
    fs::rename(victim.path("aside"), victim.path("d2")).unwrap();
    let said = victim.refused("d3");
    assert!(said.contains("needs parent ") && said.contains("d2"), "{said}");
}

#[test]
fn parent_that_is_missing_is_refused_and_the_diff_can_still_be_inspected() {
    let victim = Victim::with_diffs();
    fs::rename(victim.path("d1"), victim.path("aside")).unwrap();
    let said = victim.refused("d3");
    assert!(said.contains("The parent of") && said.contains("d1"), "{said}");
    let output = run(&["inspect", text(&victim.path("d2"))]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("kind       Diff"), "the diff itself is shown");
}

#[test]
fn parents_that_lead_back_to_the_child_are_refused() {
    let victim = Victim::with_diffs();
    // The location is not part of the identity: a user may point it elsewhere.
    for (from, to) in [("../full", "../d2"), ("../d2", "."), (".", "../d1"), ("../d1", "/dev")] {
        let path = victim.path("d1").join("manifest.json");
        let json = fs::read_to_string(&path).unwrap();
        let edited = json.replace(&format!("\"dir\": \"{from}\""), &format!("\"dir\": \"{to}\""));
        assert_ne!(json, edited);
        fs::write(&path, edited).unwrap();
        let said = victim.refused("d2");
        assert!(said.contains("arent"), "{said}");
    }
}

#[test]
fn section_this_build_does_not_know_is_refused() {
    let victim = Victim::new();
    for (kind, instance) in [(SectionKind::Other(1000), 0), (SectionKind::Serial, 1), (SectionKind::Vcpu, 1)] {
        let said = victim.forged(|state, _| {
            state.push(Section { kind, instance, version: 1, payload: b"a device of tomorrow".to_vec() });
        });
        assert!(said.contains("this build of tvmm does not know it"), "{said}");
        assert!(said.contains(&format!("{kind:?} {instance}")), "{said}");
    }
}

#[test]
fn section_that_is_missing_is_refused() {
    let victim = Victim::new();
    let kinds = [SectionKind::Machine, SectionKind::Vcpu, SectionKind::Vm, SectionKind::Serial, SectionKind::I8042];
    for kind in kinds {
        let said = victim.forged(|state, _| state.retain(|section| section.kind != kind));
        assert!(said.contains(&format!("has no section {} instance 0", kind.number())), "{said}");
    }
}

#[test]
fn machine_with_impossible_vcpus_or_memory_is_refused() {
    let victim = Victim::new();
    // postcard: the vCPU count is one byte, the memory in MiB a varint.
    for count in [0, 33, 200] {
        let said = victim.forged(|state, _| section(state, SectionKind::Machine).payload[0] = count);
        assert!(said.contains("Machine") && said.contains(&format!("it has {count} vCPUs")), "{said}");
    }
    let said = victim.forged(|state, _| section(state, SectionKind::Machine).payload[0] = 2);
    assert!(said.contains("has no section 3 instance 1"), "{said}");
    // The last is 32 + 2^44: in bytes it is 32 MiB again when the high bits are lost.
    for mib in [
        &[0][..],
        &[33],
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
        &[0xa0, 0x80, 0x80, 0x80, 0x80, 0x80, 4],
    ] {
        let said = victim.forged(|state, _| section(state, SectionKind::Machine).payload = [&[1], mib].concat());
        assert!(said.contains("Section Machine") && said.contains("do not fit the manifest's layout"), "{said}");
    }
}

#[test]
fn state_of_random_bytes_is_refused() {
    let victim = Victim::new();
    let kinds = [SectionKind::Machine, SectionKind::Vcpu, SectionKind::Vm, SectionKind::Serial, SectionKind::I8042];
    for kind in kinds {
        for (seed, length) in [(1, 1), (2, 100), (3, 5000), (4, 100_000)] {
            let said = victim.forged(|state, _| section(state, kind).payload = noise(seed, length));
            assert!(said.contains(&format!("Section {kind:?} 0")) || kind == SectionKind::Machine, "{said}");
        }
        if kind != SectionKind::I8042 {
            victim.forged(|state, _| section(state, kind).payload.clear());
        }
        victim.forged(|state, _| section(state, kind).payload.push(0));
    }
}

/// Registers that no guest has are the guest's own trouble, or KVM refuses them; the VMM survives both.
#[test]
fn vcpu_with_damaged_registers_never_panics_tvmm() {
    let victim = Victim::new();
    for seed in 0..24_u64 {
        victim.forge("forged", |state, _| {
            let kind = if seed % 4 == 0 { SectionKind::Vm } else { SectionKind::Vcpu };
            let payload = &mut section(state, kind).payload;
            let at = noise(seed, 8).iter().fold(0, |at, &byte| at << 8 | usize::from(byte)) % (payload.len() - 40);
            payload[at..at + 40].copy_from_slice(&noise(seed + 100, 40));
        });
        let forged = victim.path("forged");
        let output = run(&["restore", "--snapshot", text(&forged), "--run", "hello", "--run-timeout", "1"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(0 | 1)), "seed {seed}: {:?}\n{stderr}", output.status);
        assert!(!stderr.contains("panicked") && stderr.lines().count() <= 1, "seed {seed}: {stderr}");
        fs::remove_dir_all(forged).unwrap();
    }
}

/// The guest's CPUID table in a Vcpu payload is KVM's `kvm_cpuid_entry2` array: function, index, flags, eax, ebx, ecx,
/// edx and padding, 40 bytes per leaf.
fn set_cpuid_ebx(payload: &mut [u8], leaf: u32, value: u32) {
    let head = [leaf.to_le_bytes(), 0_u32.to_le_bytes()].concat();
    let flags = 1_u32.to_le_bytes();
    let at = payload.windows(12).position(|bytes| bytes[..8] == head[..] && bytes[8..] == flags).unwrap();
    payload[at + 16..at + 20].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn host_that_lacks_what_the_guest_has_seen_is_refused_with_all_differences() {
    let victim = Victim::new();
    let said = victim.forged_host(|state, host| {
        host.cpu_vendor = "GenuineTest".to_string();
        host.features.iter_mut().for_each(|word| word.value = u32::MAX);
        set_cpuid_ebx(&mut section(state, SectionKind::Vcpu).payload, 7, u32::MAX);
    });
    assert!(said.contains("This host cannot run the snapshot: "), "{said}");
    assert!(said.contains("the snapshot was taken on GenuineTest; "), "{said}");
    assert!(said.contains("CPUID leaf 0x7.0 ebx lacks the bits 0x"), "{said}");
}

#[test]
fn features_of_the_other_host_that_the_guest_never_saw_do_not_matter() {
    let victim = Victim::new();
    victim.forge("forged", |_, host| {
        host.cpu_model = "another".to_string();
        host.kernel_release = "99.0".to_string();
        host.xcr0 = u64::MAX;
        host.kvm_capabilities.push(("of-tomorrow".to_string(), 1));
    });
    run_ok(&["restore", "--snapshot", text(&victim.path("forged")), "--run", "hello"]);
}

impl Victim {
    /// As `forged`; the refusal is about the host, so no file is named.
    fn forged_host(&self, change: impl FnOnce(&mut Vec<Section>, &mut HostFacts)) -> String {
        self.forge("forged", change);
        run_err(&["restore", "--snapshot", text(&self.path("forged")), "--run", "hello"])
    }
}
