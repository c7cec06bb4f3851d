//! Flattens a chain into one full snapshot, and compares memory contents whatever form they are in.

use super::memory_check::Progress;
use super::writer::uses_file;
use super::zero_pages::nonzero_runs;
use super::{
    Chain, Content, Digest, Error, Gfn, LoadHuge, Location, PAGE_SIZE, ResolvedRun, Result, SealInput, Sealed,
    SnapshotKind, SnapshotWriter,
};

/// Pages read at once.
const READ_PAGES: u64 = 256;

/// Writes the memory that the chain's tip describes as a full snapshot with the tip's state. Pages that are all zero
/// are not held, so the result is what a full snapshot at that instant would have been.
///
/// Diffs whose parent was the tip accept the result in its place, see [`super::Manifest::stands_for`].
///
/// Every layer's checksums are verified first: damage must not get a fresh checksum. `progress` gets bytes done and
/// bytes to do.
///
/// # Errors
/// As for [`Chain::resolve`], [`Snapshot::verify`](super::Snapshot::verify) and [`SnapshotWriter`];
/// [`Error::BadMemory`] for a damaged layer.
pub fn merge(
    chain: &Chain,
    target: Location,
    cache: &dyn LoadHuge,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Sealed> {
    if let Location::Files { snapshot, memory } = &target {
        for path in [snapshot, memory] {
            if chain.layers().iter().any(|layer| uses_file(layer.location(), path)) {
                return Err(Error::BadTarget {
                    path: path.clone(),
                    problem: "it is a file of a snapshot to be merged",
                });
            }
        }
    }
    let runs = chain.resolve()?;
    let mut total: u64 = runs.iter().filter(|run| run.content != Content::Zero).map(|run| run.extent.bytes()).sum();
    for layer in chain.layers() {
        total += layer.page_map()?.held().len() * PAGE_SIZE;
    }
    let tip = chain.tip();
    let mut writer = SnapshotWriter::create(target, tip.layout().clone(), SnapshotKind::Full, None)?;
    writer.stand_for(std::iter::once(tip.id()).chain(tip.manifest().stands_for.iter().copied()));
    let mut progress = Progress { done: 0, total, report: progress };
    for layer in chain.layers() {
        layer.verify_with(&mut progress)?.into_result(layer.object())?;
    }
    for_each_nonzero(chain, &runs, |first, bytes| writer.write_run(first, bytes), &mut |bytes| progress.add(bytes))?;
    for drive in &tip.manifest().drives {
        if let Some((image, len)) = tip.open_drive_copy(&drive.drive_id)? {
            writer.copy_drive(&drive.drive_id, &image, len)?;
        }
    }
    let host = tip.manifest().host.clone();
    let machine = tip.manifest().machine.clone();
    writer.seal(SealInput { state: tip.copy_state()?, host, machine, cache })
}

/// A digest of the whole guest memory that a chain describes, independent of how it is stored: BLAKE3 over the ranges
/// (count, then address and length of each), then for each page that is not all zero its frame number and its bytes.
/// All numbers u64 LE.
///
/// # Errors
/// As for [`Chain::resolve`], and [`Error::Io`]. Checksums are not verified.
pub fn page_digest(chain: &Chain) -> Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    let ranges = chain.layout().ranges();
    hasher.update(&(ranges.len() as u64).to_le_bytes());
    for range in ranges {
        hasher.update(&range.gpa.to_le_bytes());
        hasher.update(&range.len.to_le_bytes());
    }
    let hash_pages = |first: Gfn, bytes: &[u8]| {
        for (page, gfn) in bytes.chunks(PAGE_SIZE as usize).zip(first.0..) {
            hasher.update(&gfn.to_le_bytes());
            hasher.update(page);
        }
        Ok(())
    };
    for_each_nonzero(chain, &chain.resolve()?, hash_pages, &mut |_| {})?;
    Ok(Digest(*hasher.finalize().as_bytes()))
}

/// Calls `visit` with runs of pages none of which is all zero, ascending, and `read` with the bytes read.
fn for_each_nonzero(
    chain: &Chain,
    runs: &[ResolvedRun],
    mut visit: impl FnMut(Gfn, &[u8]) -> Result<()>,
    read: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut buffer = vec![0; (READ_PAGES * PAGE_SIZE) as usize];
    for run in runs {
        let Some(layer) = chain.layer_of(run.content) else { continue };
        for part in run.extent.chunks(READ_PAGES) {
            let bytes = &mut buffer[..part.bytes() as usize];
            layer.memory_file().read(part.first, bytes)?;
            for nonzero in nonzero_runs(part.first, bytes) {
                let at = ((nonzero.first.0 - part.first.0) * PAGE_SIZE) as usize;
                visit(nonzero.first, &bytes[at..at + nonzero.bytes() as usize])?;
            }
            read(part.bytes());
        }
    }
    Ok(())
}
