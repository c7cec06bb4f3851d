//! The thread that sends traces to a collector. No thread waits for it: traces that do not fit its queue are dropped,
//! and counted.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use tokio::sync::mpsc;

use super::counts::Counts;
use super::endpoint::{Unusable, endpoint};
use super::spans;
use super::trace::Trace;

/// Traces that may wait for the collector; more are dropped.
const MAX_WAITING: usize = 4096;
/// Traces in one request.
const MAX_BATCH: usize = 128;
/// Time limit of a request, its repetitions included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Makes a trace of noted facts; called by the thread that sends it.
type Make = Box<dyn FnOnce() -> Trace + Send>;

/// Sends traces to a collector by OTLP over HTTP (protobuf), on a thread of its own.
#[derive(Debug)]
pub struct Exporter {
    url: String,
    counts: Arc<Counts>,
    sender: Mutex<Option<mpsc::Sender<Make>>>,
    /// Closed when the thread ends.
    ended: Mutex<Receiver<()>>,
}

impl Exporter {
    /// Starts the thread. `url`: see [`endpoint`]. An absent collector is noticed when the first trace is sent.
    pub fn start(url: &str) -> Result<Exporter, Unusable> {
        let url = endpoint(url)?;
        let counts = Arc::new(Counts::default());
        let (sender, traces) = mpsc::channel(MAX_WAITING);
        let (running, ended) = sync_channel(0);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| unusable(&url, &error))?;
        let exporter = exporter(&url)?;
        let thread = Sending { url: url.clone(), exporter, counts: counts.clone(), is_failing: false };
        let work = move || {
            runtime.block_on(thread.send_all(traces));
            drop(running);
        };
        let spawned = std::thread::Builder::new().name("otlp".into()).spawn(work);
        spawned.map_err(|error| unusable(&url, &error))?;
        Ok(Exporter { url, counts, sender: Mutex::new(Some(sender)), ended: Mutex::new(ended) })
    }

    /// Queues the trace that `make` makes. Returns at once.
    pub fn send(&self, make: impl FnOnce() -> Trace + Send + 'static) {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        if sender.as_ref().is_none_or(|sender| sender.try_send(Box::new(make)).is_err()) {
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The results of sending so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Waits until everything is sent, at most `limit`; unsent traces are lost, and reported.
    pub fn finish(&self, limit: Duration) {
        drop(self.sender.lock().unwrap_or_else(PoisonError::into_inner).take());
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(limit);
        if ended == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!(collector = self.url, "The collector did not take the last traces in time: they are lost");
        }
    }
}

fn unusable(url: &str, error: &dyn std::error::Error) -> Unusable {
    Unusable { url: url.to_string(), problem: error.to_string() }
}

fn exporter(url: &str) -> Result<SpanExporter, Unusable> {
    let built = SpanExporter::builder()
        .with_http()
        .with_endpoint(url)
        .with_protocol(Protocol::HttpBinary)
        .with_timeout(REQUEST_TIMEOUT)
        .build();
    let mut exporter = built.map_err(|error| unusable(url, &error))?;
    let version = opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    // OTEL_RESOURCE_ATTRIBUTES adds to this, as everywhere.
    exporter.set_resource(&Resource::builder().with_service_name("tvmm").with_attribute(version).build());
    Ok(exporter)
}

/// The state of the thread.
struct Sending {
    url: String,
    exporter: SpanExporter,
    counts: Arc<Counts>,
    is_failing: bool,
}

impl Sending {
    /// Sends traces in batches of all that wait, until the sender is dropped.
    async fn send_all(mut self, mut traces: mpsc::Receiver<Make>) {
        let mut batch = Vec::new();
        loop {
            let count = traces.recv_many(&mut batch, MAX_BATCH).await as u64;
            if count == 0 {
                return;
            }
            let spans: Vec<SpanData> = batch.drain(..).flat_map(|make| spans::of(make())).collect();
            let sent = self.exporter.export(spans).await;
            let counter = if sent.is_ok() { &self.counts.sent } else { &self.counts.lost };
            counter.fetch_add(count, Ordering::Relaxed);
            if let Err(error) = &sent {
                *self.counts.why.lock().unwrap_or_else(PoisonError::into_inner) = error.to_string();
            }
            match (sent, self.is_failing) {
                // Logged once, not for each: the count says how many.
                (Err(error), false) => {
                    tracing::warn!(collector = self.url, %error, "Traces cannot be sent, and are lost");
                    self.is_failing = true;
                }
                (Ok(()), true) => {
                    tracing::warn!(collector = self.url, lost = self.counts.lost(), "Traces can be sent again");
                    self.is_failing = false;
                }
                _ => {}
            }
        }
    }
}
