//! Telling pages that are all zero from others.

use super::{Extent, Gfn, PAGE_SIZE};

/// The runs of pages that have a byte other than zero.
pub(super) fn nonzero_runs(first: Gfn, bytes: &[u8]) -> Vec<Extent> {
    let mut runs: Vec<Extent> = Vec::new();
    for (page, gfn) in bytes.chunks(PAGE_SIZE as usize).zip(first.0..) {
        if is_zero(page) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end().0 == gfn => run.pages += 1,
            _ => runs.push(Extent { first: Gfn(gfn), pages: 1 }),
        }
    }
    runs
}

/// True if every byte of `page` is zero. Compares by pieces, which the compiler turns into vector code, and ends at the
/// first piece that is not zero.
pub fn is_zero(page: &[u8]) -> bool {
    let (pieces, rest) = page.as_chunks::<256>();
    pieces.iter().all(|piece| piece.iter().fold(0, |bits, byte| bits | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_zero_sees_every_byte() {
        let mut page = vec![0; PAGE_SIZE as usize];
        assert!(is_zero(&page));
        for at in [0, 63, 64, 255, 256, 2047, 4095] {
            page[at] = 1;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
        assert!(!is_zero(&[vec![0; 300], vec![1]].concat()), "the piece at the end");
    }
}
