//! Output of commands. `println!` and `eprintln!` end the process when standard output or error cannot be written;
//! these macros do not. A result that could not be printed is an error at the end of the command.

use std::fmt::Arguments;
use std::io::{self, Write};
use std::sync::OnceLock;

use crate::sys::logging;

/// The error of the first result line that could not be written.
static FAILURE: OnceLock<io::Error> = OnceLock::new();

/// A result could not be printed.
#[derive(Debug, thiserror::Error)]
#[error("Cannot write to standard output: {0}")]
pub struct Unprinted(&'static io::Error);

/// Prints a line of a command's result to standard output.
macro_rules! out {
    ($($arg:tt)*) => { $crate::sys::print::write(format_args!("{}\n", format_args!($($arg)*))) };
}

/// Tells the user something on standard error.
macro_rules! say {
    ($($arg:tt)*) => { $crate::sys::logging::say(&format!($($arg)*)) };
}

/// Writes text of a command's result to standard output.
pub fn write(text: Arguments<'_>) {
    keep(io::stdout().write_fmt(text));
}

fn keep(result: io::Result<()>) {
    if let Err(error) = result {
        // The first failure is the cause of the others.
        let _ = FAILURE.set(error);
    }
}

/// Flushes standard output.
///
/// # Errors
/// [`Unprinted`] if any part of the result was lost.
pub fn finish() -> Result<(), Unprinted> {
    keep(io::stdout().flush());
    FAILURE.get().map_or(Ok(()), |error| Err(Unprinted(error)))
}

/// Ends a command: prints the reason of its failure, and waits a moment for readers of the log's last lines.
pub fn end(failure: Option<&str>) {
    if let Some(failure) = failure {
        say!("tvmm: {failure}");
    }
    logging::finish();
}
