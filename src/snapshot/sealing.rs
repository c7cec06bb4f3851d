//! Encryption at rest: the key of a user, the keys made of it, and the two things that they protect: files of a
//! snapshot as a whole, and chunks of a cold pool one by one.
//!
//! AES-256-GCM (NIST SP 800-38D) needs a nonce that never comes twice with one key. So each file and each object has a
//! key of its own, made of the user's key and 32 random bytes (BLAKE3 in its keyed mode), and counts its nonces from 0:
//! a file has one, an object one for each chunk. `docs/encryption.md` describes every byte.

use std::fmt;
use std::str::FromStr;

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce};
use rustix::rand::{GetRandomFlags, getrandom};

use super::{Digest, Error, Result, SnapshotId};

/// The first bytes of a sealed file.
const MAGIC: &[u8; 8] = b"TVMMSEAL";
/// The version of a sealed file.
const VERSION: u16 = 1;
/// Bytes of a sealed file before the encrypted ones: magic, version (u16), 0 (u16), 0 (u32), salt.
const HEAD_LEN: usize = 16 + SALT_LEN;
/// Random bytes that make a key unique.
pub const SALT_LEN: usize = 32;
/// Bytes by which encryption makes a chunk longer: the tag of AES-GCM.
pub const TAG_LEN: usize = 16;
/// Bytes by which encryption makes a file longer.
pub const SEAL_LEN: u64 = (HEAD_LEN + TAG_LEN) as u64;

/// The key of a user: 32 bytes. It is never shown.
#[derive(Clone)]
pub struct SecretKey([u8; 32]);

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey")
    }
}

/// Text that is no key. It does not show the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is not 64 lower-case hexadecimal digits. `openssl rand -hex 32` makes a key")]
pub struct NoKey;

impl FromStr for SecretKey {
    type Err = NoKey;

    /// Parses 64 lower-case hexadecimal digits, with blanks and line ends around them.
    fn from_str(text: &str) -> std::result::Result<SecretKey, NoKey> {
        text.trim().parse().map(|Digest(bytes)| SecretKey(bytes)).map_err(|_| NoKey)
    }
}

/// Bytes that were not sealed by this key, or not for this place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsealable;

/// The keys of one object of a cold pool, or of one file.
#[derive(Clone)]
pub struct ObjectKey {
    cipher: Aes256Gcm,
    mac_key: [u8; 32],
    snapshot: SnapshotId,
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ObjectKey")
    }
}

impl ObjectKey {
    /// The keys for `salt`, which must be new for each object that is written.
    pub fn new(key: &SecretKey, salt: &[u8; SALT_LEN], snapshot: SnapshotId) -> ObjectKey {
        let made_of = |purpose: &[u8]| {
            let mut hasher = blake3::Hasher::new_keyed(&key.0);
            hasher.update(purpose);
            hasher.update(salt);
            *hasher.finalize().as_bytes()
        };
        let cipher = Aes256Gcm::new(&made_of(b"tvmm chunks 1").into());
        ObjectKey { cipher, mac_key: made_of(b"tvmm index 1"), snapshot }
    }

    /// Encrypts chunk `number` in place; it becomes [`TAG_LEN`] bytes longer. A number may be used once.
    ///
    /// # Errors
    /// [`Unsealable`] for more bytes than AES-GCM takes (64 GiB).
    pub fn seal(&self, number: u32, bytes: &mut Vec<u8>) -> std::result::Result<(), Unsealable> {
        self.cipher.encrypt_in_place(&nonce(number), &self.place(number), bytes).map_err(|_| Unsealable)
    }

    /// Decrypts chunk `number` in place.
    ///
    /// # Errors
    /// [`Unsealable`] for other bytes than were sealed, or those of another chunk, snapshot or key.
    pub fn open(&self, number: u32, bytes: &mut Vec<u8>) -> std::result::Result<(), Unsealable> {
        self.cipher.decrypt_in_place(&nonce(number), &self.place(number), bytes).map_err(|_| Unsealable)
    }

    /// The code that authenticates the parts of an index: keyed BLAKE3 over the length (u64, little endian) and the
    /// bytes of each.
    pub fn mac(&self, parts: &[&[u8]]) -> Digest {
        let mut hasher = blake3::Hasher::new_keyed(&self.mac_key);
        hasher.update(&self.snapshot.0);
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Digest(*hasher.finalize().as_bytes())
    }

    /// The associated data of a chunk: its snapshot and its number.
    fn place(&self, number: u32) -> [u8; 36] {
        let mut place = [0; 36];
        place[..32].copy_from_slice(&self.snapshot.0);
        place[32..].copy_from_slice(&number.to_le_bytes());
        place
    }
}

fn nonce(number: u32) -> Nonce<aes_gcm::aead::consts::U12> {
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&number.to_le_bytes());
    nonce.into()
}

/// Random bytes for the keys of a new object.
pub fn new_salt() -> [u8; SALT_LEN] {
    let mut salt = [0; SALT_LEN];
    // The kernel's generator is ready long before any process of ours: it is asked again until it is.
    while getrandom(&mut salt[..], GetRandomFlags::empty()) != Ok(SALT_LEN) {}
    salt
}

/// Returns true for the bytes of a sealed file.
pub(crate) fn is_sealed(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Encrypts the file `name` of a snapshot as a whole.
///
/// # Errors
/// [`Error::Unsealable`] for a file that is too long.
pub(crate) fn seal_file(key: &SecretKey, snapshot: SnapshotId, name: &str, mut bytes: Vec<u8>) -> Result<Vec<u8>> {
    let salt = new_salt();
    let mut head = Vec::with_capacity(HEAD_LEN);
    head.extend_from_slice(MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&[0; 6]);
    head.extend_from_slice(&salt);
    let cipher = file_cipher(key, &salt);
    let place = file_place(&head, snapshot, name);
    let failed = |_| Error::Unsealable { object: name.to_string() };
    cipher.encrypt_in_place(&nonce(0), &place, &mut bytes).map_err(failed)?;
    head.append(&mut bytes);
    Ok(head)
}

/// Decrypts the file `name` of a snapshot; `object` names it in errors.
///
/// # Errors
/// [`Error::Truncated`], [`Error::Malformed`]; [`Error::Unsealable`] for other bytes than were sealed, or those of
/// another file, snapshot or key.
pub(crate) fn open_file(
    key: &SecretKey,
    snapshot: SnapshotId,
    object: &str,
    name: &str,
    bytes: &[u8],
) -> Result<Vec<u8>> {
    let have = bytes.len() as u64;
    let Some((head, sealed)) = bytes.split_at_checked(HEAD_LEN).filter(|_| have >= SEAL_LEN) else {
        return Err(Error::Truncated { object: object.to_string(), have, need: SEAL_LEN });
    };
    let version = u16::from_le_bytes([head[8], head[9]]);
    if version != VERSION || head[10..16] != [0; 6] {
        let problem = format!("it was encrypted in version {version}, this build reads {VERSION}");
        return Err(Error::malformed(object, problem));
    }
    let mut salt = [0; SALT_LEN];
    salt.copy_from_slice(&head[16..]);
    let mut opened = sealed.to_vec();
    let failed = |_| Error::Unsealable { object: object.to_string() };
    let cipher = file_cipher(key, &salt);
    cipher.decrypt_in_place(&nonce(0), &file_place(head, snapshot, name), &mut opened).map_err(failed)?;
    Ok(opened)
}

fn file_cipher(key: &SecretKey, salt: &[u8; SALT_LEN]) -> Aes256Gcm {
    let mut hasher = blake3::Hasher::new_keyed(&key.0);
    hasher.update(b"tvmm file 1");
    hasher.update(salt);
    Aes256Gcm::new(&(*hasher.finalize().as_bytes()).into())
}

/// The associated data of a file: its head, its snapshot and its name.
fn file_place(head: &[u8], snapshot: SnapshotId, name: &str) -> Vec<u8> {
    [head, &snapshot.0, name.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(digit: &str) -> SecretKey {
        digit.repeat(64).parse().unwrap()
    }

    #[test]
    fn keys_are_64_digits_and_are_not_shown() {
        assert!(format!("{}\n", "a1".repeat(32)).parse::<SecretKey>().is_ok());
        for text in ["", "a1", &"A1".repeat(32), &"a1".repeat(33)] {
            assert_eq!(text.parse::<SecretKey>().err(), Some(NoKey), "{text}");
        }
        assert_eq!(format!("{:?}", key("a")), "SecretKey");
    }

    #[test]
    fn chunks_open_only_in_their_place() {
        let salt = [7; SALT_LEN];
        let id = SnapshotId([1; 32]);
        let object = ObjectKey::new(&key("a"), &salt, id);
        let mut sealed = vec![5; 4096];
        object.seal(3, &mut sealed).unwrap();
        assert_eq!(sealed.len(), 4096 + TAG_LEN);
        let mut opened = sealed.clone();
        object.open(3, &mut opened).unwrap();
        assert_eq!(opened, vec![5; 4096]);
        let others = [
            (ObjectKey::new(&key("a"), &salt, id), 4),
            (ObjectKey::new(&key("b"), &salt, id), 3),
            (ObjectKey::new(&key("a"), &[8; SALT_LEN], id), 3),
            (ObjectKey::new(&key("a"), &salt, SnapshotId([2; 32])), 3),
        ];
        for (other, number) in others {
            assert_eq!(other.open(number, &mut sealed.clone()), Err(Unsealable), "{number}");
        }
        for at in [0, 2000, 4096, 4096 + TAG_LEN - 1] {
            let mut flipped = sealed.clone();
            flipped[at] ^= 1;
            assert_eq!(object.open(3, &mut flipped), Err(Unsealable), "{at}");
        }
        for len in [0, TAG_LEN - 1, TAG_LEN, 4096] {
            assert_eq!(object.open(3, &mut sealed[..len].to_vec()), Err(Unsealable), "{len}");
        }
    }

    #[test]
    fn files_open_only_whole_and_under_their_name() {
        let id = SnapshotId([1; 32]);
        let sealed = seal_file(&key("a"), id, "vmstate", b"state".to_vec()).unwrap();
        assert_eq!(sealed.len() as u64, 5 + SEAL_LEN);
        assert!(is_sealed(&sealed) && !is_sealed(b"TVMMSNAP"));
        let open = |key: &SecretKey, id, name, bytes: &[u8]| open_file(key, id, "x", name, bytes);
        assert_eq!(open(&key("a"), id, "vmstate", &sealed).unwrap(), b"state");
        assert!(open(&key("b"), id, "vmstate", &sealed).is_err());
        assert!(open(&key("a"), SnapshotId([2; 32]), "vmstate", &sealed).is_err());
        assert!(open(&key("a"), id, "pages", &sealed).is_err());
        for at in 0..sealed.len() {
            let mut flipped = sealed.clone();
            flipped[at] ^= 1;
            assert!(at < MAGIC.len() || open(&key("a"), id, "vmstate", &flipped).is_err(), "{at}");
            assert!(open(&key("a"), id, "vmstate", &sealed[..at]).is_err(), "{at}");
        }
        let again = seal_file(&key("a"), id, "vmstate", b"state".to_vec()).unwrap();
        assert_ne!(again, sealed, "each file has a key of its own");
    }
}
