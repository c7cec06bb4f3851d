//! Refusals: the reason why a request cannot be carried out, in one sentence.

use std::error::Error;

use serde::{Deserialize, Serialize};

use crate::config::ConfigError;
use crate::sys::errors::{chain, is_storage_full};

/// The kind of a failure, for programs. It crosses processes beside the message, which is for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultCode {
    /// The request cannot be carried out, or not now.
    BadRequest,
    /// tvmm or the host failed.
    Internal,
    /// A disk is full, or a quota is used up.
    StorageFull,
    /// The guest did not answer in time.
    GuestTimeout,
}

impl FaultCode {
    /// Returns the kind of `error` that its causes tell, whatever room it is of.
    pub fn of(error: &(dyn Error + 'static)) -> Option<FaultCode> {
        is_storage_full(error).then_some(FaultCode::StorageFull)
    }
}

/// A fault on its way to another process: the body of the API's refusals, and with [`FAULTS_VARIABLE`] the last line
/// that a command writes on standard error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultBody {
    /// Firecracker's key.
    pub fault_message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<FaultCode>,
}

/// The environment variable by which `tvmm serve` asks the commands that it runs for a [`FaultBody`] (value `json`).
pub const FAULTS_VARIABLE: &str = "TVMM_FAULTS";

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
    /// The same in more detail, for programs.
    pub code: FaultCode,
    /// A whole sentence for users.
    pub message: String,
}

impl Refused {
    /// The client's fault.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { kind: RefusedKind::BadRequest, code: FaultCode::BadRequest, message: message.into() }
    }

    /// The client's fault; the message is the whole chain of the error.
    pub fn bad_request_because(error: &(dyn Error + 'static)) -> Self {
        Self::bad_request(chain(error)).because(error)
    }

    /// The fault of tvmm or the host.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { kind: RefusedKind::Internal, code: FaultCode::Internal, message: message.into() }
    }

    /// The fault of tvmm or the host; the message is the whole chain of the error.
    pub fn internal_because(error: &(dyn Error + 'static)) -> Self {
        Self::internal(chain(error)).because(error)
    }

    fn because(self, error: &(dyn Error + 'static)) -> Self {
        let code = FaultCode::of(error).unwrap_or(self.code);
        Self { code, ..self }
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
        assert_eq!(refused.message, "Config file /x cannot be read: entity not found");
        let error = ConfigError::File { path: "/y".into(), source: Box::new(ConfigError::TwoGuests) };
        assert_eq!(Refused::internal_because(&error).kind, RefusedKind::Internal);
        assert_eq!(Refused::internal_because(&error).code, FaultCode::Internal);
        assert!(Refused::internal_because(&error).message.starts_with("Config file /y is refused: "));
    }

    #[test]
    fn a_full_disk_is_known_by_its_code_however_deep_it_lies() {
        for number in [28, 122] {
            let source = io::Error::from_raw_os_error(number);
            let read = ConfigError::Read { path: "/x".into(), source };
            let refused = Refused::from(ConfigError::File { path: "/y".into(), source: Box::new(read) });
            assert_eq!((refused.kind, refused.code), (RefusedKind::BadRequest, FaultCode::StorageFull));
        }
        // The same words, but no such error.
        let refused = Refused::bad_request("No space left on device (os error 28)");
        assert_eq!(refused.code, FaultCode::BadRequest);
    }
}
