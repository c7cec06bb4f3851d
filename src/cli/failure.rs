//! Failures with an exit code of their own.

use crate::sys::lost::CANNOT_GO_ON;

/// Arguments of a command that exclude each other. The process ends as clap ends it for arguments that it refuses.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ArgumentConflict {
    /// The name of the command.
    pub command: &'static str,
    pub message: String,
}

/// Guest memory cannot be read any more, or differs from what was captured. The process ends with
/// [`EXIT_CODE`](crate::sys::lost::EXIT_CODE).
#[derive(Debug, thiserror::Error)]
#[error("{CANNOT_GO_ON}: {0}")]
pub struct MemoryLost(pub String);
