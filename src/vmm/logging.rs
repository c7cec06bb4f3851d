//! Messages about the VMM itself: one line each, to standard error or a file, never into the guest's console output.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Metadata, Subscriber, span};

use super::config::{LogLevel, LoggerConfig};
use super::error::Error;

/// How lines look and which are written. Replaced as a whole when the API configures the logger.
struct Settings {
    file: Option<File>,
    level: LevelFilter,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
}

impl Settings {
    const fn new() -> Self {
        Settings { file: None, level: LevelFilter::WARN, show_level: true, show_origin: false, module: None }
    }
}

static SETTINGS: Mutex<Settings> = Mutex::new(Settings::new());

/// Sets the logger up; may be called again, what a config leaves out stays as it is.
pub fn init(config: Option<&LoggerConfig>) -> Result<(), Error> {
    if let Some(config) = config {
        let mut settings = SETTINGS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = &config.log_path {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)
                .map_err(|source| Error::File { doing: "open the log", path: path.clone(), source })?;
            settings.file = Some(file);
        }
        if let Some(level) = config.level {
            settings.level = filter(level);
        }
        settings.show_level = config.show_level.unwrap_or(settings.show_level);
        settings.show_origin = config.show_log_origin.unwrap_or(settings.show_origin);
        settings.module = config.module.clone().or_else(|| settings.module.take());
    }
    // The second call finds the subscriber in place: only its settings have changed.
    let _ = tracing::subscriber::set_global_default(Lines);
    Ok(())
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warning => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

/// Writes events as lines. No spans: slices of time are the timeline's business.
struct Lines;

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let settings = SETTINGS.lock().unwrap_or_else(PoisonError::into_inner);
        let module = settings.module.as_deref().is_none_or(|module| metadata.target().starts_with(module));
        module && *metadata.level() <= settings.level
    }

    fn register_callsite(&self, _: &'static Metadata<'static>) -> tracing::subscriber::Interest {
        // The level can change, so callsites ask each time.
        tracing::subscriber::Interest::sometimes()
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = LineVisitor(String::new());
        event.record(&mut line);
        let mut settings = SETTINGS.lock().unwrap_or_else(PoisonError::into_inner);
        let metadata = event.metadata();
        let mut head = String::from("tvmm: ");
        if settings.show_level {
            head += &format!("{}: ", metadata.level().as_str().to_lowercase());
        }
        if settings.show_origin {
            head += &format!("{}:{}: ", metadata.file().unwrap_or("?"), metadata.line().unwrap_or(0));
        }
        let text = format!("{head}{}\n", line.0);
        // There is nowhere to report that a log cannot be written.
        let _ = match &mut settings.file {
            Some(file) => file.write_all(text.as_bytes()),
            None => io::stderr().write_all(text.as_bytes()),
        };
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
