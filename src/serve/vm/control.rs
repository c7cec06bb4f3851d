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

use crate::config::refusal::{FaultBody, FaultCode, RefusedKind};
use crate::serve::fault::Fault;

/// Limit on an answer; a larger one is not a VM's.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// The reason why a VM did not carry out a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The VM refused it.
    #[error("{message}")]
    Refused {
        /// The party at fault.
        kind: RefusedKind,
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
    /// Returns whether the request has changed nothing: the VM is as it was. The VM's API tells it by the party at
    /// fault, never by the code: a disk can be full before anything has changed, or in the middle.
    pub fn left_all_as_it_was(&self) -> bool {
        matches!(self, ControlError::Refused { kind: RefusedKind::BadRequest, .. })
    }

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

    /// Waits until no other request is under way.
    pub async fn is_free(&self) {
        drop(self.0.lock().await);
    }

    async fn exchange<A: DeserializeOwned>(&self, request: Builder, body: Bytes) -> Result<A, ControlError> {
        let request = request.header("host", "vm").body(Full::from(body)).map_err(gone)?;
        let mut sender = self.0.lock().await;
        sender.ready().await.map_err(gone)?;
        let response = sender.send_request(request).await.map_err(gone)?;
        let status = response.status();
        let bytes = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await.map_err(gone)?.to_bytes();
        if status.is_client_error() || status.is_server_error() {
            let kind = if status.is_client_error() { RefusedKind::BadRequest } else { RefusedKind::Internal };
            let FaultBody { fault_message, code } = serde_json::from_slice(&bytes).map_err(gone)?;
            return Err(ControlError::Refused { kind, code, message: fault_message });
        }
        let answer: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(answer).map_err(gone)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// Returns the error of a request that a VM answers with this status and code.
    async fn refusal(status: &'static str, code: &'static str) -> ControlError {
        let (ours, mut vm) = std::os::unix::net::UnixStream::pair().unwrap();
        let answering = std::thread::spawn(move || {
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                vm.read_exact(&mut byte).unwrap();
                asked.extend(byte);
            }
            let body = format!(r#"{{"fault_message":"Full.","code":"{code}"}}"#);
            write!(vm, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        });
        let error = Control::connect(ours).await.unwrap().get::<()>("/").await.unwrap_err();
        answering.join().unwrap();
        error
    }

    #[tokio::test]
    async fn a_full_disk_leaves_the_vm_as_it_was_if_the_vm_says_so() {
        let refused = refusal("400 Bad Request", "storage_full").await;
        assert!(refused.left_all_as_it_was(), "{refused:?}");
        assert_eq!(refused.fault("Full.".into()).status, StatusCode::INSUFFICIENT_STORAGE);
        let failed = refusal("500 Internal Server Error", "storage_full").await;
        assert!(!failed.left_all_as_it_was(), "{failed:?}");
        assert!(refusal("400 Bad Request", "bad_request").await.left_all_as_it_was());
        assert!(!gone("closed").left_all_as_it_was());
    }
}
