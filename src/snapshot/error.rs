//! The errors of a snapshot, one enum for the room.
//!
//! `Display` never contains the source: the code that prints an error walks the chain once.

use std::io;
use std::path::{Path, PathBuf};

use super::ids::{BadDigestText, SnapshotId};
use super::types::Extent;

/// The result of everything in this room.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, and the object it happened to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call on a file failed.
    #[error("Cannot {action} {path}", path = path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// A snapshot is immutable: nothing is ever written over one.
    #[error("{path} already exists; a snapshot directory is never overwritten", path = path.display())]
    TargetExists { path: PathBuf },
    /// The last process that used it has ended.
    #[error("Fork point {path} is being removed: the VMs forked from it have ended", path = path.display())]
    ForkPointGone { path: PathBuf },
    /// The target cannot name a snapshot.
    #[error("{path} cannot be the target of a snapshot: {problem}", path = path.display())]
    BadTarget { path: PathBuf, problem: &'static str },
    /// A directory without a manifest: its writer did not finish, or it is something else.
    #[error(
        "{path} is not sealed: it has no manifest.json, so its writer never finished or it is not a snapshot",
        path = path.display()
    )]
    NotSealed { path: PathBuf },
    /// A name that should be a regular file is something else.
    #[error("{path} is not a regular file", path = path.display())]
    NotAFile { path: PathBuf },
    /// A file is larger than anything a writer of this format produces.
    #[error("{object} has {len} bytes, more than the limit of {limit}")]
    TooLarge { object: String, len: u64, limit: u64 },
    /// A file ends before its format says.
    #[error("{object} is truncated: it has {have} bytes, {need} are needed")]
    Truncated { object: String, have: u64, need: u64 },
    /// The first eight bytes are not a tvmm container's.
    #[error("{object} is not a file of tvmm's (wrong magic)")]
    BadMagic { object: String },
    /// A stored checksum does not match the bytes.
    #[error("{object} is damaged: its {part} has checksum {computed:#010x}, the file says {stored:#010x}")]
    Checksum { object: String, part: String, stored: u32, computed: u32 },
    /// A BLAKE3 digest in the manifest does not match the content.
    #[error("{object} does not belong to its manifest: the digest of its {part} differs")]
    DigestMismatch { object: String, part: &'static str },
    /// Written by a later tvmm in a format that this build cannot read.
    #[error("{object} was written by tvmm {writer} in format {format}, this build reads {reads}")]
    FutureFormat { object: String, writer: String, format: String, reads: String },
    /// The bytes contradict the format.
    #[error("{object} is malformed: {problem}")]
    Malformed { object: String, problem: String },
    /// JSON that is not a manifest.
    #[error("The manifest of {object} cannot be read")]
    ManifestJson { object: String, source: serde_json::Error },
    /// A value cannot be written as JSON (in practice: a path that is not UTF-8).
    #[error("The manifest of {object} cannot be written")]
    ManifestEncode { object: String, source: serde_json::Error },
    /// The manifest was edited after it was written.
    #[error("{object} claims to be snapshot {claimed} but its content makes it {computed}")]
    IdMismatch { object: String, claimed: SnapshotId, computed: SnapshotId },
    /// A section that the consumer needs is not there.
    #[error("{object} has no section {kind} instance {instance}")]
    MissingSection { object: String, kind: u32, instance: u32 },
    /// The caller gave sections that cannot be written.
    #[error("Section {kind} instance {instance} cannot be written: {problem}")]
    BadSection { kind: u32, instance: u32, problem: &'static str },
    /// Guest memory ranges that tvmm does not accept.
    #[error("The guest memory layout is invalid: {problem}")]
    BadLayout { problem: String },
    #[error(transparent)]
    BadDigestText(#[from] BadDigestText),
    /// A set of pages that is not canonical roaring.
    #[error("A page set cannot be decoded: {problem}")]
    PageSet { problem: String },
    /// The writer was used wrongly, for example with pages out of order.
    #[error("Pages [{first:#x}, {end:#x}) cannot be written: {problem}", first = extent.first.0, end = extent.end().0)]
    BadRun { extent: Extent, problem: &'static str },
    /// Chunks of memory that differ from the written ones.
    #[error(
        "{object} has {bad} damaged chunks of memory, the first at guest-physical {gpa:#x}, {bytes} bytes long",
        gpa = first.gpa(), bytes = first.bytes()
    )]
    BadMemory { object: String, bad: u64, first: Extent },
    /// A file of an encrypted snapshot, where no key was given.
    #[error(
        "Cannot read {object}: it is encrypted. Only a restore can read it, with its key (--decrypt-key, \
         `tvmm.decrypt_key`)"
    )]
    Encrypted { object: String },
    /// A file that is not encrypted, where a key was given: it could lie in the place of an encrypted one.
    #[error("Cannot trust {object}: it is not encrypted. Restore it without a key if you trust its writer")]
    NotEncrypted { object: String },
    /// Bytes that were not encrypted with this key, for this snapshot and under this name.
    #[error("Cannot decrypt {object}: it is damaged, or was encrypted with another key or for another snapshot")]
    Unsealable { object: String },
    /// A snapshot that cannot be encrypted.
    #[error("Cannot encrypt {object}: {problem}")]
    CannotEncrypt { object: String, problem: &'static str },
    /// A file that is no key of minisign's.
    #[error(
        "Cannot use {path}: it is no {kind} of minisign's. `tvmm snapshot keygen` makes a pair of keys",
        path = path.display()
    )]
    Key { path: PathBuf, kind: &'static str },
    /// Keys or a signature cannot be made.
    #[error("Cannot sign {object}: {problem}")]
    Signing { object: String, problem: String },
    /// A snapshot without statement or signature, where one is demanded.
    #[error(
        "Cannot trust {object}: it is not signed, there is no {path}. Sign it (`tvmm snapshot sign`), or restore \
         without trusted keys",
        path = path.display()
    )]
    Unsigned { object: String, path: PathBuf },
    /// A signature that no trusted key made over this statement.
    #[error("Cannot trust {object}: the signature {path} is refused: {problem}", path = path.display())]
    BadSignature { object: String, path: PathBuf, problem: String },
    /// A part of a snapshot whose statement is signed, and that the statement is not about.
    #[error("Cannot trust {object}: its {part} is not what was signed. Restore from an intact copy, or sign it again")]
    NotTheSigned { object: String, part: String },
    /// A memory file whose bytes are not those that were captured.
    #[error(
        "Cannot trust {path}: {bytes} bytes for guest-physical {gpa:#x} are not those that were captured. Restore \
         from an intact copy (`tvmm inspect` tells what is damaged), or take the snapshot again",
        path = path.display(), gpa = extent.gpa(), bytes = extent.bytes()
    )]
    OtherMemory { path: PathBuf, extent: Extent },
    /// An image whose end is damaged, or that has other pages than its name says.
    #[error(
        "Cannot use the image {path}. Delete it; the next restore that needs it makes it again",
        path = path.display()
    )]
    Image { path: PathBuf, source: Box<Error> },
    /// A damaged page of an image; `gpa` is its guest-physical address, if that is known.
    #[error(
        "Cannot use the image {path}: it is damaged, {page} at offset {offset:#x} does not match its checksum. Delete \
         the file; the next restore that needs it makes it again",
        path = path.display(), page = named(*gpa)
    )]
    BadImagePage { path: PathBuf, offset: u64, gpa: Option<u64> },
    /// Pages of a memory file that should be holes.
    #[error(
        "{object} is damaged: its memory file has bytes in {pages} pages that the snapshot does not hold, the first at \
         guest-physical {gpa:#x}",
        gpa = first.gpa()
    )]
    StrayPages { object: String, pages: u64, first: Extent },
    /// A full snapshot with a parent, or a diff without.
    #[error("{object}: a full snapshot has no parent and a diff has exactly one")]
    BadParentage { object: String },
    /// The directory a diff points to holds another snapshot.
    #[error("{child} needs parent {expected}, but {parent} is {found}")]
    WrongParent { child: String, parent: String, expected: SnapshotId, found: SnapshotId },
    /// The parent of a diff cannot be opened.
    #[error("The parent of {child} cannot be opened")]
    Parent { child: String, source: Box<Error> },
    /// A diff of no use: its parent cannot be read any more.
    #[error(
        "Cannot write the diff {object}: its parent is not what it was when the VM was snapshotted or restored. Take \
         a full snapshot"
    )]
    NoParent { object: String, source: Box<Error> },
    /// A diff that no restore would accept.
    #[error(
        "Cannot write the diff {object}: its chain would have more than {limit} layers, and no restore accepts that. \
         Take a full snapshot"
    )]
    ChainFull { object: String, limit: usize },
    /// The writer wrote something that the reader refuses.
    #[error("Cannot seal {object}: what was written cannot be read")]
    Unreadable { object: String, source: Box<Error> },
    /// Parents that lead back to a child.
    #[error("The parents of {object} form a loop")]
    ParentLoop { object: String },
    /// More layers than a restore opens.
    #[error("{object} has more than {limit} layers. Merge it (`tvmm snapshot merge`)")]
    ChainTooLong { object: String, limit: usize },
    /// Snapshots given in an order in which they are no chain.
    #[error("The snapshots given are not a chain: {problem}")]
    NotAChain { problem: String },
    /// Parent and child describe different guest memory.
    #[error("{object} and its parent have different guest memory layouts")]
    LayoutMismatch { object: String },
    /// A plan that does not place every page exactly once.
    #[error("The restore plan of policy {policy} is invalid: {problem}")]
    BadPlan { policy: String, problem: String },
}

fn named(gpa: Option<u64>) -> String {
    gpa.map_or_else(|| "the page".to_string(), |gpa| format!("the page at guest-physical {gpa:#x}"))
}

impl Error {
    /// Adapts an `io::Error`: `map_err(Error::io("read", path))`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    pub(crate) fn malformed(object: &str, problem: impl Into<String>) -> Error {
        Error::Malformed { object: object.to_string(), problem: problem.into() }
    }
}
