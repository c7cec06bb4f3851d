//! Refusals: why a request cannot be carried out, in one sentence.

use std::error::Error;

use crate::config::ConfigError;
use crate::sys::errors::error_chain;

/// Whose fault a refusal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusedKind {
    /// The asker's: what was asked cannot be done, or not now.
    BadRequest,
    /// Ours or the host's.
    Internal,
}

/// Why a command was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// Whose fault it is.
    pub kind: RefusedKind,
    /// A whole sentence for a person.
    pub message: String,
}

impl Refused {
    /// The asker's fault.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { kind: RefusedKind::BadRequest, message: message.into() }
    }

    /// The asker's fault; the message is the whole chain of the error.
    pub fn bad_request_because(error: &(dyn Error + 'static)) -> Self {
        Self::bad_request(error_chain(error))
    }

    /// Our fault or the host's.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { kind: RefusedKind::Internal, message: message.into() }
    }

    /// Our fault or the host's; the message is the whole chain of the error.
    pub fn internal_because(error: &(dyn Error + 'static)) -> Self {
        Self::internal(error_chain(error))
    }

    /// For commands that need a machine, before there is one. (Firecracker's sentence: clients match it.)
    pub fn before_start() -> Self {
        Self::bad_request("The requested operation is not supported before starting the microVM.")
    }

    /// For commands that shape the machine, once there is one. (Firecracker's sentence: clients match it.)
    pub fn after_start() -> Self {
        Self::bad_request("The requested operation is not supported after starting the microVM.")
    }
}

impl From<ConfigError> for Refused {
    fn from(error: ConfigError) -> Self {
        Self::bad_request_because(&error)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn refused_because_tells_the_whole_chain() {
        let source = io::Error::from(io::ErrorKind::NotFound);
        let refused = Refused::from(ConfigError::Read { path: "/x".into(), source });
        assert_eq!(refused.kind, RefusedKind::BadRequest);
        assert_eq!(refused.message, "Config file /x cannot be read. entity not found");
        let error = ConfigError::File { path: "/y".into(), source: Box::new(ConfigError::TwoGuests) };
        assert_eq!(Refused::internal_because(&error).kind, RefusedKind::Internal);
        assert!(Refused::internal_because(&error).message.starts_with(&format!("{error}")));
    }
}
