//! The right that each request needs.

use axum::http::Method;

use super::role::Role;

/// The right that a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// None: the answer tells nothing about functions and VMs.
    Open,
    /// A role, unless the command line opens metrics, or the client is on this host.
    Metrics,
    /// This role or one with more rights.
    Role(Role),
}

/// The right that a request needs. A path that is not listed here needs the role `admin`, so a new one is closed until
/// it is listed.
pub fn required(method: &Method, path: &str) -> Right {
    let is_read = matches!(*method, Method::GET | Method::HEAD);
    let section = path.split('/').nth(1).unwrap_or_default();
    match (path, section, is_read) {
        ("/health" | "/ui", _, true) => Right::Open,
        ("/metrics", _, true) => Right::Metrics,
        ("/openapi.json" | "/policies" | "/invocations", _, _) => Right::Role(Role::Invoke),
        (_, "functions" | "traces", true) => Right::Role(Role::Invoke),
        (_, "functions" | "vms" | "snapshots", _) => Right::Role(Role::Operate),
        (_, "ui" | "net-ifaces", true) => Right::Role(Role::Operate),
        _ => Right::Role(Role::Admin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_are_not_listed_need_the_highest_role() {
        for path in ["", "/", "*", "//functions", "/%66unctions", "/health/x", "/metrics/", "/unknown", "/vmms"] {
            assert_eq!(required(&Method::GET, path), Right::Role(Role::Admin), "{path}");
        }
        assert_eq!(required(&Method::POST, "/health"), Right::Role(Role::Admin));
        assert_eq!(required(&Method::DELETE, "/net-ifaces/a"), Right::Role(Role::Admin));
        assert_eq!(required(&Method::DELETE, "/functions/a"), Right::Role(Role::Operate));
    }
}
