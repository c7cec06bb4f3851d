//! Errors of measuring a host or another VMM.

use std::io;
use std::path::PathBuf;

/// The one error of the room `bench`. Each variant names the action and its object; causes are chained.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Cannot serve page faults: {0}")]
    Handler(String),
    #[error("Cannot {doing}")]
    Os { doing: &'static str, source: io::Error },
    #[error("Cannot {doing} {path}")]
    File { doing: &'static str, path: PathBuf, source: io::Error },
}

impl Error {
    pub(super) fn os(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Os { doing, source }
    }
}
