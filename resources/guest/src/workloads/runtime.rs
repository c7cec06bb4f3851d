//! The runtime image stands for a real function's interpreter and libraries. A tiny kernel has no such pages, and
//! without them the share of pages that functions only read would be far too small.
//!
//! Pages are touched as REAP measured it (Ustiugov et al., ASPLOS 2021): in runs of 2 to 5 consecutive
//! pages, 97 % of them the same whatever the input.

use alloc::vec::Vec;

use super::random::Random;
use crate::PAGE_WORDS;
use crate::digest::{Digest, mix2};
use crate::permute::Shuffle;

/// MiB of the image that the numbers in [`Touches`] are for; of a larger or smaller one, functions touch more or less.
pub const DEFAULT_MIB: u64 = 96;
/// Pages of the image that every function touches: the interpreter itself.
pub const CORE_PAGES: u64 = 2048;
/// Each run has a slot of this many pages for itself, so that runs never touch each other.
const SLOT: u64 = 8;
const RUN_MIN: u64 = 2;
const RUN_MAX: u64 = 5;
/// Runs in 100 that depend on the input.
const VARYING: u64 = 3;
const CORE_SEED: u64 = 2;
/// Kinds of repeated lines: deflate finds them within its window.
const KINDS: u64 = 192;

type Page = [u64; PAGE_WORDS as usize];

/// A function's touches of an image of [`DEFAULT_MIB`].
#[derive(Clone, Copy, Debug)]
pub struct Touches {
    /// Pages touched, [`CORE_PAGES`] at least.
    pub pages: u64,
    /// Runs in 100 that are written, not read.
    pub written_percent: u64,
}

/// The image.
pub struct Runtime {
    pages: Vec<Page>,
}

impl Runtime {
    /// An image of `mib` MiB. No page is zero. Deflate halves it, roughly as it does the text and data of a real
    /// runtime: lines of 64 bytes, half of which are of 192 kinds.
    pub fn new(mib: u64) -> Self {
        let mut random = Random::new(mix2(CORE_SEED, mib));
        let lines: Vec<[u64; 8]> = (0..KINDS).map(|_| core::array::from_fn(|_| symbols(&mut random))).collect();
        let count = (mib << 20 >> 12) as usize;
        let mut pages = Vec::with_capacity(count);
        for _ in 0..count {
            let mut page = [0; PAGE_WORDS as usize];
            for line in page.as_chunks_mut::<8>().0 {
                *line = match random.word() % 2 {
                    0 => *random.pick(&lines),
                    _ => core::array::from_fn(|_| symbols(&mut random)),
                };
            }
            pages.push(page);
        }
        Self { pages }
    }

    pub fn pages(&self) -> u64 {
        self.pages.len() as u64
    }

    fn slots(&self) -> u64 {
        self.pages() / SLOT
    }

    /// Touches one run. Reads see the first half of a page and writes change the second, so that the bytes read never
    /// depend on earlier writes.
    fn touch(&mut self, run: Run, tally: &mut Tally) {
        let pages = &mut self.pages[run.first as usize..(run.first + run.pages) as usize];
        for page in pages {
            let word = (run.key % (PAGE_WORDS / 2)) as usize;
            if run.write {
                page[word + PAGE_WORDS as usize / 2] = run.key | 1;
                tally.written += 1;
            } else {
                tally.digest.word(page[word]);
                tally.read += 1;
            }
        }
    }
}

/// Eight bytes of an alphabet of 64.
fn symbols(random: &mut Random) -> u64 {
    random.word() & 0x3f3f_3f3f_3f3f_3f3f | 0x4040_4040_4040_4040
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u64,
    pages: u64,
    write: bool,
    key: u64,
}

/// The touches so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub digest: Digest,
    pub read: u64,
    pub written: u64,
}

/// The runs that one invocation touches, in order. The core first, as in an interpreter that receives a request, the
/// rest while the function makes progress.
#[derive(Clone, Copy, Debug)]
struct Plan {
    slots: u64,
    core: u64,
    own: u64,
    written_percent: u64,
    function: u64,
    input: u64,
}

impl Plan {
    fn new(slots: u64, touches: Touches, function: u64, input: u64) -> Self {
        let runs = |pages: u64| pages * 2 / (RUN_MIN + RUN_MAX) * slots / (DEFAULT_MIB << 20 >> 12).div_ceil(SLOT);
        // Slots must be left for the runs that vary.
        let core = runs(CORE_PAGES).min(slots / 2);
        let own = runs(touches.pages.saturating_sub(CORE_PAGES)).min((slots - core) * 3 / 4);
        Self { slots, core, own, written_percent: touches.written_percent, function, input }
    }

    fn run(&self, index: u64) -> Run {
        let owner = if index < self.core { CORE_SEED } else { self.function };
        let key = mix2(owner, index);
        let varies = key % 100 < VARYING;
        let others = self.slots - self.core;
        let core = Shuffle::new(self.slots, CORE_SEED);
        let own = Shuffle::new(others, self.function);
        let slot = match index.checked_sub(self.core) {
            _ if varies => {
                let spare = others - self.own;
                core.at(self.core + own.at(self.own + (index + mix2(self.input, owner) % spare) % spare))
            }
            None => core.at(index),
            Some(index) => core.at(self.core + own.at(index)),
        };
        let pages = RUN_MIN + (key >> 8) % (RUN_MAX - RUN_MIN + 1);
        let first = slot * SLOT + (key >> 16) % (SLOT - RUN_MAX);
        let write = (key >> 32) % 100 < self.written_percent;
        Run { first, pages, write, key: mix2(key, pages) }
    }
}

/// A function's way through the runtime image.
pub struct Pace<'a> {
    runtime: Option<(&'a mut Runtime, Plan)>,
    next: u64,
    tally: Tally,
}

impl<'a> Pace<'a> {
    /// Begins an invocation of `function` (a hash of its name) with `input` (any hash): touches the core.
    pub fn begin(runtime: Option<&'a mut Runtime>, touches: Touches, function: u64, input: u64) -> Self {
        let runtime = runtime.filter(|runtime| runtime.slots() > 1);
        let planned = runtime.map(|runtime| {
            let plan = Plan::new(runtime.slots(), touches, function, input);
            (runtime, plan)
        });
        let mut pace = Self { runtime: planned, next: 0, tally: Tally::default() };
        let core = pace.runtime.as_ref().map_or(0, |(_, plan)| plan.core);
        pace.advance(core);
        pace
    }

    /// The function has done `done` of `total` steps.
    pub fn at(&mut self, done: u64, total: u64) {
        let Some((_, plan)) = &self.runtime else { return };
        let until = plan.core + plan.own * done.min(total) / total.max(1);
        self.advance(until);
    }

    /// Ends the invocation: touches the remaining runs.
    pub fn end(mut self) -> Tally {
        self.at(1, 1);
        self.tally
    }

    fn advance(&mut self, until: u64) {
        let Some((runtime, plan)) = &mut self.runtime else { return };
        while self.next < until {
            runtime.touch(plan.run(self.next), &mut self.tally);
            self.next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const TOUCHES: Touches = Touches { pages: 6000, written_percent: 30 };

    fn runs(function: u64, input: u64) -> Vec<Run> {
        let plan = Plan::new((DEFAULT_MIB << 20 >> 12) / SLOT, TOUCHES, function, input);
        (0..plan.core + plan.own).map(|index| plan.run(index)).collect()
    }

    fn pages(runs: &[Run]) -> BTreeSet<u64> {
        runs.iter().flat_map(|run| run.first..run.first + run.pages).collect()
    }

    #[test]
    fn runs_have_two_to_five_pages_and_do_not_touch_each_other() {
        let all = pages(&runs(1, 1));
        let mut lengths = [0; 10];
        for &page in all.iter().filter(|page| **page == 0 || !all.contains(&(**page - 1))) {
            lengths[(page..).take_while(|page| all.contains(page)).count()] += 1;
        }
        assert!((2..=5).all(|length| lengths[length] > 100), "{lengths:?}");
        assert_eq!(lengths[2..=5].iter().sum::<i32>(), lengths.iter().sum::<i32>(), "{lengths:?}");
    }

    #[test]
    fn working_set_has_the_stated_size_and_share_of_writes() {
        let runs = runs(1, 1);
        let all = pages(&runs).len() as i64;
        assert!((all - TOUCHES.pages as i64).abs() < 150, "{all}");
        let written: u64 = runs.iter().filter(|run| run.write).map(|run| run.pages).sum();
        assert!((25..=35).contains(&(written as i64 * 100 / all)), "{written} of {all}");
    }

    #[test]
    fn another_input_touches_97_percent_the_same_pages_and_another_function_the_core() {
        let a = pages(&runs(1, 1));
        let same = a.intersection(&pages(&runs(1, 2))).count() * 100 / a.len();
        assert!((95..=98).contains(&same), "{same} %");
        let core = a.intersection(&pages(&runs(2, 1))).count() as u64;
        assert!((CORE_PAGES * 95 / 100..TOUCHES.pages * 2 / 3).contains(&core), "{core} pages");
    }

    #[test]
    fn image_has_no_zero_page_and_is_as_compressible_as_text() {
        let runtime = Runtime::new(4);
        assert!(runtime.pages.iter().all(|page| page.iter().all(|word| *word != 0)));
        let bytes: Vec<u8> = runtime.pages.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
        let ratio = bytes.len() as f64 / miniz_oxide::deflate::compress_to_vec(&bytes, 6).len() as f64;
        assert!((1.8..2.2).contains(&ratio), "{ratio}");
    }

    #[test]
    fn reads_do_not_depend_on_earlier_writes_nor_on_the_steps_of_progress() {
        let mut runtime = Runtime::new(8);
        let mut invoke = |steps: u64, written_percent: u64| {
            let mut pace = Pace::begin(Some(&mut runtime), Touches { pages: 6000, written_percent }, 1, 1);
            (0..steps).for_each(|step| pace.at(step, steps));
            let tally = pace.end();
            (tally.digest.finish(), tally.read, tally.written)
        };
        let first = invoke(3, 40);
        assert!(first.1 > 200 && first.2 > 100, "{first:?}");
        invoke(1, 100);
        assert_eq!(invoke(100, 40), first);
    }

    #[test]
    fn tiny_and_absent_images_are_touched_within_their_bounds() {
        let mut runtime = Runtime::new(1);
        assert!(Pace::begin(Some(&mut runtime), TOUCHES, 1, 1).end().read > 10);
        let tally = Pace::begin(None, TOUCHES, 1, 1).end();
        assert_eq!((tally.read, tally.written), (0, 0));
    }
}
