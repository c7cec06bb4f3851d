//! Verification: compares the bytes that a guest is restored from with those that were captured.
//!
//! The page map has a checksum for every 64 KiB of a memory file, pools have one for every page. A thread compares a
//! sample while the machine is built, and the guest does not run before the sample matches; the thread compares the
//! rest once the guest has settled. A mismatch refuses the restore, or ends the guest.
//!
//! The comparison leaves the page cache as it is: cached samples are read from there, everything else past the page
//! cache, so that files stay evicted, or in the folios that they were read into.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, FlockOperation};
use serde_json::{Value, json};

use super::files::Files;
use crate::memory::Error;
use crate::memory::ending::{Ending, EndingSignal};
use crate::snapshot::Verify;
use crate::snapshot::{self, CHUNK_PAGES, Chain, Extent, Gfn, PAGE_SIZE, PageMap, ReadAt, RestorePlan, Snapshot};
use crate::sys::errors;
use crate::sys::mapping::Buffer;
use crate::sys::worker::Worker;
use crate::sys::{idle, lost, page_cache, verity};
use crate::tiering::tier::Tier;

/// Chunks of the whole chain compared before the guest runs, and at least some of each layer. The first and the last
/// chunk of a layer are always among them; every restore chooses the others anew.
const SAMPLES: usize = 6;
const SAMPLES_PER_LAYER_MIN: usize = 2;
/// Time from the restore until the rest is compared.
const SETTLED: Duration = Duration::from_secs(1);
/// The rest is compared at 64 MiB/s: so many chunks, then a pause.
const CHUNKS_AT_ONCE: usize = 16;
const PAUSE: Duration = Duration::from_millis(16);
/// Pause between two looks whether another VM is done with the same file.
const TURN: Duration = Duration::from_millis(500);
/// Time that the end of a machine waits for the thread, which does not hold guest memory.
const PATIENCE: Duration = Duration::from_secs(1);

/// Progress of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the guest may run.
    Checking,
    /// The guest may run; the rest is not compared, or not yet.
    Sampled,
    /// The rest is being compared.
    Running,
    /// Everything has been compared.
    Done,
    /// Something does not match, or could not be read.
    Failed,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Checking => "checking",
            State::Sampled => "sampled",
            State::Running => "running",
            State::Done => "done",
            State::Failed => "failed",
        }
    }
}

struct Shared {
    mode: Verify,
    lock: Mutex<Locked>,
    changed: Condvar,
    /// A thread has begun the comparison that comes before the guest runs.
    claimed: AtomicBool,
    /// Set when the machine is built.
    ending: OnceLock<Arc<EndingSignal>>,
    pages: AtomicU64,
    verified: AtomicU64,
    /// Files whose pages the kernel checks (fs-verity), and their digests.
    verity: Mutex<Vec<(PathBuf, String)>>,
}

struct Locked {
    state: State,
    stop: bool,
    error: Option<Error>,
}

/// The comparison. Ends when dropped.
pub struct Verifier {
    shared: Arc<Shared>,
    thread: Option<Worker>,
}

impl Verifier {
    /// Begins to compare the bytes that `plan` takes from files and pools; `None` if there are none: a cold pool's
    /// chunks are compared as they arrive, and a page-fault handler outside has the bytes itself. `is_copied`: the
    /// plan's copies are made as it says.
    pub fn start(files: &Files, plan: &RestorePlan, mode: Verify, is_copied: bool) -> Result<Option<Self>, Error> {
        if files.cold().is_some() {
            return Ok(None);
        }
        // A plan with `verify` copies all pages and compares each of them while copying.
        let is_done = plan.verify && is_copied;
        let state = match mode {
            _ if is_done => State::Done,
            Verify::Off => State::Sampled,
            _ => State::Checking,
        };
        let planned = plan.counts();
        let pages = if is_done { planned.preload } else { 0 };
        let shared = Arc::new(Shared {
            mode,
            lock: Mutex::new(Locked { state, stop: false, error: None }),
            changed: Condvar::new(),
            claimed: AtomicBool::new(false),
            ending: OnceLock::new(),
            pages: AtomicU64::new(pages),
            verified: AtomicU64::new(pages),
            verity: Mutex::default(),
        });
        if state != State::Checking {
            return Ok(Some(Verifier { shared, thread: None }));
        }
        let chain = files.chain().clone();
        let tiers = files.tiers().to_vec();
        let work = shared.clone();
        let told = shared.clone();
        let stop = move || {
            told.lock().stop = true;
            told.changed.notify_all();
        };
        let builder = Builder::new().name("verify".into()).stack_size(128 * 1024);
        let thread = Worker::start(builder, stop, move || work.run(&chain, &tiers));
        // Without the thread the main thread compares the sample, and the rest is not compared.
        let failed = |error: &io::Error| {
            tracing::warn!(%error, "No thread can be started to verify memory while the guest runs");
        };
        Ok(Some(Verifier { shared, thread: thread.inspect_err(failed).ok() }))
    }

    /// Waits until the guest may run. From then on a mismatch ends it by `ending`.
    pub fn wait_checked(&self, files: &Files, ending: &Arc<EndingSignal>) -> Result<(), Error> {
        // Set once: memory is compared for one guest.
        let _ = self.shared.ending.set(ending.clone());
        self.wait(files)
    }

    /// From now on a mismatch ends the guest by `ending`. Called after [`wait`](Self::wait).
    ///
    /// # Errors
    /// The mismatch that was found since.
    pub fn attach(&self, ending: &Arc<EndingSignal>) -> Result<(), Error> {
        let _ = self.shared.ending.set(ending.clone());
        self.shared.lock().error.take().map_or(Ok(()), Err)
    }

    /// Waits until the comparison that comes before the guest runs has been made.
    pub fn wait(&self, files: &Files) -> Result<(), Error> {
        let is_checking = self.shared.lock().state == State::Checking;
        if is_checking && self.shared.claim() {
            return self.shared.check_before(files.chain(), files.tiers()).map(drop);
        }
        let locked = self.shared.lock();
        let checking = |locked: &mut Locked| locked.state == State::Checking;
        let waited = self.shared.changed.wait_while(locked, checking);
        match waited.unwrap_or_else(PoisonError::into_inner).error.take() {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// For reports.
    pub fn json(&self) -> Value {
        let shared = &self.shared;
        let pages = shared.pages.load(Ordering::Relaxed);
        let verified = shared.verified.load(Ordering::Relaxed);
        let verity = shared.verity.lock().unwrap_or_else(PoisonError::into_inner);
        let verity: Vec<Value> =
            verity.iter().map(|(path, digest)| json!({ "file": path, "digest": digest })).collect();
        let state = if shared.mode == Verify::Off && verified == 0 { "off" } else { shared.lock().state.name() };
        // The number is unknown without reading the page map.
        let unverified = (state != "off").then(|| pages.saturating_sub(verified));
        json!({
            "mode": shared.mode,
            "state": state,
            "pages": pages,
            "verified_pages": verified,
            "unverified_pages": unverified,
            "fs_verity": verity,
        })
    }
}

impl Drop for Verifier {
    fn drop(&mut self) {
        // A thread that waits for a hanging file is left alone: it does not touch guest memory.
        if let Some(thread) = self.thread.take() {
            thread.abandon(Instant::now() + PATIENCE);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Locked> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns true for the first caller, which makes the comparison that comes before the guest runs: the thread, or
    /// the main thread if a busy host has not run the thread until then.
    fn claim(&self) -> bool {
        !self.claimed.swap(true, Ordering::SeqCst)
    }

    fn run(&self, chain: &Chain, tiers: &[Arc<dyn Tier>]) {
        let result = self.check(chain, tiers);
        let mut locked = self.lock();
        if let Err(error) = result {
            let was_checking = locked.state == State::Checking;
            locked.state = State::Failed;
            // A thread that was asked to stop has compared the snapshot of a guest that is gone.
            if !was_checking
                && !locked.stop
                && let Some(ending) = self.ending.get()
            {
                drop(locked);
                ending.end(Ending::MemoryLost(errors::chain(&error)));
                return;
            }
            locked.error = Some(error);
        }
        drop(locked);
        self.changed.notify_all();
    }

    fn check(&self, chain: &Chain, tiers: &[Arc<dyn Tier>]) -> Result<(), Error> {
        let mut before = None;
        if self.claim() {
            before = Some(self.check_before(chain, tiers)?);
        }
        let is_checking = |locked: &mut Locked| locked.state == State::Checking && !locked.stop;
        drop(self.changed.wait_while(self.lock(), is_checking));
        if self.mode != Verify::Background || !self.wait(SETTLED) || self.lock().state != State::Sampled {
            return Ok(());
        }
        if let Err(error) = idle::become_idle() {
            tracing::warn!(%error, "Memory is verified at an ordinary priority");
        }
        let (mut sources, sampled) = match before {
            Some(before) => before,
            None => {
                let sources = self.sources(chain, tiers)?;
                self.verified.store(0, Ordering::Relaxed);
                let none = vec![Vec::new(); sources.len()];
                (sources, none)
            }
        };
        self.enter(State::Running);
        for (source, sampled) in sources.iter_mut().zip(&sampled) {
            if !self.compare_rest(source.as_mut(), sampled)? {
                return Ok(());
            }
        }
        self.enter(State::Done);
        Ok(())
    }

    /// Compares before the guest runs: a sample of each source, which is returned, or everything.
    fn check_before<'c>(&self, chain: &'c Chain, tiers: &[Arc<dyn Tier>]) -> Result<Compared<'c>, Error> {
        let mut sources = self.sources(chain, tiers)?;
        let per_source = (SAMPLES / sources.len().max(1)).max(SAMPLES_PER_LAYER_MIN);
        let mut sampled = Vec::new();
        for source in &mut sources {
            if self.mode == Verify::Full {
                source.read_past_the_cache();
                source.each(&mut |source, piece| self.compare(source, piece).map(|()| true))?;
                source.check_unheld(&mut || true)?;
                sampled.push(Vec::new());
                continue;
            }
            let samples = source.samples(per_source)?;
            for piece in &samples {
                self.compare(source.as_mut(), *piece)?;
            }
            sampled.push(samples);
        }
        self.enter(if self.mode == Verify::Full { State::Done } else { State::Sampled });
        Ok((sources, sampled))
    }

    /// The sources of the guest's pages.
    fn sources<'c>(&self, chain: &'c Chain, tiers: &[Arc<dyn Tier>]) -> Result<Vec<Box<dyn Source + 'c>>, Error> {
        let mut sources: Vec<Box<dyn Source + 'c>> = Vec::new();
        for tier in tiers {
            sources.push(Box::new(TierSource::open(tier.clone())?));
        }
        if tiers.is_empty() {
            for layer in chain.layers() {
                let source = LayerSource::open(layer)?;
                if let Some(digest) = &source.verity {
                    let mut known = self.verity.lock().unwrap_or_else(PoisonError::into_inner);
                    known.push((layer.memory_path().to_owned(), digest.clone()));
                }
                sources.push(Box::new(source));
            }
        }
        self.pages.store(sources.iter().map(|source| source.pages()).sum(), Ordering::Relaxed);
        Ok(sources)
    }

    fn compare(&self, source: &mut dyn Source, piece: Piece) -> Result<(), Error> {
        let pages = source.compare(piece)?;
        self.verified.fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }

    /// Compares the pages outside the sample. Returns false if the machine ended before.
    fn compare_rest(&self, source: &mut dyn Source, sampled: &[Piece]) -> Result<bool, Error> {
        if source.is_checked_by_the_kernel() {
            return Ok(true);
        }
        source.read_past_the_cache();
        // While it is held, other VMs leave the file alone: they would read the same bytes from the same disk.
        let Some(_turn) = self.wait_for_turn(source) else { return Ok(false) };
        let mut count = 0_usize;
        let mut pause = || {
            count += 1;
            !count.is_multiple_of(CHUNKS_AT_ONCE) || self.wait(PAUSE)
        };
        let mut goes_on = true;
        source.each(&mut |source, piece| {
            if sampled.contains(&piece) {
                return Ok(true);
            }
            self.compare(source, piece)?;
            goes_on = pause();
            Ok(goes_on)
        })?;
        if goes_on {
            source.check_unheld(&mut || {
                goes_on = pause();
                goes_on
            })?;
        }
        Ok(goes_on)
    }

    /// Waits until no other VM compares the file; `None` if the machine ends before.
    fn wait_for_turn(&self, source: &dyn Source) -> Option<Option<File>> {
        // If no lock can be had, the file is compared at the same time as by other VMs.
        let Some(file) = source.file().and_then(|file| reopened(file, 0).ok()) else { return Some(None) };
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                _ => return Some(Some(file)),
            }
            if !self.wait(TURN) {
                return None;
            }
        }
    }

    fn enter(&self, state: State) {
        self.lock().state = state;
        self.changed.notify_all();
    }

    /// Waits. Returns whether to go on.
    fn wait(&self, time: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), time, |locked| !locked.stop);
        !waited.unwrap_or_else(PoisonError::into_inner).0.stop
    }
}

/// At most [`CHUNK_PAGES`] pages that are compared at once, and their place in the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    extent: Extent,
    offset: u64,
}

/// Sources, and for each the pieces of it that were compared.
type Compared<'c> = (Vec<Box<dyn Source + 'c>>, Vec<Vec<Piece>>);

/// Called with each piece of a source. Returns whether to go on.
type EachPiece<'e> = &'e mut dyn FnMut(&mut dyn Source, Piece) -> Result<bool, Error>;

/// A source of guest pages. The verification thread calls all methods, or, before the guest runs, the main thread.
trait Source {
    /// Returns the number of its pages.
    fn pages(&self) -> u64;

    /// Returns the first and the last piece and random others, `count` in all, or all if there are no more.
    fn samples(&self, count: usize) -> Result<Vec<Piece>, Error>;

    /// Calls `each` with every piece.
    fn each(&mut self, each: EachPiece<'_>) -> Result<(), Error>;

    /// Compares a piece with its checksums. Returns the number of pages.
    fn compare(&mut self, piece: Piece) -> Result<u64, Error>;

    /// Compares with zeros the bytes that the source's file has outside its pages and that a mapping shows. Calls
    /// `goes_on` after each piece and stops if it returns false.
    fn check_unheld(&mut self, _goes_on: &mut dyn FnMut() -> bool) -> Result<(), Error> {
        Ok(())
    }

    /// Called once before the rest is compared. Everything is read past the page cache from then on: reading cached
    /// folios one after the other makes the kernel read ahead of them, whatever it was advised.
    fn read_past_the_cache(&mut self) {}

    /// The file that is locked while all of it is compared.
    fn file(&self) -> Option<&File>;

    /// Returns whether the kernel (fs-verity) refuses to show bytes other than those of the sealed file.
    fn is_checked_by_the_kernel(&self) -> bool {
        false
    }
}

struct LayerSource<'c> {
    layer: &'c Snapshot,
    map: Cow<'c, PageMap>,
    reader: Reader,
    buffer: Buffer,
    verity: Option<String>,
}

impl<'c> LayerSource<'c> {
    fn open(layer: &'c Snapshot) -> Result<Self, Error> {
        let failed =
            |source| Error::File { doing: "read guest memory from", path: layer.memory_path().to_owned(), source };
        Ok(LayerSource {
            layer,
            map: layer.borrow_page_map()?,
            reader: Reader::open(layer.memory()).map_err(failed)?,
            buffer: chunk_buffer()?,
            verity: verity::digest_of(layer.memory()),
        })
    }
}

impl Source for LayerSource<'_> {
    fn pages(&self) -> u64 {
        self.map.held().len()
    }

    fn samples(&self, count: usize) -> Result<Vec<Piece>, Error> {
        let chosen = chosen(self.map.checksums().len(), count)?;
        Ok(chosen.into_iter().filter_map(|index| self.map.chunk_at(index)).map(piece_of).collect())
    }

    fn each(&mut self, each: EachPiece<'_>) -> Result<(), Error> {
        let count = self.map.checksums().len();
        for index in 0..count {
            let Some(chunk) = self.map.chunk_at(index) else { break };
            if !each(self, piece_of(chunk))? {
                break;
            }
        }
        Ok(())
    }

    fn compare(&mut self, piece: Piece) -> Result<u64, Error> {
        let LayerSource { layer, map, reader, buffer, .. } = self;
        let chunk = piece.offset / (CHUNK_PAGES * PAGE_SIZE);
        let checked =
            layer.check_chunk(map, chunk, buffer.bytes_mut(), &mut |offset, bytes| reader.read(offset, bytes));
        checked.map_err(|error| unreadable(layer, map.chunk_runs(chunk).next().unwrap_or(piece.extent), error))
    }

    fn check_unheld(&mut self, goes_on: &mut dyn FnMut() -> bool) -> Result<(), Error> {
        let LayerSource { layer, map, reader, buffer, .. } = self;
        let layout = layer.layout();
        let unheld = layer.unheld_data(map)?;
        for pages in unheld.runs().flat_map(|run| layout.split(run)).flat_map(|run| run.chunks(CHUNK_PAGES)) {
            let read: ReadAt<'_> = &mut |offset, bytes| reader.read(offset, bytes);
            let checked = layer.check_zeros(pages, buffer.bytes_mut(), read);
            checked.map_err(|error| unreadable(layer, pages, error))?;
            if !goes_on() {
                break;
            }
        }
        Ok(())
    }

    fn read_past_the_cache(&mut self) {
        self.reader.uses_cache = false;
    }

    fn file(&self) -> Option<&File> {
        Some(self.layer.memory())
    }

    fn is_checked_by_the_kernel(&self) -> bool {
        self.verity.is_some()
    }
}

/// Turns a failure to read `pages` of a layer's memory file into the guest's error.
fn unreadable(layer: &Snapshot, pages: Extent, error: snapshot::Error) -> Error {
    match error {
        snapshot::Error::Io { path, source, .. } => {
            let offset = layer.layout().file_offset(pages.first).unwrap_or_default();
            Error::Lost(lost::sentence(pages.gpa(), &path, offset, &lost::cause_of(&source)))
        }
        other => other.into(),
    }
}

/// The piece of a checksum's chunk.
fn piece_of(chunk: u64) -> Piece {
    let extent = Extent { first: Gfn(chunk * CHUNK_PAGES), pages: CHUNK_PAGES };
    Piece { extent, offset: extent.gpa() }
}

struct TierSource {
    tier: Arc<dyn Tier>,
    /// Each run of pages, and where the tier has it.
    runs: Vec<Piece>,
    buffer: Buffer,
}

impl TierSource {
    fn open(tier: Arc<dyn Tier>) -> Result<Self, Error> {
        let runs = tier.runs()?.into_iter().map(|run| Piece { extent: run.extent, offset: run.offset }).collect();
        Ok(TierSource { tier, runs, buffer: chunk_buffer()? })
    }
}

impl Source for TierSource {
    fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.extent.pages).sum()
    }

    fn samples(&self, count: usize) -> Result<Vec<Piece>, Error> {
        let starts = chosen(self.runs.len(), count)?.into_iter().filter_map(|index| self.runs.get(index));
        Ok(starts.filter_map(|run| pieces_of(*run).next()).collect())
    }

    fn each(&mut self, each: EachPiece<'_>) -> Result<(), Error> {
        for index in 0..self.runs.len() {
            for piece in pieces_of(self.runs[index]) {
                if !each(self, piece)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn compare(&mut self, piece: Piece) -> Result<u64, Error> {
        let path = || self.tier.path().to_owned();
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::InvalidData => {
                Error::PoolMemory { path: path(), gpa: piece.extent.gpa(), bytes: piece.extent.bytes() }
            }
            _ => Error::Lost(lost::sentence(piece.extent.gpa(), &path(), piece.offset, &lost::cause_of(&source))),
        };
        let bytes = &mut self.buffer.bytes_mut()[..piece.extent.bytes() as usize];
        self.tier.read(piece.offset, bytes).map_err(failed)?;
        Ok(piece.extent.pages)
    }

    fn file(&self) -> Option<&File> {
        self.tier.mapping().map(|mapping| mapping.file)
    }
}

fn pieces_of(run: Piece) -> impl Iterator<Item = Piece> {
    run.extent
        .chunks(CHUNK_PAGES)
        .map(move |extent| Piece { extent, offset: run.offset + (extent.first.0 - run.extent.first.0) * PAGE_SIZE })
}

fn chunk_buffer() -> Result<Buffer, Error> {
    Buffer::new((CHUNK_PAGES * PAGE_SIZE) as usize).map_err(Error::os("make a read buffer"))
}

/// Returns `count` of `len` indices, ascending: the first, the last, and random others; all, if there are no more.
fn chosen(len: usize, count: usize) -> Result<Vec<usize>, Error> {
    if len <= count {
        return Ok((0..len).collect());
    }
    let mut random = vec![0; 8 * count.saturating_sub(2)];
    let filled = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
    filled.map_err(io::Error::from).map_err(Error::os("get random numbers"))?;
    let (words, _) = random.as_chunks::<8>();
    let mut chosen: Vec<usize> = words.iter().map(|word| u64::from_ne_bytes(*word) as usize % len).collect();
    chosen.extend([0, len - 1]);
    chosen.sort_unstable();
    chosen.dedup();
    Ok(chosen)
}

/// Opens the same file again, with its own flags, readahead and locks, even if its name has changed.
fn reopened(file: &File, flags: i32) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::OpenOptions::new().read(true).custom_flags(flags).open(Path::new(&path))
}

/// `FUSE_SUPER_MAGIC` of statfs(2).
const FUSE: i64 = 0x6573_5546;

/// Reads a file without changing its state in the page cache.
struct Reader {
    cached: File,
    /// `None` if the file system has no direct I/O, or none that can be interrupted.
    direct: Option<File>,
    /// True: cached bytes are read from the page cache, which is faster than any disk.
    uses_cache: bool,
}

impl Reader {
    fn open(file: &File) -> io::Result<Self> {
        let cached = reopened(file, 0)?;
        // No readahead, and reading does not mark pages as worth keeping. Kernels without these read all the same.
        let _ = rustix::fs::fadvise(&cached, 0, None, Advice::Random);
        let _ = rustix::fs::fadvise(&cached, 0, None, Advice::NoReuse);
        let direct = match reopened(file, libc::O_DIRECT) {
            // A direct read that a FUSE server does not answer is not even ended by SIGKILL.
            Ok(direct) => rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type != FUSE).then_some(direct),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => None,
            Err(error) => return Err(error),
        };
        Ok(Reader { cached, direct, uses_cache: true })
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        // If the kernel does not tell which pages are cached, everything is read past the cache.
        let resident = || page_cache::resident_in(&self.cached, offset, bytes.len() as u64).ok().flatten();
        let is_cached = self.uses_cache && resident() == Some(bytes.len() as u64 / PAGE_SIZE);
        if let Some(direct) = self.direct.as_ref().filter(|_| !is_cached) {
            match direct.read_exact_at(bytes, offset) {
                // The file system accepts the open and refuses the read.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => return result,
            }
        }
        self.cached.read_exact_at(bytes, offset)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn first_and_last_are_always_chosen_and_none_twice(len in 0_usize..5000, count in 2_usize..20) {
            let chosen = chosen(len, count).unwrap();
            prop_assert!(chosen.len() <= count && chosen.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(len == 0 || chosen.first() == Some(&0) && chosen.last() == Some(&(len - 1)));
            prop_assert!(len > count || chosen.len() == len);
        }
    }
}
