//! Profiles: a record of what a run of a function did to each page of a restored guest. Pure data, no system calls.
//!
//! A profile has what its recorder saw and nothing more. A recorder that cannot tell reads from writes leaves pages
//! *unclassified*, one that sees no order says [`Order::Unknown`]: policies ask [`Profile::knows_classes`] and
//! [`Profile::knows_order`] instead of trusting made-up data. `docs/profiles.md` has the file byte by byte.

mod bits;
mod buckets;
mod contents;
mod file;
mod merge;
mod order;
mod order_code;
mod recorder_kind;
mod sets;
#[cfg(test)]
mod tests;

pub use buckets::{Buckets, nonzero};
pub use contents::{Frequency, MAX_RUNS, PAGES_PER_TIME, Profile};
pub use merge::{Agreement, MergeKind, PairAgreement, merge};
pub use order::{MAX_LAYERS, Order};
pub use recorder_kind::RecorderKind;
