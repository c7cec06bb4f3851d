//! Counters of a running VM, in the shape of one JSON line (`metrics.metrics_path`, `FlushMetrics`).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::error::Error;
use super::lines::{Lines, Target};
use super::logging::open_to_append;

/// Exits of one kind: how many, and how many of them no device answered.
#[derive(Debug, Default)]
pub struct ExitCounter {
    all: AtomicU64,
    unclaimed: AtomicU64,
}

impl ExitCounter {
    pub fn count(&self, claimed: bool) {
        self.all.fetch_add(1, Ordering::Relaxed);
        if !claimed {
            self.unclaimed.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn json(&self) -> Value {
        json!({ "count": self.all.load(Ordering::Relaxed), "unclaimed": self.unclaimed.load(Ordering::Relaxed) })
    }
}

/// Exits of all vCPUs by kind.
#[derive(Debug, Default)]
pub struct ExitCounters {
    pub io_in: ExitCounter,
    pub io_out: ExitCounter,
    /// Batches of port writes that KVM collected without an exit of their own.
    pub io_coalesced: ExitCounter,
    pub mmio_read: ExitCounter,
    pub mmio_write: ExitCounter,
}

impl ExitCounters {
    pub fn json(&self) -> Value {
        json!({
            "exit_io_in": self.io_in.json(),
            "exit_io_out": self.io_out.json(),
            "io_coalesced": self.io_coalesced.json(),
            "exit_mmio_read": self.mmio_read.json(),
            "exit_mmio_write": self.mmio_write.json(),
        })
    }
}

/// The file metrics are appended to, one JSON object per line.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    target: Target,
    lines: Arc<Lines>,
}

/// How long the main loop waits for the reader of metrics.
const PATIENCE: Duration = Duration::from_secs(1);

impl MetricsFile {
    /// Opens a file or named pipe for appending; made if it is missing.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = open_to_append(path).map_err(|source| Error::File {
            doing: "open the metrics file",
            path: path.to_owned(),
            source,
        })?;
        Ok(MetricsFile { path: path.to_owned(), target: Target::File(Arc::new(file)), lines: Arc::default() })
    }

    /// Writes one line with the time and `metrics`.
    ///
    /// # Errors
    /// A reader that does not take the line within [`PATIENCE`]: the line is written when it does.
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
