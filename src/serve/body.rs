//! Parses requests: bodies within limits of size and time, queries, names.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::extract::{FromRequest, OptionalFromRequest, Request};
use axum::http::{StatusCode, Uri, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Body as _;
use serde::de::DeserializeOwned;

use super::access::audit::Objects;
use super::fault::Fault;

/// The largest body.
const MAX_BODY_BYTES: usize = 64 << 10;
/// Time for a client to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest name of a function, snapshot or namespace.
const MAX_NAME: usize = 64;

/// A JSON body. Its content type must say so, which also keeps pages of other origins from sending requests by a
/// browser.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for Body<T> {
    type Rejection = Fault;

    async fn from_request(request: Request, _: &S) -> Result<Self, Fault> {
        let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let is_json = content_type.is_some_and(|value| {
            value.split(';').next().is_some_and(|mime| mime.trim().eq_ignore_ascii_case("application/json"))
        });
        if !is_json {
            let message = "The body must be JSON, with the header `Content-Type: application/json`.";
            return Err(Fault::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let objects = request.extensions().get::<Objects>().cloned();
        let body = Limited::new(request.into_body(), MAX_BODY_BYTES).collect();
        let bytes = match tokio::time::timeout(BODY_TIMEOUT, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                let message = format!("The body is larger than {MAX_BODY_BYTES} bytes.");
                return Err(Fault::new(StatusCode::PAYLOAD_TOO_LARGE, message));
            }
            Ok(Err(error)) => return Err(Fault::bad(format!("Cannot read the body: {error}."))),
            Err(_) => {
                let message = format!("The body was not received within {} s.", BODY_TIMEOUT.as_secs());
                return Err(Fault::new(StatusCode::REQUEST_TIMEOUT, message));
            }
        };
        if let Some(objects) = objects {
            objects.add_body(&bytes);
        }
        serde_json::from_slice(&bytes).map(Body).map_err(|error| Fault::bad(format!("The body is wrong: {error}.")))
    }
}

/// A body that may be absent: a request without content has none, whatever its content type.
impl<T: DeserializeOwned, S: Sync> OptionalFromRequest<S> for Body<T> {
    type Rejection = Fault;

    async fn from_request(request: Request, state: &S) -> Result<Option<Self>, Fault> {
        if request.body().is_end_stream() {
            return Ok(None);
        }
        <Self as FromRequest<S>>::from_request(request, state).await.map(Some)
    }
}

/// The keys of a query; unknown keys are errors.
pub(super) fn query(uri: &Uri, known: &[&str]) -> Result<BTreeMap<String, String>, Fault> {
    let mut found = BTreeMap::new();
    for pair in uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if !known.contains(&key) {
            return Err(Fault::bad(format!("The query has no key `{key}`; known: {}.", known.join(", "))));
        }
        let value = decoded(value).ok_or_else(|| Fault::bad(format!("The value of `{key}` is not text.")))?;
        if found.insert(key.to_string(), value).is_some() {
            return Err(Fault::bad(format!("The query has `{key}` twice.")));
        }
    }
    Ok(found)
}

/// Undoes percent-encoding.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let high = char::from(rest.next()?).to_digit(16)?;
                let low = char::from(rest.next()?).to_digit(16)?;
                (high * 16 + low) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// A number of a query.
pub(super) fn number(query: &BTreeMap<String, String>, key: &str) -> Result<Option<u64>, Fault> {
    let parsed = query.get(key).map(|value| value.parse());
    parsed.transpose().map_err(|_| Fault::bad(format!("`{key}` must be a number.")))
}

/// Refuses a text that cannot be the name of a file in the daemon's directory.
pub(super) fn check_name(kind: &str, name: &str) -> Result<(), Fault> {
    let good = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.chars().all(good) {
        return Err(Fault::bad(format!(
            "`{}` cannot be the name of a {kind}: 1 to {MAX_NAME} of A-Z a-z 0-9 _ . -, not beginning with a dot.",
            name.chars().take(MAX_NAME).collect::<String>().escape_default()
        )));
    }
    Ok(())
}

/// Refuses a text that would be more than one line for a guest.
pub(super) fn check_line(what: &str, text: &str) -> Result<(), Fault> {
    const MAX_LINE: usize = 960;
    if text.len() > MAX_LINE || !text.chars().all(|c| c == ' ' || c.is_ascii_graphic()) {
        return Err(Fault::bad(format!("{what} must be at most {MAX_LINE} printable ASCII characters.")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded_and_unknown_keys_refused() {
        let uri: Uri = "/x?a=b%20c&d=1".parse().unwrap();
        let found = query(&uri, &["a", "d"]).unwrap();
        assert_eq!(found["a"], "b c");
        assert_eq!(number(&found, "d"), Ok(Some(1)));
        assert!(number(&found, "a").is_err());
        for bad in ["/x?z=1", "/x?a=1&a=2", "/x?a=%zz", "/x?a=%ff"] {
            assert!(query(&bad.parse().unwrap(), &["a"]).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for bad in ["", ".", "..", ".x", "a/b", "a\0", "a b", &"x".repeat(65)] {
            assert!(check_name("function", bad).is_err(), "{bad:?}");
        }
        assert!(check_name("function", "A-1_b.c").is_ok());
    }
}
