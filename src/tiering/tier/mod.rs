//! Tiers: places that have a snapshot's pages besides its own files.
//!
//! A tier is opened for one snapshot. A byte-addressable tier can be mapped, every tier can be read; `backends` makes
//! the system calls.

pub mod align;

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::snapshot::{Chain, Content, Error, Extent, PAGE_SIZE, PageSet, PageSource, ResolvedRun, TierSource};

/// A pool that is open for one snapshot. The pool keeps the snapshot's pages as they are while this lives.
pub trait Tier: Send + Sync + fmt::Debug {
    /// The description of the tier in plans.
    fn source(&self) -> TierSource;

    /// Its name in messages.
    fn path(&self) -> &Path;

    /// The pages of the snapshot that the tier has, with their offsets: ascending.
    ///
    /// # Errors
    /// The catalogue cannot be read, or is damaged.
    fn runs(&self) -> Result<Vec<TierRun>, super::Error>;

    /// True if every page of the snapshot that the tier does not have is zero.
    fn is_complete(&self) -> bool;

    /// The file to map, if the tier is byte-addressable.
    fn mapping(&self) -> Option<Mappable<'_>>;

    /// Fills `bytes` (whole pages) from `offset` of its data on. Must never return wrong bytes: bytes that do not match
    /// their checksum are an error.
    ///
    /// # Errors
    /// The bytes cannot be read, or are damaged.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Checks whole pages that the caller has copied from `offset` on, one part after the other.
    ///
    /// # Errors
    /// They do not match their checksums.
    fn verify(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()>;
}

/// Pages of a snapshot that lie one after the other in a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TierRun {
    pub extent: Extent,
    /// Offset of the first page in the tier's data, bytes.
    pub offset: u64,
}

/// A byte-addressable tier's data, as a file to be mapped.
#[derive(Clone, Copy, Debug)]
pub struct Mappable<'a> {
    pub file: &'a File,
    /// Offset of its data in the file, bytes.
    pub base: u64,
    /// Offset, address and length of a mapping are multiples of this, bytes.
    pub align: u64,
    /// True if the file can be mapped private, so that the kernel copies written pages. If not, it is mapped shared and
    /// read-only.
    pub copy_on_write: bool,
    /// True if it is made of huge pages: one fault maps 2 MiB.
    pub huge: bool,
    /// True if read(2) works on it.
    pub readable: bool,
}

/// As [`Chain::resolve`], with each page from the first of `tiers` that has it.
///
/// # Errors
/// As for [`Chain::resolve`] and [`Tier::runs`].
pub fn resolve(chain: &Chain, tiers: &[Arc<dyn Tier>]) -> Result<Vec<ResolvedRun>, super::Error> {
    if tiers.is_empty() {
        return Ok(chain.resolve()?);
    }
    let layout = chain.layout();
    let mut rest: PageSet = layout.extents().collect();
    let mut runs: Vec<ResolvedRun> = Vec::new();
    for (index, tier) in tiers.iter().enumerate() {
        let known = runs.len();
        for TierRun { extent, offset } in tier.runs()? {
            for part in rest.runs_in(extent) {
                let offset = offset + (part.first.0 - extent.first.0) * PAGE_SIZE;
                runs.push(ResolvedRun { extent: part, content: Content::Bytes(PageSource::tier(index, offset)) });
            }
        }
        runs[known..].iter().for_each(|run| rest.remove_run(run.extent));
        if tier.is_complete() {
            let zero = rest.runs().flat_map(|run| layout.split(run));
            runs.extend(zero.map(|extent| ResolvedRun { extent, content: Content::Zero }));
            rest = PageSet::new();
        }
    }
    for run in if rest.is_empty() { Vec::new() } else { chain.resolve()? } {
        for part in rest.runs_in(run.extent) {
            let skipped = (part.first.0 - run.extent.first.0) * PAGE_SIZE;
            let content = match run.content {
                Content::Zero => Content::Zero,
                Content::Bytes(from) => Content::Bytes(PageSource { offset: from.offset + skipped, ..from }),
            };
            runs.push(ResolvedRun { extent: part, content });
        }
    }
    runs.sort_unstable_by_key(|run| run.extent.first);
    let pages: u64 = runs.iter().map(|run| run.extent.pages).sum();
    if runs.iter().any(|run| !layout.contains(run.extent)) || pages != layout.pages() {
        let object = tiers[0].path().display().to_string();
        return Err(Error::Malformed { object, problem: "it has pages that the guest does not have".into() }.into());
    }
    Ok(runs)
}
