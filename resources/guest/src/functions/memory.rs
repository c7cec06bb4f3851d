//! `fill`, `touch`, `check`: a working set whose contents are known and whose accesses are exact.

use super::{Ctx, Reply};
use crate::alloc::{Pages, address, frames};
use crate::clock;
use tvmm_guest::args::{Args, Message};
use tvmm_guest::digest::{Digest, PageDigest, mix2, page_key, pattern};
use tvmm_guest::frames::Run;
use tvmm_guest::permute::{Order, Shuffle, Stride};
use tvmm_guest::{PAGE_SIZE, PAGE_WORDS, message};

const REGIONS_MAX: usize = 512;

type Page = [u64; PAGE_WORDS as usize];

/// All filled pages, in the order they were filled: one array of pages for `touch` and `check`.
#[derive(Clone, Copy)]
pub struct Filled {
    runs: [Run; REGIONS_MAX],
    len: usize,
}

impl Filled {
    pub const fn new() -> Self {
        Self { runs: [Run { first: 0, pages: 0 }; REGIONS_MAX], len: 0 }
    }

    pub fn pages(&self) -> u64 {
        self.runs().iter().map(|r| r.pages).sum()
    }

    /// Gives all pages back to `pages`. After an error the rest is still filled.
    pub fn free(&mut self, pages: &mut Pages) -> Result<(), tvmm_guest::frames::Error> {
        while let Some(run) = self.runs().last().copied() {
            // SAFETY: only this list refers to the pages, and it forgets them.
            unsafe { pages.free(run)? };
            self.len -= 1;
        }
        Ok(())
    }

    pub fn runs(&self) -> &[Run] {
        &self.runs[..self.len]
    }

    /// Address of a page by its index; the index must be below [`Self::pages`].
    #[inline]
    fn page(&self, mut index: u64) -> u64 {
        for run in self.runs() {
            if index < run.pages {
                return address(*run) + index * PAGE_SIZE;
            }
            index -= run.pages;
        }
        unreachable!("page index beyond the filled pages");
    }

    /// Appends `count` pages, contiguous if possible, else the lowest free runs. Returns the index
    /// of the first new run; on an error nothing has changed.
    fn grow(&mut self, count: u64, pages: &mut Pages) -> Result<usize, Message> {
        let begin = self.len;
        let mut left = count;
        while left > 0 {
            let run = match self.len {
                REGIONS_MAX => Err(message!("more than {REGIONS_MAX} runs are filled")),
                _ => pages
                    .alloc(left)
                    .or_else(|_| pages.alloc_up_to(left))
                    .map_err(|e| message!("{e}: {} pages are free", pages.free_pages())),
            };
            match run {
                Ok(run) => {
                    self.runs[self.len] = run;
                    self.len += 1;
                    left -= run.pages;
                }
                Err(message) => {
                    self.shrink(begin, pages);
                    return Err(message);
                }
            }
        }
        Ok(begin)
    }

    fn shrink(&mut self, len: usize, pages: &mut Pages) {
        while self.len > len {
            self.len -= 1;
            // Cannot fail: taking the run away left room for it in the list of free runs.
            let _ = pages.free_untouched(self.runs[self.len]);
        }
    }
}

/// `fill pages=N [seed=S] [cpu=K]`: allocates pages and writes every word of them.
pub fn fill(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let count = args.number_in("pages", 1..=ctx.pages.free_pages().max(1), 0)?;
    let seed = args.number("seed")?.unwrap_or(0);
    check_cpu(args, ctx)?;
    let begin = ctx.filled.grow(count, &mut ctx.pages)?;
    let filled = ctx.filled;
    let runs = &filled.runs()[begin..];
    ctx.on_cpu(args, &mut |_| {
        for (index, frame) in runs.iter().flat_map(|r| frames(*r)).enumerate() {
            let key = page_key(seed, index as u64);
            // SAFETY: the page is RAM, mapped, and was allocated to this fill only.
            let page = unsafe { &mut *((frame * PAGE_SIZE) as *mut Page) };
            for (word, to) in page.iter_mut().enumerate() {
                *to = pattern(key, word as u64);
            }
        }
    })?;
    let gpa = address(runs[0]);
    let digest = mix2(seed, count);
    Ok(Reply::new(digest, format_args!("pages={count} gpa={gpa:#x} runs={}", runs.len())))
}

/// `touch pages=N [write=P] [stride=K | seed=S] [cpu=K]`: reads or writes one word of each of N
/// distinct filled pages.
pub fn touch(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let total = ctx.filled.pages();
    if total == 0 {
        return Err(message!("nothing is filled"));
    }
    let count = args.number_in("pages", 1..=total, 0)?;
    let write = args.number_in("write", 0..=100, 0)?;
    let seed = args.number("seed")?.unwrap_or(0);
    let stride = args.number_in("stride", 1..=u64::MAX, 1)?;
    let order = match (seed, stride) {
        (0, _) => Order::Stride(Stride::new(total, stride)),
        (_, 1) => Order::Shuffle(Shuffle::new(total, seed)),
        _ => return Err(message!("seed and stride exclude each other")),
    };
    check_cpu(args, ctx)?;
    let filled = ctx.filled;
    let (mut digest, mut written) = (Digest::new(), 0);
    ctx.on_cpu(args, &mut |_| {
        for i in 0..count {
            let page = order.at(i);
            let hash = mix2(seed, page);
            let word = (filled.page(page) + (hash >> 32) % PAGE_WORDS * 8) as *mut u64;
            // SAFETY: a filled page: RAM, mapped, and without references into it. Volatile, so that there is exactly
            // this one access: a written page is never read first, a read page never written.
            unsafe {
                if hash % 100 < write {
                    word.write_volatile(hash | 1);
                    written += 1;
                } else {
                    digest.word(word.read_volatile());
                }
            }
        }
    })?;
    let read = count - written;
    Ok(Reply::new(digest.finish(), format_args!("read={read} written={written}")))
}

/// Words of a cache line.
const LINE_WORDS: u64 = 8;

/// `scan pages=N [lines=L] [passes=K] [line_ns=T]`: reads one word of each of L cache lines (a power of two) of the
/// first N filled pages, K times over, and waits T ns after each line, as a load from farther memory would take longer.
pub fn scan(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let count = args.number_in("pages", 1..=ctx.filled.pages().max(1), 0)?;
    if ctx.filled.pages() == 0 {
        return Err(message!("nothing is filled"));
    }
    let passes = args.number_in("passes", 1..=1 << 20, 1)?;
    let lines = args.number_in("lines", 1..=PAGE_WORDS / LINE_WORDS, PAGE_WORDS / LINE_WORDS)?;
    if !lines.is_power_of_two() {
        return Err(message!("lines={lines} is not a power of two"));
    }
    let step = (PAGE_WORDS / lines) as usize;
    let line_ns = args.number_in("line_ns", 0..=100_000, 0)?;
    let filled = ctx.filled;
    let mut digest = Digest::new();
    let mut rounds = 0;
    ctx.on_cpu(args, &mut |slot| {
        rounds = rounds_of(line_ns, slot);
        for _ in 0..passes {
            for frame in filled.runs().iter().flat_map(|run| frames(*run)).take(count as usize) {
                // SAFETY: a filled page: RAM, mapped, and not written meanwhile.
                let page = unsafe { &*((frame * PAGE_SIZE) as *const Page) };
                let mut sum = 0_u64;
                for word in page.iter().step_by(step) {
                    sum = sum.rotate_left(1) ^ *word;
                    wait(rounds);
                }
                digest.word(sum);
            }
        }
    })?;
    let loads = count * passes * lines;
    Ok(Reply::new(digest.finish(), format_args!("loads={loads} rounds={rounds}")))
}

/// Turns a loop that no compiler or CPU can leave out.
#[inline]
fn wait(rounds: u64) {
    if rounds > 0 {
        // SAFETY: counts a register down to 0.
        unsafe { core::arch::asm!("2: dec {0}", "jnz 2b", inout(reg) rounds => _, options(nomem, nostack)) };
    }
}

/// The number of rounds of [`wait`] in `ns`, measured now.
fn rounds_of(ns: u64, slot: usize) -> u64 {
    const MEASURED: u64 = 1 << 22;
    let start = clock::now_ns(slot);
    wait(MEASURED);
    let took = clock::now_ns(slot).saturating_sub(start).max(1);
    MEASURED * ns / took
}

/// The first word of a page that `march` writes to.
const MARCH: u64 = u64::from_le_bytes(*b"tvmmarch");

/// `march pages=N ms=T`: writes the numbers 1, 2, 3… to the first N filled pages, one after another and round and
/// round, for T ms. Each page has a mark, its index and the last number written to it, so a copy of memory at one
/// instant has every number but the oldest: no number without the one before.
pub fn march(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let count = args.number_in("pages", 1..=ctx.filled.pages().max(1), 0)?;
    let ms = args.number_in("ms", 1..=600_000, 1)?;
    if ctx.filled.pages() == 0 {
        return Err(message!("nothing is filled"));
    }
    let end_ns = clock::now_ns(0) + ms * 1_000_000;
    let mut number = 0;
    while clock::now_ns(0) < end_ns {
        for index in 0..count {
            let page = ctx.filled.page(index) as *mut u64;
            number += 1;
            // SAFETY: a filled page: RAM, mapped, and without references into it. Volatile: the stores happen in order.
            unsafe {
                page.add(1).write_volatile(index);
                page.add(2).write_volatile(number);
                page.write_volatile(MARCH);
            }
        }
    }
    Ok(Reply::new(number, format_args!("last={number}")))
}

/// `check [cpu=K]`: digest of every word of all filled pages.
pub fn check(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    check_cpu(args, ctx)?;
    let filled = ctx.filled;
    let mut digest = PageDigest::new();
    ctx.on_cpu(args, &mut |_| {
        for frame in filled.runs().iter().flat_map(|r| frames(*r)) {
            // SAFETY: a filled page: RAM, mapped, and not written meanwhile.
            digest.page(unsafe { &*((frame * PAGE_SIZE) as *const Page) });
        }
    })?;
    Ok(Reply::new(digest.finish(), format_args!("pages={}", filled.pages())))
}

/// Refuses a bad `cpu=` before anything has changed.
fn check_cpu(args: &Args, ctx: &Ctx) -> Result<(), Message> {
    args.number_in("cpu", 0..=ctx.cpus.count() as u64 - 1, 0).map(|_| ())
}
