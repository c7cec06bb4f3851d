//! Fills memory from files in the fewest reads: bytes that follow one another in a file are read by one call wherever
//! their pages go in memory, and large amounts are read by several threads.
//!
//! Cached files are read by vectored calls straight into place. So are large parts past the page cache. Small parts go
//! through a buffer of each thread, because for the device thousands of single pages are thousands of transfers
//! (measured: 64 MiB of single pages take 41 ms straight into place, and 16 ms into a buffer while the other thread
//! copies).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZero;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::files::Files;
use crate::memory::Error;
use crate::snapshot::{PAGE_SIZE, PageOrigin, PageSource};
use crate::sys::mapping::Buffer;
use crate::sys::worker;
use crate::tiering::cold;
use crate::tiering::tier::Tier;

/// Memory to be filled, and from where.
pub struct Wanted<'m> {
    pub source: PageSource,
    pub bytes: &'m mut [u8],
}

/// The result of filling memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Filled {
    /// System calls that read.
    pub calls: u64,
    /// Threads that made them.
    pub threads: u64,
    /// All of it was read past the page cache.
    pub direct: bool,
}

/// Parts of one vectored read (`UIO_MAXIOV`, Linux `include/uapi/linux/uio.h`).
const PARTS: usize = 1024;
/// An additional thread pays from so many bytes on: starting one costs about as long as reading half of that.
const BYTES_PER_THREAD: usize = 2 << 20;
/// More threads would only wait for memory or for the device.
const THREADS: usize = 4;
/// Cached files are read in pieces of this size, so that no thread has to wait long for the last one.
const CACHED_PIECE: usize = 4 << 20;
/// Parts that are shorter than this are small.
const SMALL: usize = 64 << 10;
/// Long calls keep the device busiest; the kernel takes a little under 2 GiB in one.
const DIRECT_PIECE: usize = 1 << 30;

/// Bytes that follow one another in a file.
struct Batch<'m> {
    source: PageSource,
    /// All its parts are small; else none is.
    small: bool,
    parts: Vec<&'m mut [u8]>,
    len: usize,
}

impl Batch<'_> {
    fn bytes(&self) -> Vec<&[u8]> {
        self.parts.iter().map(|part| &**part).collect()
    }
}

/// Fills all of `wanted`; `direct`: past the page cache, where the file system can.
pub fn fill(files: &Files, wanted: Vec<Wanted<'_>>, direct: bool) -> Result<Filled, Error> {
    let Some(pool) = files.cold() else { return fill_near(files, wanted, direct) };
    let (far, near): (Vec<_>, Vec<_>) =
        wanted.into_iter().partition(|wanted| files.cold_source(wanted.source.origin).is_some());
    let far = far.into_iter().map(|Wanted { source, bytes }| (source.offset, bytes)).collect();
    let failed = |source| Error::File { doing: "fetch guest memory from", path: pool.name().into(), source };
    let threads = cold::fill(pool, far).map_err(failed)? as u64;
    let filled = fill_near(files, near, direct)?;
    Ok(Filled { threads: filled.threads.max(threads), ..filled })
}

/// As [`fill`], from files and tiers of this host.
fn fill_near(files: &Files, wanted: Vec<Wanted<'_>>, direct: bool) -> Result<Filled, Error> {
    let total: usize = wanted.iter().map(|wanted| wanted.bytes.len()).sum();
    let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = (total / BYTES_PER_THREAD).clamp(1, cpus.min(THREADS));
    let piece = if direct {
        total.div_ceil(threads).next_multiple_of(PAGE_SIZE as usize).clamp(BYTES_PER_THREAD, DIRECT_PIECE)
    } else {
        CACHED_PIECE
    };
    let batches = batches(wanted, piece);
    let threads = threads.min(batches.len().max(1));
    let work = Work {
        files,
        direct: if direct { open_direct(files, &batches)? } else { BTreeMap::new() },
        batches: Mutex::new(batches.into_iter()),
        calls: AtomicU64::new(0),
        all_direct: AtomicBool::new(direct),
    };
    let threads = worker::share("reads", threads, || work.run())?;
    let calls = work.calls.into_inner();
    let direct = work.all_direct.into_inner();
    Ok(Filled { calls, threads: threads as u64, direct })
}

/// Joins parts that follow one another in a file, up to `piece` bytes and [`PARTS`] parts each.
fn batches(mut wanted: Vec<Wanted<'_>>, piece: usize) -> Vec<Batch<'_>> {
    wanted.sort_unstable_by_key(|wanted| (wanted.source.origin, wanted.source.offset));
    let mut out: Vec<Batch> = Vec::new();
    for Wanted { mut source, bytes } in wanted {
        let small = bytes.len() < SMALL;
        let piece = if small { piece.min(CACHED_PIECE) } else { piece };
        let mut rest = bytes;
        while !rest.is_empty() {
            let open = out.last_mut().filter(|last| {
                let follows = last.source.offset + last.len as u64 == source.offset;
                let alike = last.source.origin == source.origin && last.small == small;
                alike && follows && last.parts.len() < PARTS && last.len < piece
            });
            let room = open.as_ref().map_or(piece, |last| piece - last.len);
            let (part, behind) = rest.split_at_mut(rest.len().min(room));
            rest = behind;
            let next = PageSource { offset: source.offset + part.len() as u64, ..source };
            match open {
                Some(last) => {
                    last.len += part.len();
                    last.parts.push(part);
                }
                None => out.push(Batch { source, small, len: part.len(), parts: vec![part] }),
            }
            source = next;
        }
    }
    out
}

/// The files of the batches, opened to be read past the page cache; `None` where the file system cannot.
fn open_direct(files: &Files, batches: &[Batch]) -> Result<BTreeMap<PageOrigin, Option<File>>, Error> {
    let mut opened = BTreeMap::new();
    for batch in batches {
        let origin = batch.source.origin;
        if opened.contains_key(&origin) || files.tier(origin).is_some() {
            continue;
        }
        let (_, path) = files.require(origin)?;
        let file = match Files::open_direct(path) {
            Ok(file) => Some(file),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => None,
            Err(source) => return Err(Error::File { doing: "open directly", path: path.to_owned(), source }),
        };
        opened.insert(origin, file);
    }
    Ok(opened)
}

struct Work<'a, 'm> {
    files: &'a Files,
    direct: BTreeMap<PageOrigin, Option<File>>,
    batches: Mutex<std::vec::IntoIter<Batch<'m>>>,
    calls: AtomicU64,
    all_direct: AtomicBool,
}

impl Work<'_, '_> {
    /// Reads batches until there are none.
    fn run(&self) -> Result<(), Error> {
        let mut buffer = None;
        loop {
            let next = self.batches.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
            match next {
                Some(batch) => self.read(batch, &mut buffer)?,
                None => return Ok(()),
            }
        }
    }

    fn read(&self, mut batch: Batch, buffer: &mut Option<Buffer>) -> Result<(), Error> {
        if let Some(tier) = self.files.tier(batch.source.origin) {
            return self.read_tier(tier.as_ref(), batch);
        }
        let (file, path) = self.files.require(batch.source.origin)?;
        let failed = |doing, path: &Path, source| Error::File { doing, path: path.to_owned(), source };
        if let Some(direct) = self.direct.get(&batch.source.origin).and_then(Option::as_ref) {
            let result = if batch.small && batch.parts.len() > 1 {
                self.read_through(direct, &mut batch, buffer)
            } else {
                self.read_parts(direct, &mut batch)
            };
            match result {
                // The file system accepts the open and refuses the read.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => {
                    result.map_err(|error| failed("read directly", path, error))?;
                    return self.files.verify_image(batch.source, &batch.bytes());
                }
            }
        }
        self.all_direct.store(false, Ordering::Relaxed);
        self.read_parts(file, &mut batch).map_err(|error| failed("read guest memory from", path, error))?;
        self.files.verify_image(batch.source, &batch.bytes())
    }

    /// All parts from a tier, which checks them.
    fn read_tier(&self, tier: &dyn Tier, mut batch: Batch) -> Result<(), Error> {
        self.all_direct.store(false, Ordering::Relaxed);
        let failed = |source| Error::File { doing: "read guest memory from", path: tier.path().to_owned(), source };
        let offset = batch.source.offset;
        if let Some(mapping) = tier.mapping().filter(|mapping| mapping.readable) {
            batch.source.offset += mapping.base;
            self.read_parts(mapping.file, &mut batch).map_err(failed)?;
            return tier.verify(offset, &batch.bytes()).map_err(failed);
        }
        let mut at = offset;
        for part in batch.parts {
            tier.read(at, part).map_err(failed)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// All parts from one file, through a buffer.
    fn read_through(&self, file: &File, batch: &mut Batch, buffer: &mut Option<Buffer>) -> io::Result<()> {
        let buffer = match buffer {
            Some(buffer) => buffer,
            None => buffer.insert(Buffer::new(CACHED_PIECE)?),
        };
        // A batch of small parts is no longer than the buffer.
        let mut bytes = &mut buffer.bytes_mut()[..batch.len];
        self.read_all(file, &mut [IoSliceMut::new(bytes)], batch.source.offset)?;
        for part in &mut batch.parts {
            let (of_part, rest) = bytes.split_at_mut(part.len());
            part.copy_from_slice(of_part);
            bytes = rest;
        }
        Ok(())
    }

    /// All parts from one file, straight into place.
    fn read_parts(&self, file: &File, batch: &mut Batch) -> io::Result<()> {
        let mut slices: Vec<IoSliceMut> = batch.parts.iter_mut().map(|part| IoSliceMut::new(part)).collect();
        self.read_all(file, &mut slices, batch.source.offset)
    }

    /// In as many calls as it takes.
    fn read_all(&self, file: &File, mut rest: &mut [IoSliceMut], mut offset: u64) -> io::Result<()> {
        while !rest.is_empty() {
            self.calls.fetch_add(1, Ordering::Relaxed);
            match rustix::io::preadv(file, rest, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    offset += read as u64;
                    IoSliceMut::advance_slices(&mut rest, read);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(layer: usize, offset: u64) -> PageSource {
        PageSource::layer(layer, offset)
    }

    fn shape(batches: &[Batch]) -> Vec<(PageSource, Vec<usize>)> {
        batches.iter().map(|batch| (batch.source, batch.parts.iter().map(|part| part.len()).collect())).collect()
    }

    #[test]
    fn what_follows_on_in_a_file_is_one_read_wherever_it_goes() {
        let mut a = [0; 3];
        let mut b = [0; 3];
        let mut c = [0; 4];
        let mut d = [0; 1];
        let wanted = vec![
            Wanted { source: source(1, 5), bytes: &mut c },
            Wanted { source: source(1, 2), bytes: &mut b },
            Wanted { source: source(0, 5), bytes: &mut a },
            Wanted { source: source(1, 10), bytes: &mut d },
        ];
        let expected = [(source(0, 5), vec![3]), (source(1, 2), vec![3, 4]), (source(1, 10), vec![1])];
        assert_eq!(shape(&batches(wanted, 100)), expected);
    }

    #[test]
    fn long_reads_are_cut_into_pieces_and_many_parts_into_calls() {
        let mut long = [0; 25];
        let wanted = vec![Wanted { source: source(0, 0), bytes: &mut long }];
        let expected = [(source(0, 0), vec![10]), (source(0, 10), vec![10]), (source(0, 20), vec![5])];
        assert_eq!(shape(&batches(wanted, 10)), expected);
        let mut pages = vec![0; 2500];
        let each = pages.chunks_mut(1).enumerate();
        let wanted = each.map(|(at, bytes)| Wanted { source: source(0, at as u64), bytes }).collect();
        let parts: Vec<usize> = batches(wanted, 1 << 20).iter().map(|batch| batch.parts.len()).collect();
        assert_eq!(parts, [PARTS, PARTS, 2500 - 2 * PARTS]);
    }
}
