//! The clients of the service: their tokens and roles, the rights that requests need, the record of requests.
//!
//! `guard.rs` asks these files about each request before a handler sees it.

pub(super) mod audit;
pub(super) mod caller;
pub(super) mod counts;
pub(super) mod failures;
pub(super) mod names;
mod rate;
pub(super) mod right;
pub(super) mod role;
pub(super) mod token;
pub(super) mod token_file;
