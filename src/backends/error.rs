//! Errors of the places of pools and cold pools.

use std::io;
use std::path::PathBuf;

use crate::snapshot;
use crate::tiering;

/// The one error of the room `backends`. Each variant names the action and its object; causes are chained.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    ColdSpec(#[from] snapshot::NoColdPool),
    #[error("Cannot listen at {address}")]
    Listen { address: String, source: io::Error },
    #[error("Cannot {doing}")]
    Os { doing: &'static str, source: io::Error },
    #[error("Cannot {doing} {path}")]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    #[error(transparent)]
    Tiering(#[from] tiering::Error),
}

impl Error {
    pub(super) fn os(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Os { doing, source }
    }
}
