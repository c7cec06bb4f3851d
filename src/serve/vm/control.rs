//! The API of one VM, over the only connection it has.

use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::sync::Mutex;

/// An answer larger than this is not one of a VM's.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Why a VM did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::serve) enum ControlError {
    /// It said no.
    #[error("{message}")]
    Refused {
        /// The status: 400 and more.
        status: u16,
        /// Its reason.
        message: String,
    },
    /// It said nothing that can be understood, and will say nothing more.
    #[error("the VM's API is gone ({0})")]
    Gone(String),
}

/// Asks one VM, one thing at a time.
#[derive(Debug)]
pub(in crate::serve) struct Control(Mutex<SendRequest<Full<Bytes>>>);

fn gone(error: impl std::fmt::Display) -> ControlError {
    ControlError::Gone(error.to_string())
}

impl Control {
    pub(in crate::serve) async fn connect(stream: std::os::unix::net::UnixStream) -> Result<Control, ControlError> {
        stream.set_nonblocking(true).map_err(gone)?;
        let stream = UnixStream::from_std(stream).map_err(gone)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(gone)?;
        // Its errors come to whoever waits for an answer.
        tokio::spawn(connection);
        Ok(Control(Mutex::new(sender)))
    }

    /// One request and its answer's body, if it has one.
    pub(in crate::serve) async fn ask(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, ControlError> {
        let mut request = Request::builder().method(method).uri(path).header("host", "vm");
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = request.body(Full::from(body)).map_err(gone)?;
        let mut sender = self.0.lock().await;
        sender.ready().await.map_err(gone)?;
        let response = sender.send_request(request).await.map_err(gone)?;
        let status = response.status().as_u16();
        let bytes = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await.map_err(gone)?.to_bytes();
        let body = if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).map_err(gone)? };
        match status {
            400.. => {
                let message = body["fault_message"].as_str().unwrap_or("it did not say why").to_string();
                Err(ControlError::Refused { status, message })
            }
            _ => Ok(body),
        }
    }
}
