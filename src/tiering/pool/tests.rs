//! Pools on a fake medium that loses unflushed writes in a crash.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;

use super::add::Added;
use super::catalogue::Catalogue;
use super::format::{LEASE_LEN, LEASES, WRITER};
use super::fsck;
use super::lease::{self, EXPIRY_S, Held};
use super::writer::{self, Writer};
use super::{Error, Facts, Medium, PoolTier};
use crate::snapshot::{
    Chain, Digest, Gfn, HostFacts, LoadHuge, Location, MachineFacts, MemoryLayout, PAGE_SIZE, PoolId, SealInput,
    SnapshotKind, SnapshotWriter,
};
use crate::tiering::costs::Costs;
use crate::tiering::tier::Tier;

const LEN: usize = 16 << 20;

#[derive(Debug)]
struct Memory {
    /// The bytes as processes see them.
    now: Vec<u8>,
    /// The bytes as they are after a crash.
    durable: Vec<u8>,
    /// Writes since the last flush.
    pending: Vec<(usize, Vec<u8>)>,
    /// Writes until the power fails; `None`: it does not.
    left: Option<usize>,
    /// The next write at this offset stops for so long before it is done.
    stop: Option<(u64, Duration)>,
}

#[derive(Debug)]
struct FakeMedium {
    file: File,
    memory: Arc<Mutex<Memory>>,
    shared: bool,
    read_only: bool,
    len: usize,
}

impl FakeMedium {
    fn new() -> FakeMedium {
        let memory = Memory { now: vec![0; LEN], durable: vec![0; LEN], pending: Vec::new(), left: None, stop: None };
        FakeMedium {
            file: tempfile::tempfile().unwrap(),
            memory: Arc::new(Mutex::new(memory)),
            shared: false,
            read_only: false,
            len: LEN,
        }
    }

    fn formatted() -> FakeMedium {
        let medium = FakeMedium::new();
        writer::create(&medium, PoolId([7; 32]), None, "fake").unwrap();
        medium
    }

    /// The handles of two hosts on a medium that they share.
    fn of_two_hosts() -> [Arc<FakeMedium>; 2] {
        let one = FakeMedium { shared: true, ..FakeMedium::formatted() };
        let other = one.of_host(LEN);
        [one, other].map(Arc::new)
    }

    /// The first `len` bytes as another host has them.
    fn of_host(&self, len: usize) -> FakeMedium {
        FakeMedium {
            file: tempfile::tempfile().unwrap(),
            memory: self.memory.clone(),
            shared: true,
            read_only: false,
            len,
        }
    }

    /// The next write at `offset` stops for so long.
    fn stop_at(&self, offset: u64, time: Duration) {
        self.memory.lock().unwrap().stop = Some((offset, time));
    }

    fn fail_after(&self, writes: usize) {
        self.memory.lock().unwrap().left = Some(writes);
    }

    /// The power fails: of each unflushed write all, a part, or nothing is kept.
    fn crash(&self, fates: &[u16]) {
        let mut memory = self.memory.lock().unwrap();
        let pending = std::mem::take(&mut memory.pending);
        for ((at, bytes), fate) in pending.into_iter().zip(fates.iter().cycle()) {
            let len = bytes.len() * usize::from(*fate % 5) / 4;
            memory.durable[at..at + len].copy_from_slice(&bytes[..len]);
        }
        memory.now = memory.durable.clone();
        memory.left = None;
    }

    fn flip(&self, at: u64) {
        self.memory.lock().unwrap().now[at as usize] ^= 4;
    }
}

impl Medium for FakeMedium {
    fn path(&self) -> &Path {
        Path::new("fake")
    }

    fn facts(&self) -> Facts {
        let kind = "dir";
        let align = 4096;
        let shared_between_hosts = self.shared;
        Facts { kind, align, copy_on_write: true, huge: true, readable: true, shared_between_hosts }
    }

    fn size(&self) -> u64 {
        self.len as u64
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let memory = self.memory.lock().unwrap();
        let from = memory.now.get(offset as usize..offset as usize + bytes.len());
        bytes.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let stop = self.memory.lock().unwrap().stop.take_if(|(at, _)| *at == offset);
        if let Some((_, time)) = stop {
            std::thread::sleep(time);
        }
        let mut memory = self.memory.lock().unwrap();
        match &mut memory.left {
            Some(0) => return Err(io::ErrorKind::Other.into()),
            Some(left) => *left -= 1,
            None => {}
        }
        let offset = offset as usize;
        memory.now[offset..offset + bytes.len()].copy_from_slice(bytes);
        memory.pending.push((offset, bytes.to_vec()));
        Ok(())
    }

    fn flush(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut memory = self.memory.lock().unwrap();
        let start = offset as usize;
        let end = (offset + len) as usize;
        let pending = std::mem::take(&mut memory.pending);
        for (at, bytes) in pending {
            if at < end && start < at + bytes.len() {
                memory.durable[at..at + bytes.len()].copy_from_slice(&bytes);
            } else {
                memory.pending.push((at, bytes));
            }
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write(offset, &vec![0; len as usize])
    }

    fn try_lock(&self, _: u64) -> io::Result<bool> {
        Ok(true)
    }

    fn is_writable(&self) -> bool {
        !self.read_only
    }

    fn try_lock_shared(&self, _: u64) -> io::Result<bool> {
        Ok(true)
    }

    fn locked_in(&self, _: &std::ops::Range<u64>) -> io::Result<Option<u64>> {
        Ok(None)
    }

    fn unlock(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn is_locked(&self, _: u64) -> io::Result<bool> {
        Ok(false)
    }
}

struct NoCache;

impl LoadHuge for NoCache {
    fn load_huge(&self, _: &File, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// A snapshot of 640 pages; each `(first, pages, seed)` fills a run with pages that differ.
fn snapshot(dir: &Path, name: &str, runs: &[(u64, u64, u64)]) -> Chain {
    let layout = MemoryLayout::from_gpa_ranges(&[(0, 640 * PAGE_SIZE)]).unwrap();
    let location = Location::Dir(dir.join(name));
    let mut writer = SnapshotWriter::create(location.clone(), layout, SnapshotKind::Full, None).unwrap();
    for &(first, pages, seed) in runs {
        writer.write_run(Gfn(first), &bytes_of(first, pages, seed)).unwrap();
    }
    let machine = MachineFacts { vcpu_count: 1, mem_size_mib: 3 };
    writer.seal(SealInput { state: Vec::new(), host: HostFacts::default(), machine, cache: &NoCache }).unwrap();
    Chain::open(&location).unwrap()
}

fn bytes_of(first: u64, pages: u64, seed: u64) -> Vec<u8> {
    let page = |gfn: u64| [gfn + 1, seed].into_iter().flat_map(u64::to_le_bytes).cycle().take(PAGE_SIZE as usize);
    (first..first + pages).flat_map(page).collect()
}

fn add(medium: &FakeMedium, chain: &Chain, name: &str) -> Result<super::catalogue::Stats, crate::tiering::Error> {
    let costs = Costs::default();
    let added = Added { chain, name, profile: None, costs: &costs, restores: 1000 };
    Ok(Writer::open(medium)?.add(&added, &mut |_, _| {})?.stats)
}

/// All of guest memory as the pool has it.
fn content(medium: &Arc<FakeMedium>, chain: &Chain) -> Vec<u8> {
    let tier = PoolTier::open(medium.clone(), chain.tip().id(), None).unwrap();
    let mut memory = vec![0; 640 * PAGE_SIZE as usize];
    for run in tier.runs().unwrap() {
        let at = run.extent.gpa() as usize;
        tier.read(run.offset, &mut memory[at..at + run.extent.bytes() as usize]).unwrap();
    }
    memory
}

fn wanted(runs: &[(u64, u64, u64)]) -> Vec<u8> {
    let mut memory = vec![0; 640 * PAGE_SIZE as usize];
    for &(first, pages, seed) in runs {
        let at = (first * PAGE_SIZE) as usize;
        memory[at..at + (pages * PAGE_SIZE) as usize].copy_from_slice(&bytes_of(first, pages, seed));
    }
    memory
}

const BASE: &[(u64, u64, u64)] = &[(100, 500, 1)];
const CHILD: &[(u64, u64, u64)] = &[(100, 300, 1), (400, 80, 2), (480, 120, 1), (620, 20, 3)];

#[test]
fn snapshots_share_common_pages_and_read_back_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let base = snapshot(dir.path(), "base", BASE);
    let child = snapshot(dir.path(), "child", CHILD);
    let medium = Arc::new(FakeMedium::formatted());
    let first = add(&medium, &base, "base").unwrap();
    assert_eq!((first.nonzero, first.shared, first.runs), (500, 0, 1));
    let second = add(&medium, &child, "child").unwrap();
    assert_eq!((second.nonzero, second.shared, second.again), (520, 420, 0));
    assert!(content(&medium, &base) == wanted(BASE) && content(&medium, &child) == wanted(CHILD));
    let again = add(&medium, &child, "child").unwrap_err().to_string();
    assert!(again.contains("already"), "{again}");
    let found = fsck::check(medium.as_ref(), &mut |_, _| {}).unwrap();
    assert!(found.is_good() && found.both_states, "{found:?}");
    assert_eq!((found.snapshots, found.pages), (2, 600));
}

#[test]
fn pages_of_a_removed_snapshot_are_freed_once_unused() {
    let dir = tempfile::tempdir().unwrap();
    let base = snapshot(dir.path(), "base", BASE);
    let child = snapshot(dir.path(), "child", CHILD);
    let medium = Arc::new(FakeMedium::formatted());
    add(&medium, &base, "base").unwrap();
    add(&medium, &child, "child").unwrap();
    let tier = PoolTier::open(medium.clone(), base.tip().id(), Some(Box::new(|_| {}))).unwrap();
    Writer::open(medium.as_ref()).unwrap().remove("base").unwrap();
    let gone = PoolTier::open(medium.clone(), base.tip().id(), Some(Box::new(|_| {}))).unwrap_err();
    assert!(matches!(gone, Error::NoSnapshot { .. }), "{gone}");
    let held = Writer::open(medium.as_ref()).unwrap().collect(None).unwrap();
    assert_eq!((held.held, held.pages), (1, 0));
    let mut page = vec![0; PAGE_SIZE as usize];
    tier.read(tier.runs().unwrap()[0].offset, &mut page).unwrap();
    drop(tier);
    let freed = Writer::open(medium.as_ref()).unwrap().collect(None).unwrap();
    // The child shares the rest.
    assert_eq!((freed.snapshots, freed.pages), (1, 80));
    assert!(content(&medium, &child) == wanted(CHILD));
    assert!(fsck::check(medium.as_ref(), &mut |_, _| {}).unwrap().is_good());
}

/// A lease of a snapshot that need not exist.
fn hold(medium: &Arc<FakeMedium>) -> Held {
    let medium: Arc<dyn Medium> = medium.clone();
    Held::take(&medium, Default::default(), Digest::default()).unwrap()
}

fn lasting(medium: &FakeMedium, expiry_s: u64) -> usize {
    lease::abandon(medium, expiry_s, &mut || Ok(())).unwrap().len()
}

#[test]
fn a_lease_of_another_host_is_ended_when_it_is_old_and_silent() {
    let [one, other] = FakeMedium::of_two_hosts();
    let own = hold(&one);
    let others = hold(&other);
    assert_eq!(lease::live(one.as_ref(), EXPIRY_S).unwrap().len(), 2);
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(lease::live(one.as_ref(), 0).unwrap().len(), 1, "its own does not age");
    // A clock that differs makes the lease look old, but its heart beats.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(1500));
            others.beat().unwrap();
        });
        assert_eq!(lasting(&one, 0), 2);
    });
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(lasting(&one, 0), 1);
    let lost = others.beat().unwrap_err();
    assert!(matches!(lost, Error::LeaseLost { .. }), "{lost}");
    own.beat().unwrap();
    drop(others);
    assert_eq!(lease::live(one.as_ref(), EXPIRY_S).unwrap().len(), 1);
}

#[test]
fn a_lost_lease_does_not_clear_the_slot_of_its_new_holder() {
    let [one, other] = FakeMedium::of_two_hosts();
    let lost = hold(&one);
    let slot = lease::live(one.as_ref(), EXPIRY_S).unwrap()[0].0;
    one.write(LEASES, &vec![0; (2048 * LEASE_LEN) as usize]).unwrap();
    let taken = hold(&other);
    let now = lease::live(other.as_ref(), EXPIRY_S).unwrap()[0].0;
    let mut bytes = [0; LEASE_LEN as usize];
    other.read(LEASES + now * LEASE_LEN, &mut bytes).unwrap();
    one.write(LEASES + slot * LEASE_LEN, &bytes).unwrap();
    drop(lost);
    let left: Vec<u64> = lease::live(other.as_ref(), EXPIRY_S).unwrap().iter().map(|(slot, _)| *slot).collect();
    assert!(left.contains(&slot) && left.contains(&now), "{left:?}");
    drop(taken);
}

#[test]
fn of_two_hosts_one_writes() {
    let dir = tempfile::tempdir().unwrap();
    let base = snapshot(dir.path(), "base", BASE);
    let [one, other] = FakeMedium::of_two_hosts();
    add(&one, &base, "base").unwrap();
    let mut writer = Writer::open(one.as_ref()).unwrap();
    let busy = Writer::open(other.as_ref()).err().unwrap();
    assert!(matches!(busy, Error::Busy { .. }), "{busy}");
    // As if the writer had been silent for long, and the other host had watched it.
    other.write(WRITER, &[0; 64]).unwrap();
    let mut taken = Writer::open(other.as_ref()).unwrap();
    let ousted = writer.remove("base").unwrap_err();
    assert!(matches!(ousted, Error::Ousted { .. }), "{ousted}");
    drop(writer);
    taken.remove("base").unwrap();
    let still = Writer::open(one.as_ref()).err().unwrap();
    assert!(matches!(still, Error::Busy { .. }), "who was ousted has ended the other's right: {still}");
    drop(taken);
    assert_eq!(Writer::open(one.as_ref()).unwrap().collect(None).unwrap().snapshots, 1);
}

#[test]
fn a_pool_that_vms_of_another_host_run_from_is_not_formatted() {
    let [one, other] = FakeMedium::of_two_hosts();
    let held = hold(&other);
    let refused = writer::create(one.as_ref(), PoolId([8; 32]), Some("fake"), "fake").unwrap_err();
    assert!(matches!(refused, Error::InUse { vms: 1, .. }), "{refused}");
    drop(held);
    writer::create(one.as_ref(), PoolId([8; 32]), Some("fake"), "fake").unwrap();
}

/// The offset of the only lease.
fn only_slot(medium: &FakeMedium) -> u64 {
    LEASES + lease::live(medium, EXPIRY_S).unwrap()[0].0 * LEASE_LEN
}

#[test]
fn leases_count_with_any_size_and_any_superblocks() {
    let [one, other] = FakeMedium::of_two_hosts();
    let held = hold(&other);
    let format = |medium: &FakeMedium| writer::create(medium, PoolId([8; 32]), Some("fake"), "fake").unwrap_err();
    assert!(matches!(format(&one.of_host(12 << 20)), Error::InUse { vms: 1, .. }), "a smaller one");
    one.memory.lock().unwrap().now[8] = 99;
    assert!(matches!(format(&one), Error::InUse { vms: 1, .. }), "a newer one");
    one.flip(30);
    one.flip(4096 + 30);
    assert!(matches!(format(&one), Error::InUse { vms: 1, .. }), "a damaged one");
    held.beat().unwrap();
}

#[test]
fn a_torn_lease_is_watched_and_a_pool_in_use_is_put_back() {
    let [one, other] = FakeMedium::of_two_hosts();
    let held = hold(&other);
    let slot = only_slot(&one);
    one.flip(slot);
    std::thread::scope(|scope| {
        let format = scope.spawn(|| writer::create(one.as_ref(), PoolId([8; 32]), Some("fake"), "fake"));
        std::thread::sleep(Duration::from_millis(1500));
        // No VM starts meanwhile.
        let start = PoolTier::open(other.clone(), Default::default(), Some(Box::new(|_| {}))).unwrap_err();
        assert!(matches!(start, Error::NotAPool { .. }), "{start}");
        one.flip(slot);
        let refused = format.join().unwrap().unwrap_err();
        assert!(matches!(refused, Error::InUse { vms: 1, .. }), "{refused}");
    });
    assert_eq!(Catalogue::read(other.as_ref()).unwrap().superblock.id, PoolId([7; 32]));
    held.beat().unwrap();
    one.flip(slot);
    assert_eq!(lasting(&one, EXPIRY_S), 0);
    let mut bytes = [1; LEASE_LEN as usize];
    one.read(slot, &mut bytes).unwrap();
    assert_eq!(bytes, [0; LEASE_LEN as usize], "what stays torn is wiped");
}

#[test]
fn a_holder_that_stood_still_has_lost_a_lease_wiped_meanwhile() {
    let [one, other] = FakeMedium::of_two_hosts();
    let held = hold(&one);
    std::thread::sleep(Duration::from_millis(1100));
    one.stop_at(only_slot(&other), Duration::from_secs(6));
    std::thread::scope(|scope| {
        let beaten = scope.spawn(|| held.beat());
        std::thread::sleep(Duration::from_millis(1100));
        assert_eq!(lasting(&other, 0), 0);
        let lost = beaten.join().unwrap().unwrap_err();
        assert!(matches!(lost, Error::LeaseLost { .. }), "{lost}");
    });
}

#[test]
fn of_two_hosts_that_take_one_lease_the_first_takes_another() {
    let [one, other] = FakeMedium::of_two_hosts();
    let first = hold(&one);
    let slot = only_slot(&one);
    let second = hold(&other);
    let all = lease::live(&*one, EXPIRY_S).unwrap();
    let seconds = all.iter().map(|(slot, _)| LEASES + slot * LEASE_LEN).find(|at| *at != slot).unwrap();
    let mut bytes = [0; LEASE_LEN as usize];
    let over = |bytes: &mut [u8]| {
        other.read(seconds, bytes).unwrap();
        other.write(slot, bytes).unwrap();
    };
    over(&mut bytes);
    assert!(!first.settle(&|| Ok(true)).unwrap());
    assert_eq!(lease::live(one.as_ref(), EXPIRY_S).unwrap().len(), 3);
    std::thread::sleep(Duration::from_millis(250));
    assert!(first.settle(&|| Ok(false)).unwrap(), "it is not asked: nothing was lost");
    first.beat().unwrap();
    second.beat().unwrap();
    // If the pages may have been freed before another lease stood, the lease is lost.
    let late = hold(&one);
    let is_known = |at: &u64| [slot, seconds].contains(at);
    let before: Vec<u64> = lease::live(&*one, EXPIRY_S).unwrap().iter().map(|(slot, _)| *slot).collect();
    for at in before.iter().map(|slot| LEASES + slot * LEASE_LEN).filter(|at| !is_known(at)) {
        other.read(seconds, &mut bytes).unwrap();
        other.write(at, &bytes).unwrap();
    }
    let lost = late.settle(&|| Ok(false)).unwrap_err();
    assert!(matches!(lost, Error::LeaseLost { .. }), "{lost}");
}

#[test]
fn a_writer_that_was_ousted_writes_no_page() {
    let dir = tempfile::tempdir().unwrap();
    let base = snapshot(dir.path(), "base", BASE);
    let [one, other] = FakeMedium::of_two_hosts();
    let costs = Costs::default();
    let added = Added { chain: &base, name: "base", profile: None, costs: &costs, restores: 1000 };
    let mut writer = Writer::open(one.as_ref()).unwrap();
    let before = one.memory.lock().unwrap().now[2 << 20..].to_vec();
    // Ousted after all pages were read, and before anything was written.
    let ousted = writer.add(&added, &mut |done, all| {
        if done * 2 >= all {
            other.write(WRITER, &[0; 64]).unwrap();
        }
    });
    assert!(ousted.unwrap_err().to_string().contains("was taken over"));
    assert!(one.memory.lock().unwrap().now[2 << 20..] == before);
}

#[test]
fn a_writer_that_stops_before_it_publishes_says_that_it_may_have_come_too_late() {
    let dir = tempfile::tempdir().unwrap();
    let base = snapshot(dir.path(), "base", BASE);
    let [one, _] = FakeMedium::of_two_hosts();
    add(&one, &base, "base").unwrap();
    let mut writer = Writer::open(one.as_ref()).unwrap();
    // The offset of the next superblock.
    let slot = writer.catalogue().superblock.generation % 2;
    one.stop_at(slot * 4096, Duration::from_millis(3500));
    let late = writer.remove("base").unwrap_err();
    assert!(matches!(late, Error::StoodStill { .. }), "{late}");
}

#[test]
fn a_torn_record_of_a_writer_has_an_owner() {
    let [one, other] = FakeMedium::of_two_hosts();
    let writer = Writer::open(one.as_ref()).unwrap();
    one.flip(WRITER + 20);
    std::thread::scope(|scope| {
        let taken = scope.spawn(|| Writer::open(other.as_ref()).map(|_| ()));
        std::thread::sleep(Duration::from_millis(1000));
        one.flip(WRITER + 20);
        let busy = taken.join().unwrap().unwrap_err();
        assert!(matches!(busy, Error::Busy { .. }), "{busy}");
    });
    one.flip(WRITER + 20);
    drop(writer);
    // A record that stays torn is given up after a while.
    Writer::open(other.as_ref()).unwrap();
}

#[test]
fn a_writer_that_is_slow_to_write_its_record_starts_again() {
    let [one, other] = FakeMedium::of_two_hosts();
    one.stop_at(WRITER, Duration::from_millis(600));
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| Writer::open(one.as_ref()));
        std::thread::sleep(Duration::from_millis(100));
        let mut quick = Writer::open(other.as_ref()).unwrap();
        let _slow = slow.join().unwrap().unwrap();
        let ousted = quick.publish(Vec::new(), &[]).unwrap_err();
        assert!(matches!(ousted, Error::Ousted { .. }), "{ousted}");
    });
}

#[test]
fn a_full_pool_is_as_it_was_before() {
    let dir = tempfile::tempdir().unwrap();
    let medium = Arc::new(FakeMedium::formatted());
    let mut kept = Vec::new();
    let full = loop {
        let seed = kept.len() as u64 + 1;
        let chain = snapshot(dir.path(), &format!("s{seed}"), &[(0, 400, seed)]);
        match add(&medium, &chain, &format!("s{seed}")) {
            Ok(_) => kept.push((chain, seed)),
            Err(error) => break error,
        }
    };
    assert!(full.to_string().contains("is full") && full.to_string().contains("nothing was added"), "{full}");
    assert!(kept.len() >= 2);
    assert_eq!(Catalogue::read(medium.as_ref()).unwrap().heads.len(), kept.len());
    kept.iter().for_each(|(chain, seed)| assert!(content(&medium, chain) == wanted(&[(0, 400, *seed)])));
}

#[test]
fn flipped_bits_are_found_wherever_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let base = snapshot(dir.path(), "base", BASE);
    let medium = Arc::new(FakeMedium::formatted());
    add(&medium, &base, "base").unwrap();
    let state = Catalogue::read(medium.as_ref()).unwrap();
    let geometry = *state.geometry();
    let head = state.heads[0].clone();
    let at = state.entry(medium.as_ref(), &head).unwrap().runs[0].at;
    let check = || fsck::check(medium.as_ref(), &mut |_, _| {});
    for offset in [geometry.page(at) + 5000, geometry.sums.offset + at * 4 + 4, geometry.hashes.offset + at * 16 + 16] {
        medium.flip(offset);
        let found = check().unwrap();
        assert_eq!((found.bad_pages, found.bad_snapshots), (vec![at + 1], vec!["base".to_string()]));
        medium.flip(offset);
    }
    medium.flip(geometry.page(at));
    let tier = PoolTier::open(medium.clone(), base.tip().id(), None).unwrap();
    let refused = tier.read(at * PAGE_SIZE, &mut vec![0; 2 * PAGE_SIZE as usize]).unwrap_err().to_string();
    assert!(refused.contains("does not match its checksum"), "{refused}");
    // A damaged page is not shared.
    let stats = add(&medium, &snapshot(dir.path(), "child", CHILD), "child").unwrap();
    assert!(stats.shared < 420, "{stats:?}");
    medium.flip(geometry.page(at));
    medium.flip(head.entry.offset);
    let found = check().unwrap();
    assert!(!found.is_good() && found.problems[0].contains("checksum"), "{found:?}");
    medium.flip(head.entry.offset);
    assert!(check().unwrap().is_good());
    // Of the two superblocks one is enough; without both there is no pool, and a newer one is not touched.
    let newest = state.superblock.generation % 2;
    medium.flip(4096 * (1 - newest) + 30);
    assert!(check().is_ok());
    medium.flip(4096 * newest + 30);
    assert!(matches!(check(), Err(Error::Damaged { .. })));
    medium.memory.lock().unwrap().now[8] = 99;
    let newer = Writer::open(medium.as_ref()).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(newer.contains("format 99"), "{newer}");
}

#[test]
fn a_foreign_medium_is_not_formatted_without_its_name() {
    let medium = FakeMedium::new();
    medium.flip(40_000);
    let create = |name| writer::create(&medium, PoolId([1; 32]), name, "fake");
    assert!(matches!(create(None), Err(Error::Foreign { .. })));
    assert!(matches!(create(Some("other")), Err(Error::Foreign { .. })));
    create(Some("fake")).unwrap();
    assert!(matches!(create(None), Err(Error::Exists { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// A crash of the writer at any point loses nothing sealed, and everything in the pool is whole.
    #[test]
    fn a_crash_leaves_the_state_before_or_after(
        step in 0_u8..3,
        writes in 0_usize..24,
        fates in prop::collection::vec(any::<u16>(), 1..8),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let base = snapshot(dir.path(), "base", BASE);
        let child = snapshot(dir.path(), "child", CHILD);
        let other = snapshot(dir.path(), "other", &[(0, 100, 9)]);
        let medium = Arc::new(FakeMedium::formatted());
        add(&medium, &base, "base").unwrap();
        add(&medium, &other, "other").unwrap();
        if step == 2 {
            Writer::open(medium.as_ref()).unwrap().remove("other").unwrap();
        }
        medium.fail_after(writes);
        let done = match step {
            0 => add(&medium, &child, "child").is_ok(),
            1 => Writer::open(medium.as_ref()).and_then(|mut writer| writer.remove("other")).is_ok(),
            _ => Writer::open(medium.as_ref()).and_then(|mut writer| writer.collect(None)).is_ok(),
        };
        medium.crash(&fates);
        let found = fsck::check(medium.as_ref(), &mut |_, _| {}).unwrap();
        prop_assert!(found.bad_pages.is_empty(), "{:?}", found);
        prop_assert!(content(&medium, &base) == wanted(BASE));
        let has = |chain: &Chain| Catalogue::read(medium.as_ref()).unwrap().live(chain.tip().id()).is_some();
        if step == 0 {
            prop_assert!(!done || has(&child));
            prop_assert!(has(&other));
            if has(&child) {
                prop_assert!(content(&medium, &child) == wanted(CHILD));
            }
        }
        // And the pool can be changed again.
        if !has(&child) {
            add(&medium, &child, "child").unwrap();
        }
        prop_assert!(content(&medium, &child) == wanted(CHILD) && content(&medium, &base) == wanted(BASE));
        let found = fsck::check(medium.as_ref(), &mut |_, _| {}).unwrap();
        prop_assert!(found.is_good(), "{:?}", found);
    }
}

#[test]
fn lease_on_a_shared_medium_that_may_only_be_read_is_refused_with_the_reason() {
    let [_, other] = FakeMedium::of_two_hosts();
    let memory = other.memory.clone();
    let reader: Arc<dyn Medium> =
        Arc::new(FakeMedium { file: tempfile::tempfile().unwrap(), memory, shared: true, read_only: true, len: LEN });
    let refused = Held::take(&reader, Default::default(), Digest::default()).unwrap_err();
    assert!(matches!(refused, Error::ReadOnly { .. }), "{refused}");
}

#[test]
fn lease_area_full_of_garbage_costs_no_minute() {
    let [one, _] = FakeMedium::of_two_hosts();
    let garbage = vec![0x5a; (super::format::LEASE_SLOTS * LEASE_LEN) as usize];
    one.write(LEASES, &garbage).unwrap();
    let began = std::time::Instant::now();
    let medium: Arc<dyn Medium> = one.clone();
    let refused = Held::take(&medium, Default::default(), Digest::default()).unwrap_err();
    assert!(matches!(refused, Error::NoLease { .. }), "{refused}");
    // With five reads each, 5 ms apart, looking at the leases alone would take 51 s each time.
    match lease::abandon(one.as_ref(), EXPIRY_S, &mut || Ok(())) {
        Ok(left) => assert!(left.is_empty(), "{left:?}"),
        // On a busy host, which may stand still between two steps.
        Err(error) => assert!(matches!(error, Error::StoodStill { .. }), "{error}"),
    }
    assert!(began.elapsed() < Duration::from_secs(45), "it took {:?}", began.elapsed());
}
