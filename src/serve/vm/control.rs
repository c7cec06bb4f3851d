//! The API of one VM, over its only connection.

use axum::http::StatusCode;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::http::request::Builder;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use crate::config::refusal::{FaultBody, FaultCode};
use crate::serve::fault::Fault;

/// Limit on an answer; a larger one is not a VM's.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// The reason why a VM did not carry out a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The VM refused it.
    #[error("{message}")]
    Refused {
        /// The kind of the reason.
        code: Option<FaultCode>,
        /// Its reason.
        message: String,
    },
    /// The answer cannot be understood, and the connection is of no further use.
    #[error("the VM's API is gone ({0})")]
    Gone(String),
}

impl ControlError {
    /// The fault that clients are told in these words.
    pub fn fault(&self, text: String) -> Fault {
        match self {
            // The refused setting comes from the function or the snapshot, not from this request.
            ControlError::Refused { code, .. } => Fault::coded(StatusCode::UNPROCESSABLE_ENTITY, *code, text),
            ControlError::Gone(_) => Fault::bad_gateway(text),
        }
    }
}

/// Sends requests to one VM, one at a time.
#[derive(Debug)]
pub struct Control(Mutex<SendRequest<Full<Bytes>>>);

fn gone(error: impl std::fmt::Display) -> ControlError {
    ControlError::Gone(error.to_string())
}

impl Control {
    pub async fn connect(stream: std::os::unix::net::UnixStream) -> Result<Control, ControlError> {
        stream.set_nonblocking(true).map_err(gone)?;
        let stream = UnixStream::from_std(stream).map_err(gone)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(gone)?;
        // The pending request gets the connection's errors.
        tokio::spawn(connection);
        Ok(Control(Mutex::new(sender)))
    }

    /// Asks without a body.
    pub async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A, ControlError> {
        self.exchange(Request::builder().method("GET").uri(path), Bytes::new()).await
    }

    /// Sends a body. An empty answer is read as `()`.
    pub async fn send<A: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: &impl Serialize,
    ) -> Result<A, ControlError> {
        let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
        self.exchange(request, serde_json::to_vec(body).map_err(gone)?.into()).await
    }

    async fn exchange<A: DeserializeOwned>(&self, request: Builder, body: Bytes) -> Result<A, ControlError> {
        let request = request.header("host", "vm").body(Full::from(body)).map_err(gone)?;
        let mut sender = self.0.lock().await;
        sender.ready().await.map_err(gone)?;
        let response = sender.send_request(request).await.map_err(gone)?;
        let is_refusal = response.status().as_u16() >= 400;
        let bytes = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await.map_err(gone)?.to_bytes();
        if is_refusal {
            let FaultBody { fault_message, code } = serde_json::from_slice(&bytes).map_err(gone)?;
            return Err(ControlError::Refused { code, message: fault_message });
        }
        let answer: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(answer).map_err(gone)
    }
}
