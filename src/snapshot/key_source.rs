//! The source of the key that decrypts a snapshot, as users name it.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

const COMMAND: &str = "command:";

/// A file with the key, or a command that prints it. The key itself is never an argument: other users could read it in
/// `/proc/PID/cmdline`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum KeySource {
    /// A file that only its owner may use.
    File(PathBuf),
    /// A command of `sh -c`, for keys in a service or a module.
    Command(String),
}

impl From<String> for KeySource {
    fn from(text: String) -> KeySource {
        match text.strip_prefix(COMMAND) {
            Some(command) => KeySource::Command(command.to_string()),
            None => KeySource::File(text.into()),
        }
    }
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeySource::File(path) => write!(f, "{}", path.display()),
            KeySource::Command(command) => write!(f, "{COMMAND}{command}"),
        }
    }
}

impl From<KeySource> for String {
    fn from(source: KeySource) -> String {
        source.to_string()
    }
}
