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

/// Compares by pieces, which the compiler turns into vector code and which end early for most pages that are not zero.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(256).all(|piece| piece.iter().fold(0, |bits, byte| bits | byte) == 0)
}
