//! The service's refusals: a status and one sentence.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::refusal::FaultCode;
use crate::sys::errors::chain;

/// A refusal, or a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// Seconds after which trying again may help.
    pub(super) retry_after_s: Option<u32>,
}

/// The body of every answer with a status of 400 or more.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(super) struct FaultBody {
    /// The fault in one sentence.
    pub(super) message: String,
}

impl Fault {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Fault {
        Fault { status, message: message.into(), retry_after_s: None }
    }

    /// The request makes no sense.
    pub(super) fn bad(message: impl Into<String>) -> Fault {
        Fault::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn not_found(kind: &str, id: &str) -> Fault {
        Fault::new(StatusCode::NOT_FOUND, format!("There is no {kind} `{id}`."))
    }

    /// The request makes sense, but not in the present state.
    pub(super) fn conflict(message: impl Into<String>) -> Fault {
        Fault::new(StatusCode::CONFLICT, message)
    }

    /// Too many requests at once.
    pub(super) fn busy(message: impl Into<String>) -> Fault {
        Fault { retry_after_s: Some(1), ..Fault::new(StatusCode::TOO_MANY_REQUESTS, message) }
    }

    pub(super) fn internal(message: impl Into<String>) -> Fault {
        Fault::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// The VM failed.
    pub(super) fn bad_gateway(message: impl Into<String>) -> Fault {
        Fault::new(StatusCode::BAD_GATEWAY, message)
    }

    /// The VM did not answer in time.
    pub(super) fn timed_out(message: impl Into<String>) -> Fault {
        Fault::new(StatusCode::GATEWAY_TIMEOUT, message)
    }

    /// A failure of the host, with its causes. A full disk has its own status.
    pub(super) fn of(error: &(dyn std::error::Error + 'static)) -> Fault {
        Fault::because(StatusCode::INTERNAL_SERVER_ERROR, error)
    }

    /// The same with another status, unless a full disk is the cause.
    pub(super) fn because(status: StatusCode, error: &(dyn std::error::Error + 'static)) -> Fault {
        Fault::coded(status, FaultCode::of(error), chain(error))
    }

    /// A refusal of another process: `status`, unless the code decides.
    pub(super) fn coded(status: StatusCode, code: Option<FaultCode>, message: impl Into<String>) -> Fault {
        let status = match code {
            Some(FaultCode::StorageFull) => StatusCode::INSUFFICIENT_STORAGE,
            Some(FaultCode::GuestTimeout) => StatusCode::GATEWAY_TIMEOUT,
            Some(FaultCode::BadRequest | FaultCode::Internal) | None => status,
        };
        Fault::new(status, message)
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let mut response = json(self.status, &FaultBody { message: self.message });
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// An answer with a JSON body.
pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(bytes) => (status, [(header::CONTENT_TYPE, "application/json")], bytes).into_response(),
        Err(error) => {
            tracing::error!(%error, "Cannot write an answer as JSON");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// A successful answer.
#[derive(Debug)]
pub(super) struct Reply<T>(pub(super) T);

impl<T: Serialize> IntoResponse for Reply<T> {
    fn into_response(self) -> Response {
        json(StatusCode::OK, &self.0)
    }
}
