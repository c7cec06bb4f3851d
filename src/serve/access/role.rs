//! Roles of tokens.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The role of a token. Each has the rights of those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Invocations, and reading functions, traces and metrics
    Invoke,
    /// Functions, VMs and snapshots
    Operate,
    /// Everything, networks of the host included
    Admin,
}

impl Role {
    /// The name in token files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Role::Invoke => "invoke",
            Role::Operate => "operate",
            Role::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
