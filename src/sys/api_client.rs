//! A small blocking client of a VMM's API socket, for the command line and benchmarks: JSON over HTTP.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, Uri};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::sys::bounded_wait::Wait;

/// Limit on an answer; a larger one is not tvmm's.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// The reason why a request got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The path does not exist.
    #[error("API socket {} does not exist. Is the VMM running, and with --api-sock?", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// No process listens at the socket.
    #[error("API socket {} is not served: its VMM has ended.", path.display())]
    NotServed {
        /// The path.
        path: PathBuf,
    },
    /// Any other failure to connect.
    #[error("API socket {} cannot be connected to.", path.display())]
    Connect {
        /// The path.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The answer did not come within the time limit.
    #[error("{method} {path} was not answered within {} ms.", timeout.as_millis())]
    TimedOut {
        /// The method.
        method: String,
        /// The path asked for.
        path: String,
        /// The time limit.
        timeout: Duration,
    },
    /// The request cannot be written as HTTP.
    #[error("{method} {path} is not a request: {reason}.")]
    BadRequest {
        /// The method.
        method: String,
        /// The path asked for.
        path: String,
        /// The defect.
        reason: String,
    },
    /// The connection ended, or the answer is not HTTP.
    #[error("{method} {path} was not answered.")]
    NoAnswer {
        /// The method.
        method: String,
        /// The path asked for.
        path: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer is HTTP but its body is not JSON.
    #[error("{method} {path} was answered with status {status} and a body that is not JSON.")]
    NotJson {
        /// The method.
        method: String,
        /// The path asked for.
        path: String,
        /// The status.
        status: u16,
        /// The defect of the JSON.
        source: serde_json::Error,
    },
    /// The VMM or the service refused the request, with this message.
    #[error("{message}")]
    Fault {
        /// The status.
        status: u16,
        /// The `fault_message` or `message` of the answer.
        message: String,
    },
    /// The client could not be set up.
    #[error("API client cannot be set up.")]
    Setup {
        /// The error of the kernel.
        source: io::Error,
    },
}

/// A client of one API socket. Each request is its own connection.
#[derive(Debug, Clone)]
pub struct Client {
    socket_path: PathBuf,
}

impl Client {
    /// A client of the VMM that serves `socket_path`. Connects with each request.
    pub fn new(socket_path: impl Into<PathBuf>) -> Self {
        Self { socket_path: socket_path.into() }
    }

    /// The socket that it connects to.
    pub fn socket_path(&self) -> &Path {
        &self.socket_path
    }

    /// Sends a request and waits for the answer: its status and, if it has one, its body. A status of 400 or more is
    /// [`ClientError::Fault`].
    pub fn request(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        timeout: Duration,
    ) -> Result<(u16, Option<Value>), ClientError> {
        let exchange = Exchange { socket_path: &self.socket_path, method, path };
        let request = exchange.http_request(body)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| ClientError::Setup { source })?;
        let mut wait = Wait::new(format!("the answer to {method} {path} at {}", self.socket_path.display()), timeout);
        let answer = runtime.block_on(async { wait.answered(exchange.perform(request)).await });
        let (status, body) = answer.unwrap_or_else(|| {
            Err(ClientError::TimedOut { method: method.to_owned(), path: path.to_owned(), timeout })
        })?;
        exchange.understand(status, &body)
    }
}

/// One request and its answer.
struct Exchange<'a> {
    socket_path: &'a Path,
    method: &'a str,
    path: &'a str,
}

impl Exchange<'_> {
    fn http_request(&self, body: Option<&Value>) -> Result<Request<Full<Bytes>>, ClientError> {
        let bad = |reason: String| ClientError::BadRequest {
            method: self.method.to_owned(),
            path: self.path.to_owned(),
            reason,
        };
        let method = Method::from_bytes(self.method.as_bytes()).map_err(|error| bad(error.to_string()))?;
        let uri: Uri = self.path.parse().map_err(|error: axum::http::uri::InvalidUri| bad(error.to_string()))?;
        if !self.path.starts_with('/') {
            return Err(bad("its path does not begin with /".to_owned()));
        }
        let mut request = Request::builder().method(method).uri(uri).header("host", "localhost");
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        request.body(Full::from(body)).map_err(|error| bad(error.to_string()))
    }

    async fn perform(&self, request: Request<Full<Bytes>>) -> Result<(u16, Bytes), ClientError> {
        let stream = UnixStream::connect(self.socket_path).await.map_err(|source| self.connect_error(source))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.no_answer(error.into()))?;
        tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(|error| self.no_answer(error.into()))?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES);
        let body = body.collect().await.map_err(|error| self.no_answer(error))?;
        Ok((status, body.to_bytes()))
    }

    fn understand(&self, status: u16, body: &[u8]) -> Result<(u16, Option<Value>), ClientError> {
        let body = match body {
            [] => None,
            body => Some(serde_json::from_slice::<Value>(body).map_err(|source| ClientError::NotJson {
                method: self.method.to_owned(),
                path: self.path.to_owned(),
                status,
                source,
            })?),
        };
        if status < 400 {
            return Ok((status, body));
        }
        // A VMM answers with Firecracker's `fault_message`, `tvmm serve` with `message`.
        let of_vmm = body.as_ref().and_then(|body| body.get("fault_message"));
        let message = of_vmm.or_else(|| body.as_ref()?.get("message")).and_then(Value::as_str);
        let message = message
            .map_or_else(|| format!("{} {} was answered with status {status}.", self.method, self.path), str::to_owned);
        Err(ClientError::Fault { status, message })
    }

    fn connect_error(&self, source: io::Error) -> ClientError {
        let path = self.socket_path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => ClientError::NoSocket { path },
            io::ErrorKind::ConnectionRefused => ClientError::NotServed { path },
            _ => ClientError::Connect { path, source },
        }
    }

    fn no_answer(&self, source: Box<dyn std::error::Error + Send + Sync>) -> ClientError {
        ClientError::NoAnswer { method: self.method.to_owned(), path: self.path.to_owned(), source }
    }
}
