//! The bookkeeping of the page allocator: a sorted list of free runs in a fixed array.
//!
//! First fit, lowest address first. The list is a few cache lines however much RAM there is, so
//! that booting and allocating dirty next to nothing.

/// A run of pages: frame number of the first and how many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    pub first: u64,
    pub pages: u64,
}

impl Run {
    const fn end(self) -> u64 {
        self.first + self.pages
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// A run of zero pages, or one that ends beyond the last frame number.
    BadRun,
    /// No free run is long enough.
    NoMemory,
    /// The list has no room for one more run.
    ListFull,
    /// Pages that are free already were freed.
    NotAllocated,
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::BadRun => "bad page count",
            Self::NoMemory => "not enough free memory",
            Self::ListFull => "memory is too fragmented: list of free runs is full",
            Self::NotAllocated => "pages are not allocated",
        })
    }
}

/// Free runs, sorted by address, never touching each other. `N` is the most there can be.
#[derive(Debug)]
pub struct FreeList<const N: usize> {
    runs: [Run; N],
    len: usize,
    free: u64,
}

impl<const N: usize> FreeList<N> {
    pub const fn new() -> Self {
        Self { runs: [Run { first: 0, pages: 0 }; N], len: 0, free: 0 }
    }

    /// Pages that are free, all runs together.
    pub fn free_pages(&self) -> u64 {
        self.free
    }

    /// Pages of the longest free run.
    pub fn longest(&self) -> u64 {
        self.list().iter().map(|run| run.pages).max().unwrap_or(0)
    }

    /// The lowest run of exactly `pages` contiguous pages.
    pub fn alloc(&mut self, pages: u64) -> Result<Run, Error> {
        if pages == 0 {
            return Err(Error::BadRun);
        }
        let i = self.list().iter().position(|r| r.pages >= pages);
        i.map(|i| self.take(i, pages)).ok_or(Error::NoMemory)
    }

    /// The lowest free pages, as many as are contiguous there but no more than `pages`.
    pub fn alloc_up_to(&mut self, pages: u64) -> Result<Run, Error> {
        match self.list().first() {
            _ if pages == 0 => Err(Error::BadRun),
            None => Err(Error::NoMemory),
            Some(r) => Ok(self.take(0, pages.min(r.pages))),
        }
    }

    /// Makes `run` free. On an error nothing has changed.
    pub fn free(&mut self, run: Run) -> Result<(), Error> {
        if run.pages == 0 || run.first.checked_add(run.pages).is_none() {
            return Err(Error::BadRun);
        }
        let i = self.list().partition_point(|r| r.first < run.first);
        if i > 0 && self.runs[i - 1].end() > run.first {
            return Err(Error::NotAllocated);
        }
        if i < self.len && run.end() > self.runs[i].first {
            return Err(Error::NotAllocated);
        }
        let joins_left = i > 0 && self.runs[i - 1].end() == run.first;
        let joins_right = i < self.len && run.end() == self.runs[i].first;
        match (joins_left, joins_right) {
            (true, true) => {
                self.runs[i - 1].pages += run.pages + self.runs[i].pages;
                self.remove(i);
            }
            (true, false) => self.runs[i - 1].pages += run.pages,
            (false, true) => {
                self.runs[i].first = run.first;
                self.runs[i].pages += run.pages;
            }
            (false, false) => {
                if self.len == N {
                    return Err(Error::ListFull);
                }
                self.runs.copy_within(i..self.len, i + 1);
                self.runs[i] = run;
                self.len += 1;
            }
        }
        self.free += run.pages;
        Ok(())
    }

    fn list(&self) -> &[Run] {
        &self.runs[..self.len]
    }

    fn take(&mut self, i: usize, pages: u64) -> Run {
        let run = Run { first: self.runs[i].first, pages };
        self.runs[i].first += pages;
        self.runs[i].pages -= pages;
        if self.runs[i].pages == 0 {
            self.remove(i);
        }
        self.free -= pages;
        run
    }

    fn remove(&mut self, i: usize) {
        self.runs.copy_within(i + 1..self.len, i);
        self.len -= 1;
    }
}

impl<const N: usize> Default for FreeList<N> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64) -> Run {
        Run { first, pages }
    }

    fn list(runs: &[Run]) -> FreeList<4> {
        let mut l = FreeList::new();
        runs.iter().for_each(|r| l.free(*r).unwrap());
        l
    }

    #[test]
    fn alloc_takes_the_lowest_run_that_fits() {
        let mut l = list(&[run(10, 2), run(20, 8), run(40, 100)]);
        assert_eq!(l.alloc(3), Ok(run(20, 3)));
        assert_eq!(l.alloc(2), Ok(run(10, 2)));
        assert_eq!(l.alloc(5), Ok(run(23, 5)));
        assert_eq!(l.alloc(5), Ok(run(40, 5)));
        assert_eq!(l.free_pages(), 95);
    }

    #[test]
    fn alloc_of_absurd_counts_fails_without_a_change() {
        let mut l = list(&[run(10, 2)]);
        assert_eq!(l.alloc(0), Err(Error::BadRun));
        assert_eq!(l.alloc(3), Err(Error::NoMemory));
        assert_eq!(l.alloc(u64::MAX), Err(Error::NoMemory));
        assert_eq!(l.free_pages(), 2);
    }

    #[test]
    fn alloc_up_to_gives_contiguous_pages() {
        let mut l = list(&[run(10, 2), run(20, 8)]);
        assert_eq!(l.alloc_up_to(5), Ok(run(10, 2)));
        assert_eq!(l.alloc_up_to(5), Ok(run(20, 5)));
        assert_eq!(l.alloc_up_to(5), Ok(run(25, 3)));
        assert_eq!(l.alloc_up_to(5), Err(Error::NoMemory));
        assert_eq!(l.alloc_up_to(0), Err(Error::BadRun));
    }

    #[test]
    fn free_joins_neighbours() {
        let mut l = list(&[run(0, 10), run(20, 10)]);
        l.free(run(10, 10)).unwrap();
        assert_eq!(l.list(), [run(0, 30)]);
        assert_eq!(l.alloc(30), Ok(run(0, 30)));
        l.free(run(5, 5)).unwrap();
        l.free(run(0, 5)).unwrap();
        l.free(run(10, 1)).unwrap();
        assert_eq!(l.list(), [run(0, 11)]);
    }

    #[test]
    fn free_of_free_or_bad_pages_returns_an_error() {
        let mut l = list(&[run(10, 10)]);
        for r in [run(10, 10), run(19, 5), run(5, 6), run(12, 1), run(0, 100)] {
            assert_eq!(l.free(r), Err(Error::NotAllocated));
        }
        assert_eq!(l.free(run(3, 0)), Err(Error::BadRun));
        assert_eq!(l.free(run(u64::MAX, 2)), Err(Error::BadRun));
        assert_eq!(l.list(), [run(10, 10)]);
    }

    #[test]
    fn free_into_a_full_list_returns_list_full_but_joining_still_works() {
        let mut l = list(&[run(0, 1), run(2, 1), run(4, 1), run(6, 1)]);
        assert_eq!(l.free(run(10, 1)), Err(Error::ListFull));
        assert_eq!(l.free_pages(), 4);
        l.free(run(1, 1)).unwrap();
        l.free(run(10, 1)).unwrap();
        assert_eq!(l.free_pages(), 6);
    }

    #[test]
    fn random_allocs_and_frees_never_overlap_and_end_where_they_began() {
        let mut l = FreeList::<256>::new();
        l.free(run(100, 1000)).unwrap();
        let (mut held, mut seed) = (Vec::<Run>::new(), 1);
        for _ in 0..20_000 {
            seed = crate::digest::mix(seed + 1);
            if seed % 2 == 0 {
                if let Ok(r) = l.alloc(1 + seed / 2 % 20) {
                    assert!(held.iter().all(|h| h.end() <= r.first || r.end() <= h.first));
                    held.push(r);
                }
            } else if !held.is_empty() {
                let r = held.swap_remove((seed / 2) as usize % held.len());
                l.free(r).unwrap();
            }
            assert_eq!(l.free_pages() + held.iter().map(|h| h.pages).sum::<u64>(), 1000);
        }
        held.drain(..).for_each(|r| l.free(r).unwrap());
        assert_eq!(l.list(), [run(100, 1000)]);
    }
}
