//! Reads from a cold pool: asks its places until one answers, checks chunks against the index, unpacks them.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

use super::ChunkError;
use super::codec::{Compression, Decoder};
use super::delivery::{Broken, Flow};
use super::index::{Index, MAX_INDEX_LEN};
use super::place::{ChunkSource, Place, SourceCounters, SourceCounts};
use crate::snapshot::{Digest, Extent, Gfn, MemoryLayout, ObjectKey, PAGE_SIZE, SecretKey, SnapshotId};
use crate::sys::bounded_wait::Wait;
use crate::sys::worker;

/// Counts of a pool's requests, for reports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ColdCounts {
    pub places: Vec<SourceCounts>,
    /// Reads that found their chunk already unpacked.
    pub cached_reads: u64,
}

/// The object of one snapshot, and the places that have it, in order of preference.
pub struct ColdPool {
    index: Arc<Index>,
    digest: Digest,
    /// The keys of its chunks, if they are encrypted.
    key: Option<ObjectKey>,
    places: Vec<(Box<dyn Place>, Arc<SourceCounters>)>,
    /// The number of places, from the first on, that are equally near: readers may start at any of them.
    alike: usize,
    cached_reads: AtomicU64,
    /// Description of a reader's wait, for the log.
    awaited: Arc<str>,
    patience: Duration,
}

/// Places with the counts of their requests.
type Places = [(Box<dyn Place>, Arc<SourceCounters>)];

fn name_of(places: &Places) -> String {
    places.iter().map(|(place, _)| place.name()).collect::<Vec<_>>().join(" or ")
}

impl ColdPool {
    /// Asks the places in turn for the object of `snapshot`. The first `alike` of them are equally near; `patience` is
    /// the longest time that a place may be unreachable. With a `key`, the object must be encrypted with it.
    ///
    /// # Errors
    /// As for [`Index::object_key`]; [`ChunkError::NoPlace`] if none has it; an index that is not valid.
    pub fn open(
        places: Vec<Box<dyn Place>>,
        alike: usize,
        snapshot: SnapshotId,
        layout: &MemoryLayout,
        patience: Duration,
        key: Option<&SecretKey>,
    ) -> Result<Arc<ColdPool>, ChunkError> {
        let places: Vec<_> = places.into_iter().map(|place| (place, Arc::new(SourceCounters::default()))).collect();
        let name = name_of(&places);
        let (place, bytes) = first_index(&places, snapshot, Wait::new(name.as_str(), patience))?;
        let digest = Digest(*blake3::hash(&bytes).as_bytes());
        let index = Arc::new(Index::parse(place.name(), bytes, snapshot)?);
        let key = index.object_key(place.name(), key)?;
        if index.layout() != layout {
            let problem = "it describes another layout of guest memory".to_string();
            return Err(ChunkError::OtherMemory { object: place.name().to_string(), problem });
        }
        let cached_reads = AtomicU64::new(0);
        let alike = alike.clamp(1, places.len());
        let awaited = format!("a chunk from {name}").into();
        Ok(Arc::new(ColdPool { index, digest, key, places, alike, cached_reads, awaited, patience }))
    }

    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Closes the pool: readers that wait for it fail, and nothing more is read.
    pub fn close(&self) {
        self.places.iter().for_each(|(_, counters)| counters.closed.store(true, Ordering::Relaxed));
    }

    fn is_closed(&self) -> bool {
        self.places.iter().all(|(_, counters)| counters.closed.load(Ordering::Relaxed))
    }

    /// The pool's name: its places.
    pub fn name(&self) -> String {
        name_of(&self.places)
    }

    pub fn counts(&self) -> ColdCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let of = |(place, counters): &(Box<dyn Place>, Arc<SourceCounters>)| SourceCounts {
            place: place.name().to_string(),
            chunks: get(&counters.chunks),
            bytes_stored: get(&counters.stored),
            bytes_pages: get(&counters.pages),
            requests: get(&counters.requests),
            round_trips: get(&counters.round_trips),
            connections: get(&counters.connections),
            cached: get(&counters.cached),
            retries: get(&counters.retries),
            damaged: get(&counters.damaged),
        };
        ColdCounts { places: self.places.iter().map(of).collect(), cached_reads: get(&self.cached_reads) }
    }
}

/// The index, from the first place that gives it. Places that cannot be reached are asked again in turn until `wait` is
/// over.
///
/// # Errors
/// [`ChunkError::NoPlace`] with the last answer of each place.
fn first_index(places: &Places, snapshot: SnapshotId, mut wait: Wait) -> Result<(&dyn Place, Vec<u8>), ChunkError> {
    let mut pause = FIRST_PAUSE;
    let mut whys: Vec<Option<Broken>> = places.iter().map(|_| None).collect();
    loop {
        let mut is_worth_it = false;
        for ((place, counters), why) in places.iter().zip(&mut whys) {
            match why {
                None => {}
                Some(Broken::Transient(_)) if !wait.is_over() => {
                    counters.retries.fetch_add(1, Ordering::Relaxed);
                }
                Some(_) => continue,
            }
            match place.index(snapshot, counters) {
                Ok(bytes) if bytes.len() as u64 > MAX_INDEX_LEN => {
                    *why = Some(Broken::Refused("its index is too large".to_string()));
                }
                Ok(bytes) => {
                    // Its failures from before it could be reached no longer matter.
                    *why = None;
                    passed_over(places, &whys).iter().for_each(|why| tracing::warn!(why, "A cold pool is passed over"));
                    return Ok((place.as_ref(), bytes));
                }
                Err(broken) => {
                    is_worth_it |= matches!(broken, Broken::Transient(_));
                    *why = Some(broken);
                }
            }
        }
        if !is_worth_it || wait.is_over() || wait.elapsed() + pause >= wait.limit() {
            return Err(ChunkError::NoPlace(passed_over(places, &whys).join("; ")));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// The reasons why places have not given an index.
fn passed_over(places: &Places, whys: &[Option<Broken>]) -> Vec<String> {
    let said = |((place, _), why): (&(Box<dyn Place>, _), &Option<Broken>)| {
        let (Broken::Transient(why) | Broken::Damaged(why) | Broken::Refused(why)) = why.as_ref()?;
        Some(format!("{}: {why}", place.name()))
    };
    places.iter().zip(whys).filter_map(said).collect()
}

/// Pauses between two attempts when every place has failed.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_millis(500);
/// Unpacked chunks that a reader keeps: extents of a plan share chunks.
const KEPT: usize = 4;
/// Wrong answers after which a place is not asked again: a single one may be an error of the network.
const DAMAGES: u32 = 2;

struct Slot {
    source: Option<Box<dyn ChunkSource>>,
    damages: u32,
    /// Set when the place is not asked any more: the reason.
    dead: Option<String>,
}

/// One thread's reader.
pub struct ColdReader {
    pool: Arc<ColdPool>,
    slots: Vec<Slot>,
    current: usize,
    decoder: Option<Decoder>,
    pages: Vec<u8>,
    /// The last chunk, decrypted.
    opened: Vec<u8>,
    kept: VecDeque<(u32, Vec<u8>)>,
}

impl Clone for ColdReader {
    /// Another reader of the same pool, with connections of its own.
    fn clone(&self) -> Self {
        ColdReader::new(&self.pool, 0)
    }
}

impl ColdReader {
    /// Makes the `number`th reader of a pool: readers start at equally near places in turn.
    pub fn new(pool: &Arc<ColdPool>, number: usize) -> ColdReader {
        let slots = pool.places.iter().map(|_| Slot { source: None, damages: 0, dead: None }).collect();
        let current = number % pool.alike;
        ColdReader {
            pool: pool.clone(),
            slots,
            current,
            decoder: None,
            pages: Vec::new(),
            opened: Vec::new(),
            kept: VecDeque::new(),
        }
    }

    pub fn pool(&self) -> &Arc<ColdPool> {
        &self.pool
    }

    /// Connects now, so that the first read does not have to.
    pub fn connect(&mut self) -> io::Result<()> {
        self.stream(&[], &mut |_, _| Ok(Flow::Continue))
    }

    /// Reads the bytes of pages from `offset` of the memory file on, whole chunks at a time.
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let pool = self.pool.clone();
        bytes.fill(0);
        let mut wanted: BTreeMap<u32, Vec<Piece>> = BTreeMap::new();
        for piece in pieces(&pool.index, offset, bytes.len() as u64)? {
            wanted.entry(piece.chunk).or_default().push(piece);
        }
        wanted.retain(|chunk, pieces| match self.kept.iter().find(|(kept, _)| kept == chunk) {
            Some((_, pages)) => {
                pieces.iter().for_each(|piece| piece.copy(pages, bytes));
                pool.cached_reads.fetch_add(1, Ordering::Relaxed);
                false
            }
            None => true,
        });
        let chunks: Vec<u32> = wanted.keys().copied().collect();
        let mut kept = std::mem::take(&mut self.kept);
        let result = self.stream(&chunks, &mut |chunk, pages| {
            wanted[&chunk].iter().for_each(|piece| piece.copy(pages, bytes));
            kept.truncate(KEPT - 1);
            kept.push_front((chunk, pages.to_vec()));
            Ok(Flow::Continue)
        });
        self.kept = kept;
        result
    }

    /// Gives the pages of the chunks `wanted`, each once, in this order, to `each`. Asks places that fail again, and
    /// others instead, until no chunk has come for the pool's patience.
    ///
    /// # Errors
    /// The error of `each`, or the reason why no place gives a chunk.
    pub fn stream(&mut self, wanted: &[u32], each: &mut dyn FnMut(u32, &[u8]) -> io::Result<Flow>) -> io::Result<()> {
        let mut done = 0;
        let mut failures = 0_u32;
        let mut pause = FIRST_PAUSE;
        let mut wait = Wait::new(self.pool.awaited.clone(), self.pool.patience);
        loop {
            let before = done;
            let mut local = None;
            let mut stopped = false;
            let result = self.attempt(&wanted[done..], &mut |chunk, pages| {
                done += 1;
                let flow = each(chunk, pages).unwrap_or_else(|error| {
                    local = Some(error);
                    Flow::Stop
                });
                stopped = flow == Flow::Stop;
                flow
            });
            if stopped {
                // Other requested chunks are still on their way.
                self.slots[self.current].source = None;
                return local.map_or(Ok(()), Err);
            }
            let Err(broken) = result else { return Ok(()) };
            if done > before {
                (failures, pause) = (0, FIRST_PAUSE);
                wait.restart();
            }
            if self.pool.is_closed() {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "the cold pool was closed"));
            }
            let why = self.note(broken);
            if self.slots.iter().all(|slot| slot.dead.is_some()) {
                return Err(io::Error::other(self.all_dead()));
            }
            failures += 1;
            // If every place has failed, asking again at once is of no use.
            let have_all_failed = failures as usize >= self.slots.iter().filter(|slot| slot.dead.is_none()).count();
            if have_all_failed && (wait.is_over() || wait.elapsed() + pause >= wait.limit()) {
                let said = format!("{why}, after {failures} attempts in {:.1} s", wait.elapsed().as_secs_f64());
                return Err(io::Error::new(io::ErrorKind::TimedOut, said));
            }
            if have_all_failed {
                std::thread::sleep(pause);
                pause = (pause * 2).min(LAST_PAUSE);
            }
        }
    }

    /// Asks the current place, and checks and unpacks the chunks that come.
    fn attempt(&mut self, wanted: &[u32], each: &mut dyn FnMut(u32, &[u8]) -> Flow) -> Result<(), Broken> {
        let ColdReader { pool, slots, current, decoder, pages, opened, .. } = self;
        let (place, counters) = &pool.places[*current];
        let slot = &mut slots[*current];
        let source = match &mut slot.source {
            Some(source) => source,
            none => none.insert(place.open(&pool.index, pool.digest, counters.clone())?),
        };
        let decoder = match decoder {
            Some(decoder) => decoder,
            none => none.insert(Decoder::new().map_err(|error| Broken::Refused(error.to_string()))?),
        };
        if wanted.is_empty() {
            return Ok(());
        }
        source.fetch(wanted, &mut |number, stored| {
            let chunk = &pool.index.chunks()[number as usize];
            if crc32c::crc32c(stored) != chunk.checksum {
                return Err(Broken::Damaged(format!("chunk {number} does not have the bytes that its checksum is of")));
            }
            let stored_len = stored.len() as u64;
            let stored = match &pool.key {
                None => stored,
                Some(key) => {
                    opened.clear();
                    opened.extend_from_slice(stored);
                    let unsealed = key.open(number, opened);
                    unsealed
                        .map_err(|_| Broken::Damaged(format!("chunk {number} cannot be decrypted with the key")))?;
                    &opened[..]
                }
            };
            // A raw chunk is not copied: an index in which its length differs was refused.
            let pages = if chunk.compression == Compression::Raw {
                stored
            } else {
                pages.resize(chunk.len(), 0);
                let unpacked = decoder.decode(chunk.compression, stored, pages);
                unpacked.map_err(|what| Broken::Damaged(format!("chunk {number} cannot be unpacked: {what}")))?;
                &pages[..]
            };
            counters.chunks.fetch_add(1, Ordering::Relaxed);
            counters.stored.fetch_add(stored_len, Ordering::Relaxed);
            counters.pages.fetch_add(pages.len() as u64, Ordering::Relaxed);
            Ok(each(number, pages))
        })
    }

    /// Notes a failure of the current place and goes on to the next that is not dead. Returns a description of the
    /// failure.
    fn note(&mut self, broken: Broken) -> String {
        let (place, counters) = &self.pool.places[self.current];
        let slot = &mut self.slots[self.current];
        slot.source = None;
        counters.retries.fetch_add(1, Ordering::Relaxed);
        let why = match broken {
            Broken::Transient(why) => why,
            Broken::Damaged(why) => {
                counters.damaged.fetch_add(1, Ordering::Relaxed);
                slot.damages += 1;
                slot.dead = (slot.damages >= DAMAGES).then(|| why.clone());
                why
            }
            Broken::Refused(why) => {
                slot.dead = Some(why.clone());
                why
            }
        };
        let said = format!("{}: {why}", place.name());
        let mut next = (1..self.slots.len()).map(|step| (self.current + step) % self.slots.len());
        match next.find(|slot| self.slots[*slot].dead.is_none()) {
            Some(other) => {
                tracing::warn!(why = said, instead = self.pool.places[other].0.name(), "A cold pool has failed");
                self.current = other;
            }
            // The report counts the failure; if no place can give the chunk, the error says why.
            None => tracing::info!(why = said, "A cold pool has failed"),
        }
        said
    }

    fn all_dead(&self) -> String {
        let each = self.slots.iter().zip(&self.pool.places);
        let whys = each.filter_map(|(slot, (place, _))| Some(format!("{}: {}", place.name(), slot.dead.as_ref()?)));
        whys.collect::<Vec<_>>().join("; ")
    }
}

/// Wanted pages of one chunk.
struct Piece {
    chunk: u32,
    /// Offset within the chunk's pages, bytes.
    from: usize,
    /// Offset within the buffer to be filled, bytes.
    to: usize,
    len: usize,
}

impl Piece {
    fn copy(&self, pages: &[u8], bytes: &mut [u8]) {
        bytes[self.to..self.to + self.len].copy_from_slice(&pages[self.from..self.from + self.len]);
    }
}

/// The pieces of chunks that make up `[offset, offset + len)` of the memory file, ascending; pages between them are
/// zero.
fn pieces(index: &Index, offset: u64, len: u64) -> io::Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    for extent in extents(index.layout(), offset, len)? {
        let start = index.layout().file_offset(extent.first).unwrap_or(offset) - offset;
        for chunk in index.chunks_of(extent) {
            for (run, at) in index.runs(chunk) {
                let Some(part) = run.intersection(&extent) else { continue };
                let from = at + ((part.first.0 - run.first.0) * PAGE_SIZE) as usize;
                let to = (start + (part.first.0 - extent.first.0) * PAGE_SIZE) as usize;
                pieces.push(Piece { chunk, from, to, len: part.bytes() as usize });
            }
        }
    }
    pieces.sort_unstable_by_key(|piece| piece.to);
    Ok(pieces)
}

/// The guest pages at `[offset, offset + len)` of the memory file.
fn extents(layout: &MemoryLayout, offset: u64, len: u64) -> io::Result<Vec<Extent>> {
    let end = offset.checked_add(len).filter(|end| *end <= layout.file_len() && len.is_multiple_of(PAGE_SIZE));
    let (Some(end), true) = (end, offset.is_multiple_of(PAGE_SIZE)) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "these are no pages of the snapshot"));
    };
    let part = |range: &crate::snapshot::GuestRange| {
        let first = offset.max(range.file_offset);
        let last = end.min(range.file_offset + range.len);
        let gpa = range.gpa + first.saturating_sub(range.file_offset);
        (first < last).then(|| Extent { first: Gfn::containing(gpa), pages: (last - first) / PAGE_SIZE })
    };
    Ok(layout.ranges().iter().filter_map(part).collect())
}

/// The least bytes for which another thread pays.
const BYTES_PER_THREAD: u64 = 8 << 20;
/// The most CPUs that unpacking and copying keep busy.
const THREADS: usize = 4;

/// Parts of a chunk's pages, each with its offset in them.
type Targets<'m> = Vec<(usize, &'m mut [u8])>;

/// Fills memory: each slice with the pages from its offset in the memory file on. Returns the number of threads used.
///
/// # Errors
/// As for [`ColdReader::stream`].
pub fn fill(pool: &Arc<ColdPool>, wanted: Vec<(u64, &mut [u8])>) -> io::Result<usize> {
    let mut targets: BTreeMap<u32, Targets> = BTreeMap::new();
    for (offset, bytes) in wanted {
        let mut rest = bytes;
        let mut at = 0;
        for piece in pieces(&pool.index, offset, rest.len() as u64)? {
            let (gap, behind) = rest.split_at_mut(piece.to - at);
            gap.fill(0);
            let (part, behind) = behind.split_at_mut(piece.len);
            targets.entry(piece.chunk).or_default().push((piece.from, part));
            (rest, at) = (behind, piece.to + piece.len);
        }
        rest.fill(0);
    }
    let chunks: Vec<u32> = targets.keys().copied().collect();
    let stored: u64 = chunks.iter().map(|chunk| u64::from(pool.index.chunks()[*chunk as usize].stored_len)).sum();
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let most = cpus.max(pool.alike).min(THREADS);
    let threads = ((stored / BYTES_PER_THREAD) as usize).clamp(1, most);
    let mut targets: Vec<(u32, Targets)> = targets.into_iter().collect();
    let share = targets.len().div_ceil(threads).max(1);
    let shares = Mutex::new(targets.chunks_mut(share).enumerate());
    worker::share("chunks", threads, || {
        loop {
            let next = shares.lock().unwrap_or_else(PoisonError::into_inner).next();
            match next {
                Some((number, share)) => fill_share(pool, number, share)?,
                None => return Ok(()),
            }
        }
    })
}

fn fill_share(pool: &Arc<ColdPool>, number: usize, share: &mut [(u32, Targets)]) -> io::Result<()> {
    let chunks: Vec<u32> = share.iter().map(|(chunk, _)| *chunk).collect();
    let mut share = share.iter_mut();
    ColdReader::new(pool, number).stream(&chunks, &mut |_, pages| {
        // Chunks come in the order in which they were requested.
        for (from, part) in share.next().map(|(_, parts)| parts).into_iter().flatten() {
            part.copy_from_slice(&pages[*from..*from + part.len()]);
        }
        Ok(Flow::Continue)
    })
}
