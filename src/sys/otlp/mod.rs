//! Spans for an OpenTelemetry collector (`--otlp`): the parts of a trace, sending, and the count of lost traces.
//!
//! Builds without the feature `otel` know the nouns and refuse the address.

mod counts;
mod endpoint;
#[cfg(feature = "otel")]
mod export;
#[cfg(not(feature = "otel"))]
mod no_export;
#[cfg(feature = "otel")]
mod spans;
mod trace;

pub use counts::Counts;
pub use endpoint::{Unusable, endpoint};
#[cfg(feature = "otel")]
pub use export::Exporter;
#[cfg(not(feature = "otel"))]
pub use no_export::Exporter;
pub use trace::{Span, Trace};
