//! Messages about the VMM itself: one line each, to standard error or a file, never into the guest's console output.

use std::collections::HashMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Metadata, Subscriber, span};

use super::lines::{Lines, Target};

/// Lines that one place in the code may log within [`WINDOW`]; a guest can make a device complain as often as it likes.
const LINES_PER_WINDOW: u32 = 10;
const WINDOW: Duration = Duration::from_secs(5);
/// Time that the end of the process waits for a reader of its last lines.
const LAST_LINES: Duration = Duration::from_secs(2);

/// The target, form and filter of lines. Replaced as a whole when the API configures the logger.
struct Settings {
    target: Target,
    level: LevelFilter,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
}

impl Settings {
    const fn new() -> Self {
        let target = Target::StandardError;
        Settings { target, level: LevelFilter::WARN, show_level: true, show_origin: false, module: None }
    }

    fn format(&self, metadata: &Metadata<'_>, text: &str) -> String {
        let mut line = String::from("tvmm: ");
        if self.show_level {
            line += &format!("{}: ", metadata.level().as_str().to_lowercase());
        }
        if self.show_origin {
            line += &format!("{}:{}: ", metadata.file().unwrap_or("?"), metadata.line().unwrap_or(0));
        }
        line + text + "\n"
    }
}

static SETTINGS: Mutex<Settings> = Mutex::new(Settings::new());
static LINES: LazyLock<Arc<Lines>> = LazyLock::new(Arc::default);
static SOURCES: LazyLock<Mutex<HashMap<Identifier, Source>>> = LazyLock::new(Mutex::default);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Changes of the log; fields that are `None` stay as they are.
#[derive(Debug, Default)]
pub struct LogChange {
    pub file: Option<File>,
    pub level: Option<LevelFilter>,
    pub show_level: Option<bool>,
    pub show_origin: Option<bool>,
    /// Only messages of modules whose path begins with this.
    pub module: Option<String>,
}

/// Sets the logger up, or changes it.
pub fn init(change: LogChange) {
    let mut settings = lock(&SETTINGS);
    if let Some(file) = change.file {
        settings.target = Target::File(Arc::new(file));
    }
    settings.level = change.level.unwrap_or(settings.level);
    settings.show_level = change.show_level.unwrap_or(settings.show_level);
    settings.show_origin = change.show_origin.unwrap_or(settings.show_origin);
    settings.module = change.module.or_else(|| settings.module.take());
    // The second call finds the subscriber in place: only its settings have changed.
    let _ = tracing::subscriber::set_global_default(Subscribed);
}

/// Opens a file or named pipe that lines are appended to; a file is made if it is missing. A pipe without a reader is
/// refused (ENXIO) instead of waited for.
pub fn open_to_append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// Writes a message of the command line to standard error, whatever the log's settings are. A reader that does not read
/// delays the caller by [`LAST_LINES`] at most.
pub fn say(text: &str) {
    LINES.put_always(&Target::StandardError, format!("{text}\n"));
    LINES.flush(LAST_LINES);
}

/// Logs how many messages were left out, and waits up to [`LAST_LINES`] for the last lines to be written. Call before
/// the process ends.
pub fn finish() {
    for source in lock(&SOURCES).values_mut() {
        if source.left_out > 0 {
            let text = format!("Messages were left out: {} left_out={}", source.metadata.name(), source.left_out);
            let settings = lock(&SETTINGS);
            LINES.put(&settings.target, settings.format(source.metadata, &text));
            source.left_out = 0;
        }
    }
    LINES.flush(LAST_LINES);
}

/// Lines written, lines lost because their reader did not read, and messages left out because there were too many of
/// their kind.
pub fn counts() -> Value {
    let counts = LINES.counts();
    let left_out: u64 = lock(&SOURCES).values().map(|source| source.left_out_in_all).sum();
    json!({ "written_count": counts.written, "dropped_count": counts.dropped, "left_out_count": left_out })
}

/// A place in the code that logs, with the count of its messages.
struct Source {
    metadata: &'static Metadata<'static>,
    window_begun: Instant,
    in_window: u32,
    /// Messages left out since the last that was written.
    left_out: u64,
    left_out_in_all: u64,
}

impl Source {
    fn new(metadata: &'static Metadata<'static>, now: Instant) -> Self {
        Source { metadata, window_begun: now, in_window: 0, left_out: 0, left_out_in_all: 0 }
    }

    /// Returns the number of messages left out before, if the source may log now.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.window_begun) >= WINDOW {
            self.window_begun = now;
            self.in_window = 0;
        }
        if self.in_window == LINES_PER_WINDOW {
            self.left_out += 1;
            self.left_out_in_all += 1;
            return None;
        }
        self.in_window += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// Writes events as lines. It has no spans: the timeline measures slices of time.
struct Subscribed;

impl Subscriber for Subscribed {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let settings = lock(&SETTINGS);
        let module = settings.module.as_deref().is_none_or(|module| metadata.target().starts_with(module));
        module && *metadata.level() <= settings.level
    }

    fn register_callsite(&self, _: &'static Metadata<'static>) -> tracing::subscriber::Interest {
        // The level can change, so callsites ask each time.
        tracing::subscriber::Interest::sometimes()
    }

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let now = Instant::now();
        let admitted =
            lock(&SOURCES).entry(metadata.callsite()).or_insert_with(|| Source::new(metadata, now)).admit(now);
        let Some(left_out) = admitted else { return };
        let mut line = LineVisitor(String::new());
        event.record(&mut line);
        if left_out > 0 {
            line.0 += &format!(" left_out={left_out}");
        }
        let settings = lock(&SETTINGS);
        LINES.put(&settings.target, settings.format(metadata, &line.0));
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

struct LineVisitor(String);

impl Visit for LineVisitor {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0.insert_str(0, &format!("{value:?}"));
        } else {
            self.0 += &format!(" {}={value:?}", field.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_that_logs_without_end_logs_a_few_lines_and_counts_the_rest() {
        let begun = Instant::now();
        let mut source = Source::new(metadata(), begun);
        let admitted = (0..1000).filter(|_| source.admit(begun) == Some(0)).count();
        assert_eq!(admitted, LINES_PER_WINDOW as usize);
        assert_eq!(source.left_out_in_all, 1000 - u64::from(LINES_PER_WINDOW));
        let later = begun + WINDOW;
        assert_eq!(source.admit(later), Some(1000 - u64::from(LINES_PER_WINDOW)), "the next line says how many");
        assert_eq!(source.admit(later), Some(0));
    }

    fn metadata() -> &'static Metadata<'static> {
        use tracing::Callsite;
        use tracing::callsite::DefaultCallsite;
        static CALLSITE: DefaultCallsite = DefaultCallsite::new(&METADATA);
        static METADATA: Metadata<'static> = tracing::metadata! {
            name: "test", target: "test", level: tracing::Level::WARN, fields: &[], callsite: &CALLSITE,
            kind: tracing::metadata::Kind::EVENT
        };
        CALLSITE.metadata()
    }
}
