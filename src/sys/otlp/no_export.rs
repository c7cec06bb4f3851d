//! The exporter of a build without OpenTelemetry: there is none.

use std::time::Duration;

use super::counts::Counts;
use super::endpoint::{NO_OTEL, Unusable, endpoint};
use super::trace::Trace;

/// A build without OpenTelemetry has no exporter.
#[derive(Debug)]
pub enum Exporter {}

impl Exporter {
    /// Always fails in this build.
    ///
    /// # Errors
    /// [`Unusable`], with the missing feature.
    pub fn start(url: &str) -> Result<Exporter, Unusable> {
        let url = endpoint(url)?;
        Err(Unusable { url, problem: NO_OTEL.to_string() })
    }

    /// Sends nothing.
    pub fn send(&self, _: impl FnOnce() -> Trace + Send + 'static) {
        match *self {}
    }

    /// The results of sending so far.
    pub fn counts(&self) -> &Counts {
        match *self {}
    }

    /// There is nothing to wait for.
    pub fn finish(&self, _: Duration) {
        match *self {}
    }
}
