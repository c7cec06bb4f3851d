//! `readlist` and `mmap`: one access to each page of much memory, the two extremes of FaaSnap's set.

use alloc::vec::Vec;
use core::hint::black_box;

use super::runtime::Pace;
use crate::PAGE_WORDS;
use crate::digest::{Digest, mix2};

/// MiB of both in FaaSnap.
pub const MIB: u64 = 512;
/// Steps of progress.
const STEPS: usize = 16;

/// A list of `mib` MiB, 8 bytes an element.
pub fn build(mib: u64) -> Vec<u64> {
    (0..mib << 17).map(|index| mix2(index, mib)).collect()
}

/// Reads every 512th element from `first` on, which is one of each page.
pub fn read(list: &[u64], first: usize, pace: &mut Pace) -> u64 {
    let mut digest = Digest::new();
    let step = list.len().div_ceil(STEPS).next_multiple_of(PAGE_WORDS as usize).max(1);
    for (done, part) in list.chunks(step).enumerate() {
        part.iter().skip(first).step_by(PAGE_WORDS as usize).for_each(|word| digest.word(*word));
        pace.at(done as u64 + 1, STEPS as u64);
    }
    digest.finish()
}

/// Stores one byte in each page of `mib` MiB of fresh memory.
pub fn store(mib: u64, seed: u64, pace: &mut Pace) -> u64 {
    let mut digest = Digest::new();
    let mut memory: Vec<u8> = Vec::with_capacity((mib << 20) as usize);
    let pages = memory.spare_capacity_mut();
    let step = pages.len().div_ceil(STEPS).next_multiple_of(4096);
    for (done, part) in pages.chunks_mut(step).enumerate() {
        for (page, byte) in part.iter_mut().step_by(4096).enumerate() {
            let byte = byte.write(mix2(seed, (done * step + page * 4096) as u64) as u8);
            // Otherwise the memory, which is never read, would not be written either.
            digest.word(u64::from(*black_box(byte)));
        }
        pace.at(done as u64 + 1, STEPS as u64);
    }
    digest.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads::runtime::Touches;

    fn pace() -> Pace<'static> {
        Pace::begin(None, Touches { pages: 0, written_percent: 0 }, 0, 0)
    }

    #[test]
    fn read_sees_one_element_of_each_page() {
        let list = build(1);
        assert_eq!(list.len(), 131_072);
        let mut expected = Digest::new();
        (0..256).for_each(|page| expected.word(mix2(page * 512 + 256, 1)));
        assert_eq!(read(&list, 256, &mut pace()), expected.finish());
        let mut changed = list.clone();
        changed[255 * 512 + 256] ^= 1;
        assert_ne!(read(&changed, 256, &mut pace()), expected.finish());
    }

    #[test]
    fn store_depends_on_seed_and_size() {
        let of = |mib, seed| store(mib, seed, &mut pace());
        assert_eq!(of(1, 1), of(1, 1));
        assert_ne!(of(1, 1), of(1, 2));
        assert_ne!(of(1, 1), of(2, 1));
    }
}
