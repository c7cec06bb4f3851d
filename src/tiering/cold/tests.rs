//! Tests of cold pools without a network: places are memory that can be made to fail.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;

use super::sample::{PAGE, PAGES, Sample, sample, sample_with};
use super::store::{MANIFEST, Manifest, Store};
use super::*;
use crate::snapshot::{Digest, Extent, Gfn, PAGE_SIZE, PageSet, Section, SectionKind, SnapshotId, write_container};

/// The answer of a place to a request for chunks.
#[derive(Clone, Copy, Debug)]
enum Behaviour {
    Good,
    /// Goes away after this many chunks, each time.
    BreaksAfter(usize),
    /// Flips a bit of this chunk, this many times.
    Lies(u32, usize),
    Refuses,
    Gone,
}

struct Fake {
    name: &'static str,
    behaviour: Behaviour,
    index: Vec<u8>,
    data: Arc<Vec<u8>>,
    lies: Arc<AtomicUsize>,
    /// Chunks requested here.
    asked: Arc<Mutex<Vec<u32>>>,
}

impl Fake {
    fn of(sample: &Sample, name: &'static str, behaviour: Behaviour) -> Fake {
        let index = sample.index_bytes.clone();
        let data = Arc::new(sample.data.clone());
        Fake { name, behaviour, index, data, lies: Arc::default(), asked: Arc::default() }
    }
}

impl Place for Fake {
    fn name(&self) -> &str {
        self.name
    }

    fn index(&self, _: SnapshotId, _: &Arc<SourceCounters>) -> Result<Vec<u8>, Broken> {
        match self.behaviour {
            Behaviour::Gone => Err(Broken::Transient("nobody is there".into())),
            _ => Ok(self.index.clone()),
        }
    }

    fn open(
        &self,
        index: &Arc<Index>,
        digest: Digest,
        counters: Arc<SourceCounters>,
    ) -> Result<Box<dyn ChunkSource>, Broken> {
        counters.connections.fetch_add(1, Ordering::Relaxed);
        if digest.0 != *blake3::hash(&self.index).as_bytes() {
            return Err(Broken::Refused("it holds another object".into()));
        }
        match self.behaviour {
            Behaviour::Refuses => Err(Broken::Refused("it will not".into())),
            Behaviour::Gone => Err(Broken::Transient("nobody is there".into())),
            behaviour => Ok(Box::new(FakeSource {
                behaviour,
                index: index.clone(),
                data: self.data.clone(),
                lies: self.lies.clone(),
                asked: self.asked.clone(),
            })),
        }
    }
}

struct FakeSource {
    behaviour: Behaviour,
    index: Arc<Index>,
    data: Arc<Vec<u8>>,
    lies: Arc<AtomicUsize>,
    asked: Arc<Mutex<Vec<u32>>>,
}

impl ChunkSource for FakeSource {
    fn fetch(&mut self, wanted: &[u32], each: &mut EachChunk) -> Result<(), Broken> {
        for (count, &number) in wanted.iter().enumerate() {
            self.asked.lock().unwrap().push(number);
            let span = self.index.span(number..number + 1);
            let mut bytes = self.data[span.start as usize..span.end as usize].to_vec();
            match self.behaviour {
                Behaviour::BreaksAfter(chunks) if count == chunks => return Err(Broken::Transient("cut".into())),
                Behaviour::Lies(chunk, times)
                    if chunk == number && self.lies.fetch_add(1, Ordering::Relaxed) < times =>
                {
                    bytes[0] ^= 1;
                }
                _ => {}
            }
            if each(number, &bytes)? == Flow::Stop {
                return Ok(());
            }
        }
        Ok(())
    }
}

fn open(sample: &Sample, places: Vec<Fake>) -> Result<Arc<ColdPool>, ChunkError> {
    let places = places.into_iter().map(|place| Box::new(place) as Box<dyn Place>).collect();
    ColdPool::open(places, 1, sample.index.snapshot(), sample.index.layout(), Duration::from_millis(60), None)
}

fn read_all(sample: &Sample, pool: &Arc<ColdPool>) -> std::io::Result<()> {
    let mut bytes = vec![9; PAGES * PAGE];
    ColdReader::new(pool, 0).read(0, &mut bytes)?;
    assert!(bytes == sample.memory, "the pages are those of the snapshot");
    Ok(())
}

#[test]
fn object_holds_every_page_of_the_chain_however_it_is_packed() {
    let hot: PageSet = [Extent::new(Gfn(290), 20), Extent::new(Gfn(4000), 50)].into_iter().collect();
    for sample in [sample(), sample_with(Some(hot))] {
        assert_eq!(sample.data.len() as u64, sample.index.data_len());
        let methods: Vec<Compression> = sample.index.chunks().iter().map(|chunk| chunk.compression).collect();
        assert!(methods.contains(&Compression::Raw) && methods.iter().any(|method| *method != Compression::Raw));
        let pool = open(&sample, vec![Fake::of(&sample, "a", Behaviour::Good)]).unwrap();
        read_all(&sample, &pool).unwrap();
        let mut filled = vec![7; PAGES * PAGE];
        let (front, back) = filled.split_at_mut(333 * PAGE);
        fill(&pool, vec![((333 * PAGE) as u64, back), (0, front)]).unwrap();
        assert!(filled == sample.memory);
        let counts = pool.counts();
        assert_eq!(counts.places[0].chunks, 2 * sample.index.chunks().len() as u64, "each is fetched once each time");
        assert_eq!(counts.places[0].retries, 0);
    }
}

#[test]
fn hot_pages_come_first_and_are_fetched_without_the_others() {
    let hot: PageSet = [Extent::new(Gfn(300), 3), Extent::new(Gfn(700), 3)].into_iter().collect();
    let sample = sample_with(Some(hot));
    assert_eq!(sample.index.chunks_of(Extent::new(Gfn(300), 1)).collect::<Vec<_>>(), [0]);
    assert_eq!(sample.index.chunks_of(Extent::new(Gfn(700), 1)).collect::<Vec<_>>(), [1]);
    assert_eq!(sample.index.chunks_of(Extent::new(Gfn(288), 32)).count(), 2);
    let fake = Fake::of(&sample, "a", Behaviour::Good);
    let asked = fake.asked.clone();
    let pool = open(&sample, vec![fake]).unwrap();
    let mut reader = ColdReader::new(&pool, 0);
    reader.read((300 * PAGE) as u64, &mut [0; 3 * PAGE]).unwrap();
    reader.read((301 * PAGE) as u64, &mut [0; PAGE]).unwrap();
    assert_eq!(*asked.lock().unwrap(), [0], "the second read finds its chunk unpacked");
    assert_eq!(pool.counts().cached_reads, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_pages_can_be_read(ranges in prop::collection::vec((0_usize..PAGES, 1_usize..200), 1..12)) {
        static SAMPLE: std::sync::LazyLock<Sample> = std::sync::LazyLock::new(sample);
        let pool = open(&SAMPLE, vec![Fake::of(&SAMPLE, "a", Behaviour::Good)]).unwrap();
        let mut reader = ColdReader::new(&pool, 0);
        for (first, pages) in ranges {
            let pages = pages.min(PAGES - first);
            let mut bytes = vec![5; pages * PAGE];
            reader.read((first * PAGE) as u64, &mut bytes).unwrap();
            prop_assert!(bytes == SAMPLE.memory[first * PAGE..][..pages * PAGE]);
        }
    }
}

#[test]
fn pages_outside_the_snapshot_cannot_be_read() {
    let sample = sample();
    let pool = open(&sample, vec![Fake::of(&sample, "a", Behaviour::Good)]).unwrap();
    let mut reader = ColdReader::new(&pool, 0);
    for (offset, len) in [((PAGES * PAGE) as u64, PAGE), (1, PAGE), (u64::MAX - 4095, PAGE), (0, 5)] {
        assert!(reader.read(offset, &mut vec![0; len]).is_err(), "{offset}");
    }
}

#[test]
fn place_that_breaks_is_asked_again_and_nothing_is_missed() {
    let sample = sample();
    let pool = open(&sample, vec![Fake::of(&sample, "a", Behaviour::BreaksAfter(3))]).unwrap();
    read_all(&sample, &pool).unwrap();
    let counts = &pool.counts().places[0];
    assert_eq!(counts.chunks, sample.index.chunks().len() as u64);
    assert_eq!(counts.retries, (counts.chunks - 1) / 3);
    assert_eq!(counts.connections, counts.retries + 1);
}

#[test]
fn wrong_bytes_are_never_taken() {
    let sample = sample();
    // A single error may be the network's: the same place gives the right bytes the second time.
    let pool = open(&sample, vec![Fake::of(&sample, "a", Behaviour::Lies(4, 1))]).unwrap();
    read_all(&sample, &pool).unwrap();
    assert_eq!(pool.counts().places[0].damaged, 1);
    let liar = || Fake::of(&sample, "liar", Behaviour::Lies(4, usize::MAX));
    let error = read_all(&sample, &open(&sample, vec![liar()]).unwrap()).unwrap_err().to_string();
    assert!(error.contains("liar: chunk 4 does not have the bytes"), "{error}");
    let pool = open(&sample, vec![liar(), Fake::of(&sample, "good", Behaviour::Good)]).unwrap();
    read_all(&sample, &pool).unwrap();
    let counts = pool.counts();
    assert!(counts.places[0].damaged >= 1 && counts.places[1].chunks > 0, "{counts:?}");
}

#[test]
fn places_are_taken_in_order_and_failures_are_told() {
    let sample = sample();
    let fake = |name, behaviour| Fake::of(&sample, name, behaviour);
    let error = open(&sample, vec![fake("a", Behaviour::Gone)]).err().unwrap().to_string();
    assert!(error.contains("a: nobody is there"), "{error}");
    let pool = open(&sample, vec![fake("a", Behaviour::Gone), fake("b", Behaviour::Good)]).unwrap();
    read_all(&sample, &pool).unwrap();
    let counts = pool.counts();
    assert!(counts.places[0].retries > 0 && counts.places[0].chunks == 0 && counts.places[1].chunks > 0);
    let pool = open(&sample, vec![fake("a", Behaviour::Refuses)]).unwrap();
    let error = read_all(&sample, &pool).unwrap_err().to_string();
    assert_eq!(error, "a: it will not");
    let pool = open(&sample, vec![fake("a", Behaviour::BreaksAfter(0))]).unwrap();
    let error = read_all(&sample, &pool).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    assert!(error.to_string().contains("a: cut, after "), "{error}");
}

#[test]
fn place_with_another_object_of_the_snapshot_is_refused() {
    let sample = sample();
    let other = sample_with(Some([Extent::new(Gfn(7), 9)].into_iter().collect()));
    let breaks = Fake::of(&sample, "a", Behaviour::BreaksAfter(0));
    let pool = open(&sample, vec![breaks, Fake::of(&other, "b", Behaviour::Good)]).unwrap();
    let error = read_all(&sample, &pool).unwrap_err().to_string();
    assert!(error.contains("a: cut"), "{error}");
}

#[test]
fn damaged_cut_and_forged_indexes_are_refused() {
    let sample = sample();
    let good = &sample.index_bytes;
    let snapshot = sample.index.snapshot();
    let parse = |bytes: Vec<u8>| Index::parse("x", bytes, snapshot);
    assert_eq!(parse(good.clone()).unwrap(), *sample.index);
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        assert!(parse(bad).is_err(), "byte {at}");
        assert!(parse(good[..at].to_vec()).is_err(), "cut at {at}");
    }
    assert!(matches!(Index::parse("x", good.clone(), SnapshotId::default()), Err(ChunkError::OtherSnapshot { .. })));
    let container = crate::snapshot::Container::parse(good.clone()).unwrap();
    let [head, table] = [96, 97].map(|kind| container.section(SectionKind::Other(kind), 0).unwrap().to_vec());
    let forge = |version, head: &[u8], table: &[u8]| {
        let section = |kind, payload: &[u8]| Section {
            kind: SectionKind::Other(kind),
            instance: 0,
            version,
            payload: payload.to_vec(),
        };
        parse(write_container(&[section(96, head), section(97, table)]))
    };
    forge(1, &head, &table).unwrap();
    assert!(forge(2, &head, &table).unwrap_err().to_string().contains("version 2, this build reads 1"));
    let entry = 13 + 4;
    let with = |at: usize, bytes: &[u8]| {
        let mut table = table.clone();
        table[at..at + bytes.len()].copy_from_slice(bytes);
        forge(1, &head, &table).unwrap_err().to_string()
    };
    for (at, bytes, says) in [
        (0, &[0xff_u8, 0xff, 0xff, 0xff][..], "not all guest memory"),
        (4, &[0; 4], "stores"),
        (4, &[1; 4], "stores"),
        (12, &[9], "compression 9"),
        (13, &[0; 4], "holds no pages"),
        (13, &[1, 0, 0, 0], "stores"),
        (entry, &[0; 4], "two chunks hold the same page"),
    ] {
        let said = with(at, bytes);
        assert!(said.contains(says), "{at}: {said}");
    }
    assert!(forge(1, &head, &table[entry..]).is_err());
    assert!(forge(1, &[&head[..], &[0]].concat(), &table).is_err());
}

fn store(dir: &Path) -> Store {
    Store::create(dir, Manifest::new(128, 1000).unwrap()).unwrap()
}

#[test]
fn pool_in_a_directory_holds_a_snapshot_once_and_finds_flipped_bits() {
    let sample = sample();
    let dir = tempfile::tempdir().unwrap();
    let id = sample.index.snapshot();
    let store = store(&dir.path().join("pool"));
    assert!(matches!(store.index(id), Err(ChunkError::NotHeld { .. })));
    store.add(&sample.chain, None, None, &mut |_, _| {}).unwrap();
    assert!(matches!(store.add(&sample.chain, None, None, &mut |_, _| {}), Err(ChunkError::AlreadyHeld { .. })));
    assert_eq!(store.list().unwrap(), [id]);
    let index = store.index(id).unwrap();
    assert_eq!(store.check(id).unwrap().bad_chunks, 0);
    let data = std::fs::File::options().write(true).open(store.data_path(id)).unwrap();
    data.write_all_at(&[0xa5], index.chunks()[6].offset + 1).unwrap();
    let checked = store.check(id).unwrap();
    assert_eq!((checked.bad_chunks, checked.bad), (1, vec![6]));
    data.set_len(index.data_len() - 1).unwrap();
    assert!(matches!(store.check(id), Err(ChunkError::Index { .. })));
    store.remove(id).unwrap();
    assert_eq!(store.list().unwrap(), []);
    assert!(matches!(store.remove(id), Err(ChunkError::NotHeld { .. })));
}

#[test]
fn only_the_remains_of_an_interrupted_writer_are_collected() {
    let sample = sample();
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir.path().join("pool"));
    let id = sample.index.snapshot();
    store.add(&sample.chain, None, None, &mut |_, _| {}).unwrap();
    let objects = store.dir().join("objects");
    let other = SnapshotId([3; 32]);
    for name in [format!("{other}.chunks"), format!("{other}.partial"), format!("{other}.index.77.partial")] {
        std::fs::write(objects.join(name), [0; 10]).unwrap();
    }
    std::fs::write(objects.join("notes.txt"), "mine").unwrap();
    assert_eq!(store.collect().unwrap(), 30);
    assert_eq!(std::fs::read_dir(&objects).unwrap().count(), 3);
    assert_eq!(store.check(id).unwrap().bad_chunks, 0);
}

#[test]
fn damaged_snapshot_is_not_added_and_two_writers_do_not_meet() {
    let sample = sample();
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir.path().join("pool"));
    let lock = std::fs::File::open(store.dir().join(MANIFEST)).unwrap();
    lock.lock().unwrap();
    assert!(matches!(store.add(&sample.chain, None, None, &mut |_, _| {}), Err(ChunkError::Busy { .. })));
    drop(lock);
    let memory = std::fs::File::options().write(true).open(sample.chain.tip().memory_path()).unwrap();
    memory.write_all_at(&[1], 8 * PAGE_SIZE).unwrap();
    assert!(matches!(store.add(&sample.chain, None, None, &mut |_, _| {}), Err(ChunkError::Damaged { .. })));
    assert_eq!(std::fs::read_dir(store.dir().join("objects")).unwrap().count(), 0, "nothing is half added");
}

#[test]
fn directories_that_are_no_pools_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Store::open(dir.path()), Err(ChunkError::NotAPool { .. })));
    let write = |text: &str| std::fs::write(dir.path().join(MANIFEST), text).unwrap();
    write(r#"{"format": 2, "more": true}"#);
    assert!(matches!(Store::open(dir.path()), Err(ChunkError::FutureFormat { format: 2, .. })));
    write(r#"{"format": 1, "chunk_kib": 100, "bandwidth_mbps": 1}"#);
    assert!(matches!(Store::open(dir.path()), Err(ChunkError::ChunkSize { kib: 100 })));
    write("{");
    assert!(matches!(Store::open(dir.path()), Err(ChunkError::NotAPool { .. })));
    assert!(matches!(Store::create(dir.path(), Manifest::new(64, 1).unwrap()), Err(ChunkError::CannotMake { .. })));
    assert!([0, 4, 32, 96, 4096, u64::MAX].iter().all(|kib| Manifest::new(*kib, 1).is_err()));
}
