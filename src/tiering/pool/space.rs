//! Free stretches of a line of numbered units: pages of data, or bytes of the catalogue.

use std::collections::BTreeMap;

/// Free runs by their start: disjoint, never adjacent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Space {
    free: BTreeMap<u64, u64>,
    total: u64,
}

impl Space {
    /// A space in which all of `[start, end)` is free.
    pub fn new(start: u64, end: u64) -> Space {
        let mut space = Space::default();
        space.release(start, end.saturating_sub(start));
        space
    }

    /// The number of free units.
    pub fn free(&self) -> u64 {
        self.total
    }

    /// The free runs, ascending: start and length.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.free.iter().map(|(start, len)| (*start, *len))
    }

    /// Makes `[start, start + len)` used; parts of it may be used already.
    pub fn take(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len);
        let before = self.free.range(..start).next_back().map(|(start, len)| (*start, *len));
        let inside: Vec<(u64, u64)> = self.free.range(start..end).map(|(start, len)| (*start, *len)).collect();
        for (at, len) in before.into_iter().chain(inside) {
            let from = at.max(start);
            let to = (at + len).min(end);
            if from >= to {
                continue;
            }
            self.free.remove(&at);
            if at < from {
                self.free.insert(at, from - at);
            }
            if to < at + len {
                self.free.insert(to, at + len - to);
            }
            self.total -= to - from;
        }
    }

    /// Frees `[start, start + len)`, all of which must be used.
    pub fn release(&mut self, start: u64, len: u64) {
        if len == 0 {
            return;
        }
        self.total += len;
        let mut start = start;
        let mut len = len;
        if let Some((before, before_len)) = self.free.range(..start).next_back().map(|(at, len)| (*at, *len))
            && before + before_len == start
        {
            (start, len) = (before, before_len + len);
        }
        if let Some(after_len) = self.free.remove(&(start + len)) {
            len += after_len;
        }
        self.free.insert(start, len);
    }

    /// Takes the first `len` free units whose start is congruent to `phase` modulo `modulus`; returns the start.
    pub fn allocate(&mut self, len: u64, phase: u64, modulus: u64) -> Option<u64> {
        let fit = |(start, free): (u64, u64)| {
            let skipped = (phase + modulus - start % modulus) % modulus;
            (skipped.checked_add(len)? <= free).then_some(start + skipped)
        };
        let start = self.runs().find_map(fit)?;
        self.take(start, len);
        Some(start)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn space_agrees_with_a_bitmap(steps in prop::collection::vec((0_u8..3, 0_u64..200, 1_u64..40), 1..60)) {
            let mut space = Space::new(0, 200);
            let mut free = [true; 200];
            for (what, at, len) in steps {
                let range = at as usize..(at + len).min(200) as usize;
                match what {
                    0 => {
                        space.take(at, range.len() as u64);
                        free[range].fill(false);
                    }
                    1 if range.clone().all(|unit| !free[unit]) => {
                        space.release(at, range.len() as u64);
                        free[range].fill(true);
                    }
                    2 => {
                        let found = (0..200).find(|start| {
                            start % 8 == at % 8 && start + len <= 200
                                && (*start..start + len).all(|unit| free[unit as usize])
                        });
                        prop_assert_eq!(space.allocate(len, at % 8, 8), found);
                        if let Some(start) = found {
                            free[start as usize..(start + len) as usize].fill(false);
                        }
                    }
                    _ => {}
                }
                prop_assert_eq!(space.free(), free.iter().filter(|free| **free).count() as u64);
                let mut again = [false; 200];
                let mut last = None;
                for (start, len) in space.runs() {
                    prop_assert!(last.is_none_or(|last| last < start), "adjacent");
                    again[start as usize..(start + len) as usize].fill(true);
                    last = Some(start + len);
                }
                prop_assert_eq!(again, free);
            }
        }
    }
}
