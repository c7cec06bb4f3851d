//! The header `traceparent`: the caller's span that an invocation is part of (W3C Trace Context, 3.2).

use axum::http::HeaderMap;

/// The caller's span.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    /// 32 hexadecimal digits.
    pub(super) trace_id: String,
    /// 16 hexadecimal digits.
    pub(super) span_id: String,
    /// True if the caller may have sent its part of the trace to a collector.
    pub(super) is_sampled: bool,
}

/// Parses the caller's span. An invalid header counts as absent (3.2.3: the trace then begins here).
pub(super) fn caller(headers: &HeaderMap) -> Option<Caller> {
    let mut values = headers.get_all("traceparent").iter();
    match (values.next(), values.next()) {
        (Some(value), None) => parse(value.to_str().ok()?.trim()),
        _ => None,
    }
}

fn parse(text: &str) -> Option<Caller> {
    let mut parts = text.split('-');
    let version = parts.next()?;
    let trace_id = parts.next()?;
    let span_id = parts.next()?;
    let flags = parts.next()?;
    let is_hex = |part: &str, digits: usize| {
        part.len() == digits && part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    };
    let is_id = |part: &str, digits: usize| is_hex(part, digits) && part.bytes().any(|byte| byte != b'0');
    // Later versions may append parts, this one has none.
    let is_version = is_hex(version, 2) && version != "ff" && (version != "00" || parts.next().is_none());
    if !is_version || !is_id(trace_id, 32) || !is_id(span_id, 16) || !is_hex(flags, 2) {
        return None;
    }
    let is_sampled = u8::from_str_radix(flags, 16).is_ok_and(|flags| flags & 1 == 1);
    Some(Caller { trace_id: trace_id.to_string(), span_id: span_id.to_string(), is_sampled })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    #[test]
    fn callers_are_understood() {
        let found = parse(&format!("00-{TRACE}-{SPAN}-01")).unwrap();
        assert_eq!((found.trace_id.as_str(), found.span_id.as_str(), found.is_sampled), (TRACE, SPAN, true));
        assert!(!parse(&format!("00-{TRACE}-{SPAN}-02")).unwrap().is_sampled);
        assert!(parse(&format!("01-{TRACE}-{SPAN}-01-more")).is_some());
    }

    #[test]
    fn what_is_not_valid_is_not_there() {
        let upper = TRACE.to_uppercase();
        for bad in [
            String::new(),
            "00".into(),
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{upper}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-1"),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{SPAN}-{TRACE}-01"),
        ] {
            assert_eq!(parse(&bad), None, "{bad}");
        }
    }
}
