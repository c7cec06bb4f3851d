//! Counts of the requests that are refused before a handler sees them.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::serve::counters::head;

/// The reason of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Its connection has failed in the TLS handshake.
    Handshake,
    /// The name of the host is none of the service's.
    Host,
    /// A page of another site has sent it.
    Origin,
    /// It has no token, or an unknown one.
    Token,
    /// Its address has failed to log in too often.
    Throttled,
    /// The role of its token is too small.
    Role,
    /// Its token has made all requests of this second.
    Rate,
    /// Its token has all invocations and starts of VMs that it may have at once.
    Running,
    /// The audit log cannot be written.
    Audit,
}

impl Refused {
    const ALL: [Refused; 9] = [
        Refused::Handshake,
        Refused::Host,
        Refused::Origin,
        Refused::Token,
        Refused::Throttled,
        Refused::Role,
        Refused::Rate,
        Refused::Running,
        Refused::Audit,
    ];

    fn name(self) -> &'static str {
        match self {
            Refused::Handshake => "handshake",
            Refused::Host => "host",
            Refused::Origin => "origin",
            Refused::Token => "token",
            Refused::Throttled => "throttled",
            Refused::Role => "role",
            Refused::Rate => "rate",
            Refused::Running => "running",
            Refused::Audit => "audit",
        }
    }
}

/// Counts since the daemon began.
#[derive(Debug, Default)]
pub struct AccessCounts {
    refused: [AtomicU64; Refused::ALL.len()],
    /// Files that could not be opened again.
    pub reloads_failed: AtomicU64,
}

impl AccessCounts {
    pub fn refused(&self, why: Refused) {
        self.refused[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Appends all counters.
    pub fn write(&self, text: &mut String) -> std::fmt::Result {
        head(text, "tvmm_requests_refused_total", "counter", "Requests refused before they were looked at, by reason")?;
        for why in Refused::ALL {
            let count = self.refused[why as usize].load(Ordering::Relaxed);
            writeln!(text, "tvmm_requests_refused_total{{reason=\"{}\"}} {count}", why.name())?;
        }
        let help = "Token files, certificates and audit logs that could not be opened again after SIGHUP";
        head(text, "tvmm_reloads_failed_total", "counter", help)?;
        writeln!(text, "tvmm_reloads_failed_total {}", self.reloads_failed.load(Ordering::Relaxed))
    }
}
