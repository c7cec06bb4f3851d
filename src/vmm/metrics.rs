//! Counters of a running VM, in the shape of one JSON line (`metrics.metrics_path`, `FlushMetrics`).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::error::Error;

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
    file: File,
}

impl MetricsFile {
    /// Opens a file or named pipe for appending; made if it is missing.
    pub fn open(path: &Path) -> Result<Self, Error> {
        // A pipe without a reader must not stop the machine: non-blocking open fails with ENXIO instead.
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| Error::File { doing: "open the metrics file", path: path.to_owned(), source })?;
        Ok(MetricsFile { path: path.to_owned(), file })
    }

    /// Writes one line with the time and `metrics`.
    pub fn write(&mut self, metrics: &Value) -> Result<(), Error> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut line = json!({ "utc_timestamp_ms": now.as_millis() as u64 });
        if let (Some(line), Some(metrics)) = (line.as_object_mut(), metrics.as_object()) {
            line.extend(metrics.clone());
        }
        let text = format!("{line}\n");
        self.file.write_all(text.as_bytes()).map_err(|source| Error::File {
            doing: "write to the metrics file",
            path: self.path.clone(),
            source,
        })
    }
}
