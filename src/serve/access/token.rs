//! Tokens: the secret that a client sends, and the line of a token file that knows only its digest.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::role::Role;
use crate::snapshot::{Sha256Digest, random_hex};

/// Beginning of each secret, by which scanners for leaked secrets know it.
const PREFIX: &str = "tvmm_";
/// Random bytes of a secret.
const SECRET_BYTES: usize = 32;
/// Longest name of a token.
const NAME_MAX: usize = 64;

/// A token, as a line of a token file has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// The name in the audit log.
    pub name: String,
    /// The rights of its clients.
    pub role: Role,
    /// The digest of its secret.
    pub sha256: Sha256Digest,
    /// Requests that its clients may make a second; none: any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_requests_per_s: Option<u32>,
    /// Invocations, and starts and forks of VMs, that its clients may have at once, those that wait for their turn
    /// included; none: any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_running: Option<u32>,
}

/// The secret of a token. It cannot be printed by mistake.
pub struct Secret(String);

impl Secret {
    /// Makes a secret.
    pub fn new() -> Secret {
        Secret(format!("{PREFIX}{}", random_hex(SECRET_BYTES)))
    }

    /// The text that a client sends.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Its digest.
    pub fn digest(&self) -> Sha256Digest {
        digest(self.0.as_bytes())
    }
}

impl Default for Secret {
    fn default() -> Secret {
        Secret::new()
    }
}

/// The digest of a secret as a client has sent it.
pub(super) fn digest(secret: &[u8]) -> Sha256Digest {
    Sha256Digest(Sha256::digest(secret).into())
}

impl Token {
    /// Checks a name and limits.
    ///
    /// # Errors
    /// The defect and its remedy.
    pub fn check(&self) -> Result<(), String> {
        let is_good = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        if self.name.is_empty() || self.name.len() > NAME_MAX || !self.name.chars().all(is_good) {
            let name = self.name.chars().take(NAME_MAX).collect::<String>();
            return Err(format!("`{}` is no name: use 1 to {NAME_MAX} of A-Z a-z 0-9 _ . -", name.escape_default()));
        }
        for (key, limit) in [("max_requests_per_s", self.max_requests_per_s), ("max_running", self.max_running)] {
            if limit == Some(0) {
                return Err(format!("`{key}` is 0: give 1 or more, or remove the token"));
            }
        }
        Ok(())
    }

    /// The line of a token file.
    pub fn line(&self) -> String {
        // Text, a number and an enum: nothing that JSON cannot hold.
        serde_json::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_is_that_of_sha256sum() {
        // FIPS 180-2, appendix B.1.
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest(b"abc").to_string(), expected);
    }

    #[test]
    fn secrets_have_256_random_bits() {
        let secret = Secret::new();
        assert_eq!(secret.reveal().len(), PREFIX.len() + 2 * SECRET_BYTES);
        assert_ne!(secret.reveal(), Secret::new().reveal());
    }
}
