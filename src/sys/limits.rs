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

/// A resource of this process that can be limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// The largest file that it can make, bytes.
    FileSize,
    /// The most descriptors that it can have open.
    OpenFiles,
}

impl std::fmt::Display for Limit {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Limit::FileSize => "the size of files",
            Limit::OpenFiles => "open files",
        })
    }
}

/// Limits a resource for good (setrlimit(2), both limits).
///
/// # Errors
/// EPERM for more than is allowed.
pub fn limit(of: Limit, value: u64) -> std::io::Result<()> {
    let resource = match of {
        Limit::FileSize => Resource::Fsize,
        Limit::OpenFiles => Resource::Nofile,
    };
    Ok(setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?)
}
