//! The answer to a request that was not carried out: a status and `{"fault_message": "...", "code": "..."}`. Faults of
//! HTTP itself have no code.

use axum::http::{HeaderValue, StatusCode, header::CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::config::ConfigError;
use crate::config::control::SendError;
use crate::config::refusal::{FaultBody, FaultCode, Refused, RefusedKind};

/// A request that was not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) status: StatusCode,
    pub(super) message: String,
    pub(super) code: Option<FaultCode>,
}

impl Fault {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), code: None }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }
}

impl From<Refused> for Fault {
    fn from(refused: Refused) -> Self {
        let status = match refused.kind {
            RefusedKind::BadRequest => StatusCode::BAD_REQUEST,
            RefusedKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { code: Some(refused.code), ..Self::new(status, refused.message) }
    }
}

impl From<ConfigError> for Fault {
    fn from(error: ConfigError) -> Self {
        Refused::from(error).into()
    }
}

impl From<SendError> for Fault {
    fn from(error: SendError) -> Self {
        let status = match error {
            SendError::Gone => StatusCode::INTERNAL_SERVER_ERROR,
            SendError::Full => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.to_string())
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        tracing::warn!(status = self.status.as_u16(), fault = self.message, "API request was refused.");
        json_response(self.status, &FaultBody { fault_message: self.message, code: self.code })
    }
}

/// A JSON answer.
pub(super) fn json_response(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(body) => (status, [(CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response(),
        // Only a path that is not UTF-8 cannot be JSON.
        Err(error) => {
            Fault::new(StatusCode::INTERNAL_SERVER_ERROR, format!("Cannot write the answer as JSON: {error}."))
                .into_response()
        }
    }
}
