//! The log, as `vm.json` and the API configure it.

use tracing::level_filters::LevelFilter;

use super::Error;
use crate::config::{LogLevel, LoggerConfig};
use crate::sys::logging::{self, LogChange, open_to_append};

/// Changes the log; fields that `config` omits keep their value.
///
/// # Errors
/// [`Error::File`] if the log cannot be opened.
pub fn configure(config: &LoggerConfig) -> Result<(), Error> {
    let mut change = LogChange {
        file: None,
        level: config.level.map(filter),
        show_level: config.show_level,
        show_origin: config.show_log_origin,
        module: config.module.clone(),
    };
    if let Some(path) = &config.log_path {
        let opened = open_to_append(path);
        change.file =
            Some(opened.map_err(|source| Error::File { doing: "open the log", path: path.clone(), source })?);
    }
    logging::init(change);
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
