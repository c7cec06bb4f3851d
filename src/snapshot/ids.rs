//! Names of things: 32-byte digests that are written as hexadecimal text, and tier numbers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Text that is not an identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no identifier and no digest (64 lower-case hexadecimal digits)")]
pub struct BadDigestText {
    /// The first 80 characters.
    pub text: String,
}

macro_rules! hex_digest {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub [u8; 32]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = BadDigestText;

            fn from_str(text: &str) -> Result<$name, BadDigestText> {
                parse_hex(text).map($name)
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadDigestText;

            fn try_from(text: String) -> Result<$name, BadDigestText> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
    };
}

hex_digest! {
    /// The identity of a snapshot: BLAKE3 over its manifest, which carries the digests of everything else.
    ///
    /// Text form (`Display`, `FromStr`, serde): 64 lower-case hexadecimal digits.
    SnapshotId
}

hex_digest! {
    /// A BLAKE3 digest. Text form as for [`SnapshotId`].
    Digest
}

hex_digest! {
    /// The identity of a pool: random, given when the pool is made. Text form as for [`SnapshotId`].
    PoolId
}

hex_digest! {
    /// A SHA-256 digest. Text form as for [`SnapshotId`].
    Sha256Digest
}

/// Upper case is refused: one snapshot has one spelling.
fn parse_hex(text: &str) -> Result<[u8; 32], BadDigestText> {
    let bad = || BadDigestText { text: text.chars().take(80).collect() };
    let digits = text.as_bytes();
    let mut out = [0; 32];
    if digits.len() != 2 * out.len() {
        return Err(bad());
    }
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        for digit in pair {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return Err(bad()),
            };
            *byte = *byte << 4 | value;
        }
    }
    Ok(out)
}

/// The number of a tier of memory on this host. The tiering room gives it its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TierId(pub u16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_text_round_trips() {
        let id = SnapshotId(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(id.to_string().parse::<SnapshotId>().unwrap(), id);
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(json, format!("\"{id}\""));
        assert_eq!(serde_json::from_str::<SnapshotId>(&json).unwrap(), id);
    }

    #[test]
    fn id_text_invalid_is_refused() {
        for text in ["", "00", &"0".repeat(63), &"0".repeat(65), &"A".repeat(64), &"ä".repeat(32), &"g".repeat(64)] {
            assert!(matches!(text.parse::<SnapshotId>(), Err(BadDigestText { .. })), "{text}");
        }
    }
}
