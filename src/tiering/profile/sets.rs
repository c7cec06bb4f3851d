//! Sets of pages, packed: runs by their distance and length in gamma code. Working sets are often sparse (one page in
//! four), and there a roaring bitmap takes two bytes a page where this takes half of one.

use super::bits::{BitReader, BitWriter, put_varint, take_varint};
use crate::snapshot::{Extent, Gfn, PageSet};

/// The most runs a set of a profile may have: bounds what a small file can make a reader allocate.
pub const MAX_SET_RUNS: u64 = 1 << 23;

/// Frame numbers end here.
const END: u64 = 1 << 32;

/// The number of runs as a varint; then for each run the number of pages since the end of the one before (for the
/// first: since page 0, plus one) and its length, both in gamma code.
pub fn encode(set: &PageSet) -> Vec<u8> {
    let mut out = Vec::new();
    put_varint(&mut out, set.runs().count() as u64);
    let mut bits = BitWriter::default();
    let mut end = None;
    for run in set.runs() {
        bits.gamma(end.map_or(run.first.0 + 1, |end| run.first.0 - end));
        bits.gamma(run.pages);
        end = Some(run.end().0);
    }
    out.extend(bits.finish());
    out
}

/// Reads what [`encode`] wrote.
pub fn decode(mut bytes: &[u8]) -> Result<PageSet, String> {
    let early = || "a set of pages ends early".to_string();
    let runs = take_varint(&mut bytes).ok_or_else(early)?;
    if runs > MAX_SET_RUNS {
        return Err(format!("a set of pages has {runs} runs, at most {MAX_SET_RUNS} are allowed"));
    }
    let mut bits = BitReader::new(bytes);
    let mut set = PageSet::new();
    let mut end = None;
    for _ in 0..runs {
        let distance = bits.gamma().ok_or_else(early)?;
        let pages = bits.gamma().ok_or_else(early)?;
        let first = match end {
            None => Some(distance - 1),
            Some(end) => distance.checked_add(end),
        };
        let run_end = first.and_then(|first| first.checked_add(pages)).filter(|end| *end <= END);
        let (Some(first), Some(run_end)) = (first, run_end) else {
            return Err("a set has pages that cannot exist".to_string());
        };
        set.insert_run(Extent { first: Gfn(first), pages });
        end = Some(run_end);
    }
    if bits.is_finished() { Ok(set) } else { Err("something follows a set of pages".to_string()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sets_come_back(runs in prop::collection::vec((any::<u32>(), 1_u64..5000), 0..50), low in any::<bool>()) {
            let run = |(first, pages): (u32, u64)| {
                let first = u64::from(if low { first % 9000 } else { first });
                Extent { first: Gfn(first), pages: pages.min(END - first) }
            };
            let set: PageSet = runs.into_iter().map(run).collect();
            prop_assert_eq!(decode(&encode(&set)).unwrap(), set);
        }

        #[test]
        fn any_bytes_are_a_set_in_its_one_form_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(set) = decode(&bytes) {
                prop_assert_eq!(encode(&set), bytes);
            }
        }
    }

    #[test]
    fn too_many_runs_and_pages_beyond_the_end_are_refused() {
        let mut bytes = Vec::new();
        put_varint(&mut bytes, MAX_SET_RUNS + 1);
        assert!(decode(&bytes).unwrap_err().contains("at most"));
        let beyond = |first: u64, pages: u64| {
            let mut bits = BitWriter::default();
            bits.gamma(first + 1);
            bits.gamma(pages);
            let mut bytes = vec![1];
            bytes.extend(bits.finish());
            decode(&bytes)
        };
        assert!(beyond(END - 1, 1).is_ok());
        assert!(beyond(END - 1, 2).is_err());
        assert!(beyond(5, u64::MAX).is_err());
    }
}
