//! Refuses requests that a web page of another site makes a browser send. It checks the name by which the browser has
//! called this service (`Host`), and the site of the page (`Origin`).

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Request, Response, StatusCode, Uri, header};
use axum::response::IntoResponse;
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;

use super::fault::Fault;
use crate::sys::timed_stream::{Phase, Step};

/// The names by which clients may call a service.
#[derive(Clone, Debug)]
pub(super) struct Names {
    /// Names in addition to those of loopback.
    pub(super) more: Arc<[String]>,
    /// The address that the client has connected to; none: a Unix socket, to which no browser connects.
    pub(super) local: Option<IpAddr>,
}

impl Names {
    /// Refuses a request that a browser may have sent for a page of another site.
    fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), Fault> {
        let host = headers.get(header::HOST).map(|value| value.to_str().unwrap_or_default());
        for name in [host, uri.authority().map(Authority::as_str)].into_iter().flatten() {
            if self.local.is_some() && !is_host(name).is_some_and(|host| self.knows(host)) {
                let name = name.escape_default();
                return Err(Fault::new(
                    StatusCode::FORBIDDEN,
                    format!(
                        "Cannot answer under the name `{name}`: it is not one of this service's. Use a loopback \
                         name or the address it listens at, or start it with --host NAME."
                    ),
                ));
            }
        }
        let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
        let origin = origin.to_str().unwrap_or_default();
        let site = origin.split_once("://").map(|(_, site)| site);
        let is_own = site.zip(host).is_some_and(|(site, host)| site.eq_ignore_ascii_case(host));
        if is_own || site.and_then(is_host).is_some_and(|host| self.is_named(host)) {
            return Ok(());
        }
        let origin = origin.escape_default();
        let message = format!(
            "Cannot answer a page of `{origin}`: it is another site. Start the service with --host NAME to let it in."
        );
        Err(Fault::new(StatusCode::FORBIDDEN, message))
    }

    fn is_named(&self, host: &str) -> bool {
        self.more.iter().any(|name| name.eq_ignore_ascii_case(host))
    }

    fn knows(&self, host: &str) -> bool {
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        let is_own = match address.map(|address| address.to_canonical()) {
            Ok(address) => address.is_loopback() || Some(address) == self.local,
            Err(_) => {
                let host = host.to_ascii_lowercase();
                host == "localhost" || host.ends_with(".localhost")
            }
        };
        is_own || self.is_named(host)
    }
}

/// Returns the host of `HOST[:PORT]` if the text has this form.
fn is_host(text: &str) -> Option<&str> {
    let authority = text.parse::<Authority>().ok()?;
    let host = authority.host().len();
    (!text.contains('@')).then(|| &text[..host])
}

/// The service on one connection.
pub(super) struct GuardedService {
    pub(super) service: TowerToHyperService<Router>,
    pub(super) names: Names,
    pub(super) phase: Arc<Phase>,
}

impl Service<Request<Incoming>> for GuardedService {
    type Response = Response<axum::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.phase.set(Step::Busy);
        let phase = self.phase.clone();
        let served = self.names.check(request.uri(), request.headers()).map(|()| self.service.call(request));
        Box::pin(async move {
            let response = match served {
                Ok(response) => response.await,
                Err(fault) => Ok(fault.into_response()),
            };
            phase.set(Step::Idle);
            response
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(names: &Names, uri: &str, host: &str, origin: Option<&str>) -> u16 {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, origin.parse().unwrap());
        }
        let checked = names.check(&uri.parse().unwrap(), &headers);
        checked.map_or_else(|fault| fault.status.as_u16(), |()| 200)
    }

    #[test]
    fn only_names_of_this_service_are_answered() {
        let names = Names { more: ["tvmm.example".to_string()].into(), local: Some("192.0.2.7".parse().unwrap()) };
        for (host, expected) in [
            ("127.0.0.1:8080", 200),
            ("[::1]:8080", 200),
            ("[::ffff:127.0.0.1]", 200),
            ("LOCALHOST", 200),
            ("a.localhost:1", 200),
            ("192.0.2.7:80", 200),
            ("TVMM.example:80", 200),
            ("192.0.2.8", 403),
            ("evil.example", 403),
            ("localhost.evil.example", 403),
            ("evil-localhost", 403),
            ("127.0.0.1.evil.example", 403),
            ("localhost@evil.example", 403),
            ("evil@localhost", 403),
            ("", 403),
        ] {
            assert_eq!(status(&names, "/", host, None), expected, "{host}");
        }
        assert_eq!(status(&names, "http://evil.example/", "localhost", None), 403);
        assert_eq!(status(&names, "http://localhost/", "localhost", None), 200);
        let by_socket = Names { local: None, ..names };
        assert_eq!(status(&by_socket, "/", "x", None), 200);
        assert_eq!(status(&by_socket, "/", "x", Some("http://evil.example")), 403);
    }

    #[test]
    fn only_pages_of_this_service_are_answered() {
        let names = Names { more: ["tvmm.example".to_string()].into(), local: Some("127.0.0.1".parse().unwrap()) };
        for (origin, expected) in [
            ("http://localhost:8080", 200),
            ("https://tvmm.example", 200),
            ("http://localhost:3000", 403),
            ("http://evil.example", 403),
            ("http://evil.example/localhost:8080", 403),
            ("null", 403),
            ("", 403),
        ] {
            assert_eq!(status(&names, "/", "localhost:8080", Some(origin)), expected, "{origin}");
        }
    }
}
