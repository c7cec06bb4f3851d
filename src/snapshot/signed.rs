//! Signed snapshots: the statement that a signature covers, and its check before anything of a snapshot is parsed.
//!
//! A snapshot's identity binds its state by BLAKE3, but its memory only by CRC32C, which anyone can forge. So what is
//! signed is a statement: the identity, a BLAKE3 digest of each file, and one of the held pages. It lies in
//! `signed.json` beside the snapshot's files, its signature in `signed.json.minisig`, in the format of minisign
//! (<https://jedisct1.github.io/minisign/>). `docs/signatures.md` describes both.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Cursor, ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Digest, Error, Location, Result, SnapshotId, files};

/// The version of the statement.
const STATEMENT_FORMAT: u32 = 1;
/// The largest statement, signature or key file, in bytes: a statement has a line for each copy of a drive.
const TEXT_LIMIT: u64 = 64 << 10;
/// The name of the statement in a snapshot's directory, and the end of its name beside a snapshot file.
const STATEMENT_FILE: &str = "signed.json";
/// The end of the name of a signature, behind that of the statement, as `minisign -S` names it.
const SIGNATURE_SUFFIX: &str = ".minisig";
/// The name in the statement of the snapshot file of the two-file form, which may be renamed.
pub(crate) const SNAPSHOT_FILE: &str = "snapshot";
/// Bytes read and hashed at once.
const READ_BYTES: usize = 1 << 20;

/// The facts about a snapshot that a signature covers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Statement {
    /// [`STATEMENT_FORMAT`].
    format: u32,
    /// The snapshot's identity.
    id: SnapshotId,
    /// BLAKE3 of the bytes of each file but the memory, by its name in the snapshot's directory.
    files: BTreeMap<String, Digest>,
    /// BLAKE3 of the held pages, ascending, joined without gaps.
    memory: Digest,
}

/// The public keys whose signatures are trusted.
#[derive(Clone, Debug)]
pub struct TrustedKeys(Vec<minisign_verify::PublicKey>);

/// The paths of a snapshot's statement and its signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignaturePaths {
    pub statement: PathBuf,
    pub signature: PathBuf,
}

impl SignaturePaths {
    /// The paths for the snapshot at `location`: in its directory, or beside its snapshot file.
    pub fn of(location: &Location) -> SignaturePaths {
        let extended = |path: &Path, by: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(by);
            PathBuf::from(name)
        };
        let statement = match location {
            Location::Dir(dir) => dir.join(STATEMENT_FILE),
            Location::Files { snapshot, .. } => extended(snapshot, &format!(".{STATEMENT_FILE}")),
        };
        SignaturePaths { signature: extended(&statement, SIGNATURE_SUFFIX), statement }
    }
}

impl TrustedKeys {
    /// Reads public keys as `tvmm snapshot keygen` and `minisign -G` write them. `paths` has one at least.
    ///
    /// # Errors
    /// [`Error::Key`] for a file that is no such key; [`Error::Io`].
    pub fn read(paths: &[PathBuf]) -> Result<TrustedKeys> {
        let read = |path: &PathBuf| {
            let text = read_text(path)?;
            let no_key = |_| Error::Key { path: path.clone(), kind: "public key" };
            minisign_verify::PublicKey::decode(&text).map_err(no_key)
        };
        paths.iter().map(read).collect::<Result<_>>().map(TrustedKeys)
    }
}

impl Statement {
    /// Reads the statement about the snapshot at `location` after its signature was found to be one by `keys`.
    ///
    /// # Errors
    /// [`Error::Unsigned`] without statement or signature; [`Error::BadSignature`]; [`Error::Io`].
    pub(crate) fn read_trusted(location: &Location, keys: &TrustedKeys) -> Result<Statement> {
        let SignaturePaths { statement, signature } = SignaturePaths::of(location);
        let object = || location.display();
        let unsigned = |error| match error {
            Error::Io { source, path, .. } if source.kind() == ErrorKind::NotFound => {
                Error::Unsigned { object: object(), path }
            }
            error => error,
        };
        let bytes = files::read_limited(&statement, TEXT_LIMIT).map_err(unsigned)?;
        let text = read_text(&signature).map_err(unsigned)?;
        let bad = |problem: String| Error::BadSignature { object: object(), path: signature.clone(), problem };
        let signed = minisign_verify::Signature::decode(&text).map_err(|error| bad(error.to_string()))?;
        let checks = keys.0.iter().map(|key| key.verify(&bytes, &signed, false));
        let mut refusal = None;
        for check in checks {
            match check {
                Ok(()) => return Statement::parse(&bytes).map_err(|error| bad(error.to_string())),
                // Another key's id says less than what is wrong with a signature by this key.
                Err(minisign_verify::Error::UnexpectedKeyId) => {}
                Err(error) => refusal = Some(error.to_string()),
            }
        }
        Err(bad(refusal.unwrap_or_else(|| "none of the trusted keys made it".to_string())))
    }

    /// Parses a statement whose signature is good.
    fn parse(bytes: &[u8]) -> serde_json::Result<Statement> {
        let statement: Statement = serde_json::from_slice(bytes)?;
        if statement.format != STATEMENT_FORMAT {
            let message = format!("its statement has format {}, this build reads {STATEMENT_FORMAT}", statement.format);
            return Err(serde::de::Error::custom(message));
        }
        Ok(statement)
    }

    /// The statement to be signed about the snapshot `id`.
    pub(crate) fn new(id: SnapshotId, files: BTreeMap<String, Digest>, memory: Digest) -> Statement {
        Statement { format: STATEMENT_FORMAT, id, files, memory }
    }

    /// The digest of the file with this name; none if the statement does not name it.
    fn file(&self, name: &str) -> Option<Digest> {
        self.files.get(name).copied()
    }

    /// Compares the bytes of a file with those that were signed.
    ///
    /// # Errors
    /// [`Error::NotTheSigned`]; `object` names the snapshot in it.
    pub(crate) fn check_bytes(&self, object: &str, name: &str, bytes: &[u8]) -> Result<()> {
        self.check(object, name, self.file(name), Digest(*blake3::hash(bytes).as_bytes()))
    }

    /// As [`check_bytes`](Self::check_bytes), for an open file of `len` bytes.
    pub(crate) fn check_file(&self, object: &str, name: &str, file: &File, len: u64) -> Result<()> {
        self.check(object, name, self.file(name), digest_of_bytes(file, len, Path::new(name))?)
    }

    /// Compares the identity with the one that was signed.
    pub(crate) fn check_id(&self, object: &str, id: SnapshotId) -> Result<()> {
        if id == self.id { Ok(()) } else { Err(not_the_signed(object, "identity")) }
    }

    /// Compares the digest of the held pages with the one that was signed.
    pub(crate) fn check_memory(&self, object: &str, found: Digest) -> Result<()> {
        self.check(object, "memory", Some(self.memory), found)
    }

    fn check(&self, object: &str, part: &str, signed: Option<Digest>, found: Digest) -> Result<()> {
        if signed == Some(found) { Ok(()) } else { Err(not_the_signed(object, part)) }
    }
}

fn not_the_signed(object: &str, part: &str) -> Error {
    Error::NotTheSigned { object: object.to_string(), part: part.to_string() }
}

/// BLAKE3 of the first `len` bytes of a file; `path` names it in errors.
pub(crate) fn digest_of_bytes(file: &File, len: u64, path: &Path) -> Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut at = 0;
    while at < len {
        let bytes = &mut buffer[..(len - at).min(READ_BYTES as u64) as usize];
        file.read_exact_at(bytes, at).map_err(Error::io("read", path))?;
        hasher.update(bytes);
        at += bytes.len() as u64;
    }
    Ok(Digest(*hasher.finalize().as_bytes()))
}

/// The text of a small file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let mut text = String::new();
    let bytes = files::read_limited(path, TEXT_LIMIT)?;
    Cursor::new(bytes).read_to_string(&mut text).map_err(Error::io("read", path))?;
    Ok(text)
}
