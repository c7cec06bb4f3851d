//! The pages that the calibration's guest fills and touches, and the times that it reports.

use crate::bench::guest;
use crate::snapshot::{Extent, Gfn};
use crate::sys::errors::{BoxError, refuse};

/// Pages the guest fills: 32 MiB, whole blocks.
pub(super) const PAGES: u64 = 8192;
/// The pages' place: the guest hands out memory from 4 MiB on (`resources/guest/README.md`).
pub(super) const FILLED: Extent = Extent { first: Gfn(1024), pages: PAGES };

/// Converts µs for `count` operations to ns for one.
pub(super) fn per(us: f64, count: u64) -> u64 {
    (us * 1000.0 / count as f64).round().max(1.0) as u64
}

/// The guest's µs in `ok <id> <digest> <guest µs> …`.
pub(super) fn guest_us(line: &str) -> Result<f64, BoxError> {
    match guest::guest_us(line) {
        Some(us) => Ok(us),
        None => refuse(format!("{line:?} is not an answer of the guest")),
    }
}
