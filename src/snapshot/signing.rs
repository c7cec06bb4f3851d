//! Signing a snapshot: keys, the description of an intact snapshot, and the files of its signature.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::path::Path;

use ct_codecs::{Base64, Decoder};
use minisign::{PublicKey, SecretKey};

use super::manifest::{MANIFEST_FILE, PAGES_FILE, STATE_FILE};
use super::reader::SNAPSHOT_FILE_LIMIT;
use super::signed::{SNAPSHOT_FILE, SignaturePaths, Statement, digest_of_bytes, read_text};
use super::{Digest, Error, Location, Result, Snapshot, SnapshotId, create_new, files, replace_file};

/// A secret key without a password.
pub struct SigningKey(SecretKey);

impl SigningKey {
    /// Reads a secret key as `tvmm snapshot keygen` and `minisign -G -W` write it.
    ///
    /// # Errors
    /// [`Error::Key`] for a file that is no such key, or a key with a password; [`Error::Io`].
    pub fn read(path: &Path) -> Result<SigningKey> {
        let text = read_text(path)?;
        // Not parsed by the crate's own reader of key files: it refuses those of `minisign -G -W`, which leaves the
        // key's checksum zero (minisign 0.11). `sign` finds a damaged key, because its signature does not verify.
        let bytes = text.lines().nth(1).and_then(|line| Base64::decode_to_vec(line.trim(), None).ok());
        let key = bytes.and_then(|bytes| SecretKey::from_bytes(&bytes).ok()).filter(|key| !key.is_encrypted());
        let no_key = || Error::Key { path: path.to_path_buf(), kind: "secret key without a password" };
        key.map(SigningKey).ok_or_else(no_key)
    }

    /// The signature of a statement, as the text of its file.
    fn sign(&self, object: &str, json: &[u8], id: SnapshotId) -> Result<String> {
        let comment = format!("tvmm snapshot {id}");
        let public = PublicKey::from_secret_key(&self.0).map_err(failed(object))?;
        let untrusted = Some("signature of a tvmm snapshot");
        let signed = minisign::sign(Some(&public), &self.0, Cursor::new(json), Some(&comment), untrusted);
        signed.map(|signature| signature.into_string()).map_err(failed(object))
    }
}

/// Makes a pair of keys: the secret one without a password, for its owner only. Neither file may exist.
///
/// # Errors
/// [`Error::Signing`] if the keys cannot be made; [`Error::Io`].
pub fn make_keys(secret: &Path, public: &Path) -> Result<()> {
    let object = "a new key";
    let pair = minisign::KeyPair::generate_unencrypted_keypair().map_err(failed(object))?;
    let secret_text = pair.sk.to_box(None).map_err(failed(object))?.into_string();
    let public_text = pair.pk.to_box().map_err(failed(object))?.into_string();
    write_key(secret, &secret_text)?;
    write_key(public, &public_text).inspect_err(|_| {
        // Half a pair is of no use. If it stays, the next attempt names it.
        let _ = std::fs::remove_file(secret);
    })
}

fn write_key(path: &Path, text: &str) -> Result<()> {
    let mut file = create_new(path)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(Error::io("write", path))
}

fn failed(object: &str) -> impl FnOnce(minisign::PError) -> Error {
    let object = object.to_string();
    move |error| Error::Signing { object, problem: error.to_string() }
}

/// Signs an intact snapshot: reads all of it, and writes a statement about it, and the statement's signature if there
/// is a key. Without a key, the statement is to be signed elsewhere.
///
/// # Errors
/// [`Error::BadMemory`], [`Error::StrayPages`] for a damaged snapshot; as for [`Snapshot::page_map`];
/// [`Error::Signing`]; [`Error::Io`].
pub fn sign(snapshot: &Snapshot, key: Option<&SigningKey>) -> Result<SignaturePaths> {
    let statement = describe(snapshot)?;
    let object = snapshot.object();
    let encoded = serde_json::to_vec_pretty(&statement);
    let mut json = encoded.map_err(|source| Error::ManifestEncode { object: object.to_string(), source })?;
    json.push(b'\n');
    let signature = key.map(|key| key.sign(object, &json, snapshot.id())).transpose()?;
    let paths = SignaturePaths::of(snapshot.location());
    replace_file(&paths.statement, &json)?;
    if let Some(signature) = signature {
        replace_file(&paths.signature, signature.as_bytes())?;
    }
    Ok(paths)
}

fn describe(snapshot: &Snapshot) -> Result<Statement> {
    snapshot.verify(&mut |_, _| {})?.into_result(snapshot.object())?;
    let mut digests = BTreeMap::new();
    match snapshot.location() {
        Location::Dir(dir) => {
            for name in [MANIFEST_FILE, STATE_FILE, PAGES_FILE] {
                digests.insert(name.to_string(), digest_of_file(&dir.join(name))?);
            }
        }
        Location::Files { snapshot, .. } => {
            digests.insert(SNAPSHOT_FILE.to_string(), digest_of_file(snapshot)?);
        }
    }
    for copy in &snapshot.manifest().drives {
        if let Some((file, len)) = snapshot.open_drive_copy(&copy.drive_id)? {
            let name = copy.file_name();
            let digest = digest_of_bytes(&file, len, Path::new(&name))?;
            digests.insert(name, digest);
        }
    }
    Ok(Statement::new(snapshot.id(), digests, snapshot.memory_digest()?))
}

fn digest_of_file(path: &Path) -> Result<Digest> {
    Ok(Digest(*blake3::hash(&files::read_limited(path, SNAPSHOT_FILE_LIMIT)?).as_bytes()))
}
