//! Counters of a running VM, in the shape of one JSON line (`metrics.metrics_path`, `FlushMetrics`).

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::session::Error;
use crate::sys::lines::{Lines, Target};
use crate::sys::logging::open_to_append;
use crate::sys::seccomp;
use crate::sys::seccomp::NotedIn;

/// The file that metrics are appended to, one JSON object per line.
#[derive(Debug)]
pub struct MetricsFile {
    // Dropped before `target`, whose descriptor it names.
    _violations: NotedIn,
    path: PathBuf,
    target: Target,
    lines: Arc<Lines>,
}

/// Longest wait of the main loop for the reader of metrics.
const PATIENCE: Duration = Duration::from_secs(1);

impl MetricsFile {
    /// Opens a file or named pipe for appending; makes the file if it is missing.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = open_to_append(path).map_err(|source| Error::File {
            doing: "open the metrics file",
            path: path.to_owned(),
            source,
        })?;
        let violations = seccomp::note_in(file.as_raw_fd());
        let target = Target::File(Arc::new(file));
        Ok(MetricsFile { _violations: violations, path: path.to_owned(), target, lines: Arc::default() })
    }

    /// Writes one line with the time and `metrics`.
    ///
    /// # Errors
    /// The reader does not take the line within [`PATIENCE`]; the line is written when it does.
    pub fn write(&mut self, metrics: &Value) -> Result<(), Error> {
        let failed = |source| Error::File { doing: "write to the metrics file", path: self.path.clone(), source };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut line = json!({ "utc_timestamp_ms": now.as_millis() as u64 });
        if let (Some(line), Some(metrics)) = (line.as_object_mut(), metrics.as_object()) {
            line.extend(metrics.clone());
        }
        let dropped = self.lines.counts().dropped;
        self.lines.put(&self.target, format!("{line}\n"));
        if !self.lines.flush(PATIENCE) {
            return Err(failed(io::Error::new(io::ErrorKind::TimedOut, "its reader does not read")));
        }
        match self.lines.take_failure() {
            Some(error) => Err(failed(error)),
            None if self.lines.counts().dropped > dropped => {
                Err(failed(io::Error::new(io::ErrorKind::TimedOut, "its reader does not read, and the line is lost")))
            }
            None => Ok(()),
        }
    }
}
