//! Memory that idle VMs give back: what a step gave, and how far a VM is that is offloaded bit by bit.

use std::num::NonZeroU64;

use crate::config::control::Demoted;

/// Pages that have left local memory by a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GivenBack {
    /// They equal the snapshot, which shows in their place.
    pub dropped: u64,
    /// They went to a file.
    pub spilled: u64,
    /// Others would have gone to the file, which may not be longer.
    pub is_file_full: bool,
}

impl GivenBack {
    pub fn of(demoted: &Demoted) -> GivenBack {
        GivenBack {
            dropped: demoted.pages_dropped + demoted.pages_mapped,
            spilled: demoted.pages_spilled,
            is_file_full: demoted.is_spill_full,
        }
    }

    pub fn pages(&self) -> u64 {
        self.dropped + self.spilled
    }
}

/// The progress of a VM that is offloaded bit by bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloading {
    /// Local pages that it had before.
    all: u64,
    /// Those that have left local memory.
    gone: u64,
}

impl Offloading {
    /// Nothing has left yet, of so many local pages.
    pub fn of(local_pages: u64) -> Offloading {
        Offloading { all: local_pages, gone: 0 }
    }

    /// The number of pages that must leave until this part has left; `None`: it has.
    pub fn pages_due(&self, percent: u8) -> Option<NonZeroU64> {
        NonZeroU64::new((self.all * u64::from(percent) / 100).saturating_sub(self.gone))
    }

    /// More pages have left.
    pub fn after(self, given: GivenBack) -> Offloading {
        Offloading { gone: self.gone + given.pages(), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_makes_up_for_those_that_gave_more_or_less() {
        let begun = Offloading::of(1000);
        assert_eq!(begun.pages_due(2), NonZeroU64::new(20));
        let more = begun.after(GivenBack { dropped: 16, spilled: 30, ..GivenBack::default() });
        assert_eq!((more.pages_due(4), more.pages_due(6)), (None, NonZeroU64::new(14)));
        let less = more.after(GivenBack::default());
        assert_eq!(less.pages_due(100), NonZeroU64::new(954));
        assert_eq!(Offloading::of(10).pages_due(2), None);
    }
}
