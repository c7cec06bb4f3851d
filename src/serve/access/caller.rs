//! A client of the service: the other end of its connection, and its identity.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::counts::{AccessCounts, Refused};
use super::role::Role;
use super::token::Token;
use super::token_file::{Accepted, Running};
use crate::serve::fault::Fault;
use crate::snapshot::Sha256Digest;

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub enum Peer {
    /// A client over TCP.
    Tcp {
        /// The address that it has connected to.
        local: IpAddr,
        remote: SocketAddr,
        /// The digest of the certificate by which it has proved its identity.
        certificate: Option<Sha256Digest>,
    },
    /// A client of the Unix socket, whose mode and directories say who may connect.
    Unix {
        /// The user of its process.
        uid: u32,
    },
}

impl Peer {
    /// The same client, after it has proved its identity.
    pub fn with_certificate(self, proof: Option<Sha256Digest>) -> Peer {
        match self {
            Peer::Tcp { local, remote, .. } => Peer::Tcp { local, remote, certificate: proof },
            Peer::Unix { uid } => Peer::Unix { uid },
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp { remote, .. } => remote.fmt(f),
            Peer::Unix { .. } => f.write_str("unix"),
        }
    }
}

/// The identity of the client that has sent a request.
#[derive(Clone, Debug)]
pub enum Caller {
    /// It has sent the secret of this token.
    Token(Arc<Accepted>),
    /// It has connected to the Unix socket as this user.
    User(u32),
    /// It has the certificate with this digest, and the service takes no tokens.
    Certificate(Sha256Digest),
    /// The service takes no tokens.
    Anyone,
}

impl Caller {
    pub fn role(&self) -> Role {
        match self {
            Caller::Token(accepted) => accepted.token.role,
            Caller::User(_) | Caller::Certificate(_) | Caller::Anyone => Role::Admin,
        }
    }

    /// Takes a place for an invocation, or a start of VMs, until it has ended. Clients without a token need none.
    pub fn run(&self, counts: &AccessCounts) -> Result<Option<Running>, Fault> {
        let Caller::Token(accepted) = self else { return Ok(None) };
        let running = accepted.run();
        if running.is_none() {
            counts.refused(Refused::Running);
            let Token { name, max_running, .. } = &accepted.token;
            let most = max_running.unwrap_or(u32::MAX);
            return Err(Fault::busy(format!(
                "Cannot answer this request of `{name}`: its token has {most} invocations and starts of VMs, which is \
                 all it may have at once. Try again later."
            )));
        }
        Ok(running)
    }

    /// The name in the audit log.
    pub fn name(&self) -> Option<String> {
        match self {
            Caller::Token(accepted) => Some(accepted.token.name.clone()),
            Caller::User(uid) => Some(format!("uid {uid}")),
            Caller::Certificate(digest) => Some(format!("certificate {digest}")),
            Caller::Anyone => None,
        }
    }
}
