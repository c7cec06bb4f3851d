//! The checks that each request passes before a handler sees it: names and sites (`access/names.rs`), tokens and roles,
//! limits of tokens; and its line in the audit log.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use axum::response::IntoResponse;
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;

use super::access::audit::{AuditLog, Entry};
use super::access::caller::{Caller, Peer};
use super::access::counts::{AccessCounts, Refused};
use super::access::failures::{Failure, Failures};
use super::access::names::Names;
use super::access::right::{Right, required};
use super::access::token_file::TokenFile;
use super::error::ServeError;
use super::fault::Fault;
use super::options::{MetricsAccess, Options};
use crate::sys::errors::chain;
use crate::sys::timed_stream::{Phase, Step};
use crate::sys::tls::Tls;

/// Methods and headers that pages of other sites may use, if the command line lets them in.
const CORS_METHODS: HeaderValue = HeaderValue::from_static("GET, POST, PUT, PATCH, DELETE");
const CORS_HEADERS: HeaderValue = HeaderValue::from_static("authorization, content-type, traceparent");
/// Headers of answers that they may read.
const CORS_EXPOSED: HeaderValue = HeaderValue::from_static("retry-after, www-authenticate");
/// Time for which a browser may remember these, s.
const CORS_AGE: HeaderValue = HeaderValue::from_static("600");

/// Headers by which a proxy says that it has passed a request on.
const FORWARDED: [header::HeaderName; 3] =
    [header::FORWARDED, header::VIA, header::HeaderName::from_static("x-forwarded-for")];

/// The checks of a service. All connections share them.
#[derive(Debug)]
pub(super) struct Guard {
    names: Names,
    metrics: MetricsAccess,
    tls: Option<Arc<Tls>>,
    tokens: Option<TokenFile>,
    audit: Option<AuditLog>,
    failures: Failures,
    counts: Arc<AccessCounts>,
}

/// A request that a handler does not see.
struct Refusal {
    why: Refused,
    fault: Fault,
    /// Says if the request has a line in the audit log.
    recorded: Recorded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recorded {
    Yes,
    No,
}

impl Refusal {
    fn new(why: Refused, fault: Fault) -> Refusal {
        Refusal { why, fault, recorded: Recorded::Yes }
    }
}

/// A request that has passed.
enum Admitted {
    /// A browser asks whether a page of another site may send a request.
    Preflight,
    /// The answer tells nothing about functions and VMs.
    Open,
    /// The request of a client with the right to it.
    Client(Caller),
}

impl Guard {
    /// Opens the files of TLS, the token file and the audit log.
    pub(super) fn open(options: &Options, counts: Arc<AccessCounts>) -> Result<Guard, ServeError> {
        let access = &options.access;
        Ok(Guard {
            names: Names { hosts: options.hosts.clone(), cors_origins: access.cors_origins.clone() },
            metrics: access.metrics,
            tls: access.tls.clone().map(Tls::open).transpose()?.map(Arc::new),
            tokens: access.tokens.as_deref().map(TokenFile::open).transpose()?,
            audit: access.audit_log.as_deref().map(AuditLog::open).transpose()?,
            failures: Failures::default(),
            counts,
        })
    }

    /// Returns whether SIGHUP makes the service open files again.
    pub(super) fn has_files(&self) -> bool {
        self.tls.is_some() || self.tokens.is_some() || self.audit.is_some()
    }

    /// TLS for clients over TCP, if they need it.
    pub(super) fn tls(&self) -> Option<Arc<Tls>> {
        self.tls.clone()
    }

    /// Counts a connection that has failed in the handshake.
    pub(super) fn count_handshake(&self) {
        self.counts.refused(Refused::Handshake);
    }

    /// Reads the files of TLS and the token file again, and opens the audit log again. A file that cannot be opened
    /// leaves the former one in use. Blocks for the disk.
    pub(super) fn reload(&self) {
        let failed = |error: &(dyn std::error::Error + 'static), message| {
            self.counts.reloads_failed.fetch_add(1, Ordering::Relaxed);
            tracing::error!(error = chain(error), "{message}");
        };
        if let Some(Err(error)) = self.tls.as_ref().map(|tls| tls.reload()) {
            failed(&error, "The former certificates stay in use");
        }
        match self.tokens.as_ref().map(TokenFile::reload) {
            Some(Ok(count)) => tracing::info!(count, "The token file was read again"),
            Some(Err(error)) => failed(&error, "The former tokens stay valid"),
            None => {}
        }
        if let Some(Err(error)) = self.audit.as_ref().map(AuditLog::reopen) {
            failed(&error, "The former audit log stays in use");
        }
    }

    /// Waits until the lines of all requests are in the audit log. Blocks for the disk.
    pub(super) fn finish(&self, deadline: Instant) {
        if self.audit.as_ref().is_some_and(|audit| !audit.finish(deadline)) {
            tracing::error!("Cannot write the last lines of the audit log");
        }
    }

    fn admit<B>(&self, peer: Peer, request: &Request<B>, entry: &mut Entry) -> Result<Admitted, Refusal> {
        let headers = request.headers();
        let local = match peer {
            Peer::Tcp { local, .. } => Some(local),
            Peer::Unix { .. } => None,
        };
        self.names.check(local, request.uri(), headers).map_err(|(why, fault)| self.stranger(peer, why, fault))?;
        let is_preflight = request.method() == Method::OPTIONS
            && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
            && self.names.allowed_origin(headers).is_some();
        if is_preflight {
            return Ok(Admitted::Preflight);
        }
        let right = required(request.method(), request.uri().path());
        if right == Right::Open {
            return Ok(Admitted::Open);
        }
        if let Some(Err(fault)) = self.audit.as_ref().map(AuditLog::check) {
            return Err(Refusal { why: Refused::Audit, fault, recorded: Recorded::No });
        }
        let caller = self.identify(peer, headers, right)?;
        entry.by(&caller);
        Guard::check_rights(&caller, right)?;
        Ok(Admitted::Client(caller))
    }

    /// Finds the client of a request.
    fn identify(&self, peer: Peer, headers: &HeaderMap, right: Right) -> Result<Caller, Refusal> {
        let (remote, certificate) = match peer {
            Peer::Unix { uid } => return Ok(Caller::User(uid)),
            Peer::Tcp { remote, certificate, .. } => (remote, certificate),
        };
        let Some(tokens) = &self.tokens else {
            return Ok(certificate.map_or(Caller::Anyone, Caller::Certificate));
        };
        let why = match headers.get(header::AUTHORIZATION).map(|value| bearer(value.as_bytes())) {
            None => {
                let is_forwarded = FORWARDED.iter().any(|name| headers.contains_key(name));
                let is_local = remote.ip().to_canonical().is_loopback() && !is_forwarded;
                if right == Right::Metrics && (self.metrics == MetricsAccess::Open || is_local) {
                    return Ok(Caller::Anyone);
                }
                "it has no token. Send the header `Authorization: Bearer SECRET`"
            }
            Some(None) => "its `Authorization` is of another kind. Send `Authorization: Bearer SECRET`",
            Some(Some(secret)) => match tokens.find(secret) {
                Some(accepted) => return Ok(Caller::Token(accepted)),
                None => "its token is unknown. The service's owner makes tokens by `tvmm token new`",
            },
        };
        let fault = Fault::new(StatusCode::UNAUTHORIZED, format!("Cannot answer this request: {why}."));
        Err(self.stranger(peer, Refused::Token, fault))
    }

    /// Counts a request of an unknown client. An address that sends many of them fills no logs.
    fn stranger(&self, peer: Peer, why: Refused, fault: Fault) -> Refusal {
        let Peer::Tcp { remote, .. } = peer else { return Refusal::new(why, fault) };
        let (wait_s, recorded) = match self.failures.count(remote.ip()) {
            Failure::Counted => return Refusal::new(why, fault),
            Failure::First(wait_s) => (wait_s, Recorded::Yes),
            Failure::Further(wait_s) => (wait_s, Recorded::No),
        };
        if why != Refused::Token {
            return Refusal { why, fault, recorded };
        }
        let message = "Cannot answer this request: too many requests from this address had no valid token. Try again \
                       later, or with a valid token.";
        let fault = Fault { retry_after_s: Some(wait_s), ..Fault::busy(message) };
        Refusal { why: Refused::Throttled, fault, recorded }
    }

    fn check_rights(caller: &Caller, right: Right) -> Result<(), Refusal> {
        let Caller::Token(accepted) = caller else { return Ok(()) };
        let token = &accepted.token;
        if let Right::Role(needed) = right
            && token.role < needed
        {
            let message = format!(
                "Cannot answer this request of `{}`: it needs the role `{needed}`, and the token has `{}`.",
                token.name, token.role
            );
            return Err(Refusal::new(Refused::Role, Fault::new(StatusCode::FORBIDDEN, message)));
        }
        if let Some(wait_s) = accepted.over_rate() {
            let message = format!(
                "Cannot answer this request of `{}`: its token has made as many as it may in a second. Try again \
                 later.",
                token.name
            );
            let fault = Fault { retry_after_s: Some(wait_s), ..Fault::busy(message) };
            return Err(Refusal::new(Refused::Rate, fault));
        }
        Ok(())
    }
}

/// The secret in the value of an `Authorization` header.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, secret) = value.split_at_checked(b"bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| secret.trim_ascii())
}

/// A request that is being answered. Its end adds its line to the audit log, also if its client has left.
struct Recording {
    guard: Arc<Guard>,
    entry: Entry,
    recorded: Recorded,
    status: Option<StatusCode>,
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.recorded == Recorded::Yes
            && let Some(audit) = &self.guard.audit
        {
            audit.put(&self.entry, self.status);
        }
    }
}

/// The service on one connection.
pub(super) struct GuardedService {
    pub(super) service: TowerToHyperService<Router>,
    pub(super) guard: Arc<Guard>,
    pub(super) peer: Peer,
    pub(super) phase: Arc<Phase>,
}

impl Service<Request<Incoming>> for GuardedService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        self.phase.set(Step::Busy);
        let phase = self.phase.clone();
        let guard = self.guard.clone();
        let mut entry = Entry::begin(self.peer, request.method(), request.uri().path());
        let cors_origin = guard.names.allowed_origin(request.headers());
        let admitted = guard.admit(self.peer, &request, &mut entry);
        let recorded = match &admitted {
            Ok(Admitted::Client(_)) => Recorded::Yes,
            Ok(Admitted::Preflight | Admitted::Open) => Recorded::No,
            Err(refusal) => refusal.recorded,
        };
        let mut recording = Recording { guard: guard.clone(), entry, recorded, status: None };
        let served = match admitted {
            Ok(Admitted::Preflight) => Err(preflight()),
            Ok(Admitted::Open) => Ok(self.service.call(request)),
            Ok(Admitted::Client(caller)) => {
                request.extensions_mut().insert(caller);
                if guard.audit.is_some() {
                    request.extensions_mut().insert(recording.entry.objects.clone());
                }
                Ok(self.service.call(request))
            }
            Err(refusal) => {
                guard.counts.refused(refusal.why);
                Err(refusal.fault.into_response())
            }
        };
        Box::pin(async move {
            let mut response = match served {
                Ok(response) => response.await?,
                Err(response) => response,
            };
            if let Some(origin) = cors_origin {
                let headers = response.headers_mut();
                headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
                headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, CORS_EXPOSED);
                headers.append(header::VARY, HeaderValue::from_static("origin"));
            }
            recording.status = Some(response.status());
            drop(recording);
            phase.set(Step::Idle);
            Ok(response)
        })
    }
}

/// The answer to a browser that asks whether a page of a site that was let in may send a request.
fn preflight() -> Response<Body> {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, CORS_METHODS);
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, CORS_HEADERS);
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, CORS_AGE);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_is_what_follows_the_scheme() {
        for (value, secret) in [
            ("Bearer tvmm_1", Some("tvmm_1")),
            ("bearer  tvmm_1 ", Some("tvmm_1")),
            ("Basic dG9r", None),
            ("Bearer", None),
            ("tvmm_1", None),
            ("", None),
        ] {
            assert_eq!(bearer(value.as_bytes()), secret.map(str::as_bytes), "{value}");
        }
    }
}
