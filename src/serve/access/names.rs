//! Refuses requests that a web page of another site makes a browser send. It checks the name by which the browser has
//! called this service (`Host`), and the site of the page (`Origin`).

use std::net::IpAddr;

use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};

use super::counts::Refused;
use crate::serve::fault::Fault;

/// The names by which clients may call a service, and the sites whose pages may.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// Names in addition to those of loopback. Pages of these hosts are the service's own.
    pub hosts: Vec<String>,
    /// Origins of other sites, `https://HOST[:PORT]`, whose pages may read answers.
    pub cors_origins: Vec<String>,
}

impl Names {
    /// Refuses a request that a browser may have sent for a page of another site. `local`: the address that the client
    /// has connected to; none: a Unix socket, to which no browser connects.
    pub fn check(&self, local: Option<IpAddr>, uri: &Uri, headers: &HeaderMap) -> Result<(), (Refused, Fault)> {
        let host = headers.get(header::HOST).map(|value| value.to_str().unwrap_or_default());
        for name in [host, uri.authority().map(Authority::as_str)].into_iter().flatten() {
            let is_known = |local| is_host(name).is_some_and(|host| self.knows(host, local));
            if local.is_some_and(|local| !is_known(local)) {
                let name = name.escape_default();
                let message = format!(
                    "Cannot answer under the name `{name}`: it is not one of this service's. Use a loopback name or \
                     the address it listens at, or start it with --host NAME."
                );
                return Err((Refused::Host, Fault::new(StatusCode::FORBIDDEN, message)));
            }
        }
        let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
        if self.allowed_origin(headers).is_some() {
            return Ok(());
        }
        let origin = origin.to_str().unwrap_or_default();
        let site = origin.split_once("://").map(|(_, site)| site);
        let is_own = site.zip(host).is_some_and(|(site, host)| site.eq_ignore_ascii_case(host));
        if is_own || site.and_then(is_host).is_some_and(|host| self.is_named(host)) {
            return Ok(());
        }
        let origin = origin.escape_default();
        let message = format!(
            "Cannot answer a page of `{origin}`: it is another site. Start the service with --host NAME if its pages \
             are the service's own, or with --cors-origin to let that site in."
        );
        Err((Refused::Origin, Fault::new(StatusCode::FORBIDDEN, message)))
    }

    /// The origin of a request, if its site has been let in by the command line.
    pub fn allowed_origin(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let origin = headers.get(header::ORIGIN)?;
        self.cors_origins.iter().any(|allowed| origin == allowed).then(|| origin.clone())
    }

    fn is_named(&self, host: &str) -> bool {
        self.hosts.iter().any(|name| name.eq_ignore_ascii_case(host))
    }

    fn knows(&self, host: &str, local: IpAddr) -> bool {
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        let is_own = match address.map(|address| address.to_canonical()) {
            Ok(address) => address.is_loopback() || address == local,
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

#[cfg(test)]
mod tests {
    use super::*;

    const LOCAL: &str = "192.0.2.7";

    fn names() -> Names {
        Names { hosts: vec!["tvmm.example".into()], cors_origins: vec!["https://app.example".into()] }
    }

    fn status(local: Option<&str>, uri: &str, host: &str, origin: Option<&str>) -> u16 {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, origin.parse().unwrap());
        }
        let local = local.map(|local| local.parse().unwrap());
        let checked = names().check(local, &uri.parse().unwrap(), &headers);
        checked.map_or_else(|(_, fault)| fault.status.as_u16(), |()| 200)
    }

    #[test]
    fn only_names_of_this_service_are_answered() {
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
            assert_eq!(status(Some(LOCAL), "/", host, None), expected, "{host}");
        }
        assert_eq!(status(Some(LOCAL), "http://evil.example/", "localhost", None), 403);
        assert_eq!(status(Some(LOCAL), "http://localhost/", "localhost", None), 200);
        assert_eq!(status(None, "/", "x", None), 200);
        assert_eq!(status(None, "/", "x", Some("http://evil.example")), 403);
    }

    #[test]
    fn only_pages_of_this_service_are_answered() {
        for (origin, expected) in [
            ("http://localhost:8080", 200),
            ("https://tvmm.example", 200),
            ("https://app.example", 200),
            ("http://app.example", 403),
            ("https://app.example:444", 403),
            ("http://localhost:3000", 403),
            ("http://evil.example", 403),
            ("http://evil.example/localhost:8080", 403),
            ("null", 403),
            ("", 403),
        ] {
            assert_eq!(status(Some(LOCAL), "/", "localhost:8080", Some(origin)), expected, "{origin}");
        }
    }
}
