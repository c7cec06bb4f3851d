//! The address of a collector.

/// The refusal of a build without OpenTelemetry.
#[cfg(not(feature = "otel"))]
pub const NO_OTEL: &str =
    "this build of tvmm has no OpenTelemetry: build it with `cargo build --release --features otel`";
/// The path that OTLP/HTTP gives traces ("OTLP/HTTP Request", OpenTelemetry Protocol Specification).
const TRACES_PATH: &str = "/v1/traces";

/// The reason why traces cannot be sent to an address.
#[derive(Debug, thiserror::Error)]
#[error("Traces cannot be sent to {url}: {problem}")]
pub struct Unusable {
    pub url: String,
    pub problem: String,
}

/// The collector's address, checked: `http://HOST[:PORT]`, with the path of traces if none is given.
///
/// # Errors
/// The fault of the address, or of this build.
pub fn endpoint(url: &str) -> Result<String, Unusable> {
    let wrong = |problem: &str| Unusable { url: url.to_string(), problem: problem.to_string() };
    #[cfg(not(feature = "otel"))]
    if url.starts_with("http") {
        return Err(wrong(NO_OTEL));
    }
    let Some(rest) = url.strip_prefix("http://") else {
        return Err(wrong(
            "the address must be like http://HOST:4318 (for TLS, run a collector on this host and have it forward)",
        ));
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let port = authority.rsplit_once(':').map(|(_, port)| port).filter(|port| !port.ends_with(']'));
    if !rest.bytes().all(|byte| byte.is_ascii_graphic())
        || authority.is_empty()
        || authority.starts_with(':')
        || port.is_some_and(|port| port.parse::<u16>().is_err())
    {
        return Err(wrong("it is not like http://HOST:PORT or http://HOST:PORT/v1/traces"));
    }
    let path = if path.trim_matches('/').is_empty() { TRACES_PATH } else { path };
    Ok(format!("http://{authority}{path}"))
}
