//! Limits of this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the number of descriptors this process may have open to at least `wanted`, or to the highest number allowed.
/// Later opens beyond that fail. Returns the number allowed now; `None`: any number.
pub fn raise_open_files(wanted: u64) -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(wanted, |maximum| wanted.min(maximum));
    if current.is_some_and(|current| current < wanted) {
        let limit = Rlimit { current: Some(wanted), maximum };
        match setrlimit(Resource::Nofile, limit) {
            Ok(()) => return Some(wanted),
            Err(error) => tracing::warn!(%error, wanted, "The limit of open files cannot be raised"),
        }
    }
    current
}
