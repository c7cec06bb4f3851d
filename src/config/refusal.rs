//! Refusals: the reason why a request cannot be carried out, in one sentence.

use std::error::Error;

use crate::config::ConfigError;
use crate::sys::errors::error_chain;

/// The party at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusedKind {
    /// The client: the request cannot be carried out, or not now.
    BadRequest,
    /// tvmm or the host.
    Internal,
}

/// The reason why a command was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// The party at fault.
    pub kind: RefusedKind,
    /// A whole sentence for users.
    pub message: String,
}

impl Refused {
    /// The client's fault.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { kind: RefusedKind::BadRequest, message: message.into() }
    }

    /// The client's fault; the message is the whole chain of the error.
    pub fn bad_request_because(error: &(dyn Error + 'static)) -> Self {
        Self::bad_request(error_chain(error))
    }

    /// The fault of tvmm or the host.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { kind: RefusedKind::Internal, message: message.into() }
    }

    /// The fault of tvmm or the host; the message is the whole chain of the error.
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
