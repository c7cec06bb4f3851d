//! Adds a snapshot to a pool. Its pages are hashed; pages that the pool has are shared where that pays; the rest is
//! stored, checked and only then published. Until the last write the pool is as it was.

use std::collections::HashMap;
use std::path::Path;

use super::catalogue::{Entry, Head, Run, Stats};
use super::dedup::{Choice, Class, Page, Prices, Stretch, decide};
use super::error::Error;
use super::format::{BLOCK_PAGES, Blob, Geometry, HASH_LEN, SUM_LEN};
use super::lease_record::now;
use super::medium::Medium;
use super::place::place;
use super::writer::Writer;
use crate::snapshot::{Chain, Content, Extent, Gfn, MemoryLayout, PAGE_SIZE, ResolvedRun, is_zero};
use crate::tiering::costs::Costs;
use crate::tiering::profile::Profile;

/// The start of the BLAKE3 of a page.
pub type Hash = [u8; HASH_LEN as usize];

/// Pages read, hashed and written at once: a block.
const PIECE_PAGES: u64 = BLOCK_PAGES;
/// Pages flushed between two heartbeats of the writer, on a medium that other hosts share: 32 MiB.
const FLUSH_PAGES: u64 = 16 * BLOCK_PAGES;
/// Pages whose hashes are read at once: of 1 GiB.
const HASH_PAGES: u64 = 512 * BLOCK_PAGES;

/// A snapshot to be added, and the facts that sharing is weighed by.
pub struct Added<'a> {
    pub chain: &'a Chain,
    /// Its name in the pool.
    pub name: &'a str,
    pub profile: Option<&'a Profile>,
    pub costs: &'a Costs,
    /// The expected number of its restores.
    pub restores: u64,
}

pub fn hash_of(page: &[u8]) -> Hash {
    let mut hash = [0; HASH_LEN as usize];
    hash.copy_from_slice(&blake3::hash(page).as_bytes()[..HASH_LEN as usize]);
    hash
}

/// Progress: bytes done of bytes in all.
pub type Progress<'p> = &'p mut dyn FnMut(u64, u64);

impl Writer<'_> {
    /// Adds a snapshot.
    ///
    /// # Errors
    /// [`Error::Known`], [`Error::Full`], [`Error::CatalogueFull`]; damage of the snapshot or of the pool. The pool is
    /// unchanged then.
    pub fn add(&mut self, added: &Added, progress: Progress) -> Result<Head, super::super::Error> {
        let tip = added.chain.tip();
        let path = self.medium.path().to_path_buf();
        if self.state.live(tip.id()).is_some() {
            return Err(Error::Known { path, what: tip.id().to_string() }.into());
        }
        added.profile.map(|profile| profile.check_for(tip)).transpose()?;
        for layer in added.chain.layers() {
            let mut beaten = Ok(());
            let verified = layer.verify(&mut |_, _| {
                if beaten.is_ok() {
                    beaten = self.beat();
                }
            })?;
            beaten?;
            verified.into_result(layer.object())?;
        }
        let resolved = added.chain.resolve()?;
        let mut index = Index::of(self)?;
        let pages = self.read_pages(added.chain, &resolved, &mut index, progress)?;
        let layout = added.chain.layout();
        let plan = Layout::of(layout, &pages, added);
        let mut space = self.space()?;
        let free_pages = space.free();
        let stored = plan.stored();
        let need_pages = stored.iter().map(|extent| extent.pages).sum();
        let full = || Error::Full { path, what: added.name.to_string(), need_pages, free_pages };
        let class = |block: u64| block_class(added.profile, block);
        let placed = place(&stored, &class, &mut space).ok_or_else(full)?;
        let runs = plan.runs(&placed);
        let stats = stats(layout, &pages, &plan, &runs);
        if let Err(error) = self.store(added.chain, &resolved, &placed, progress) {
            // The bytes written are of no use; the error is the write's.
            let _ = self.space().and_then(|space| self.discard(&space));
            return Err(error);
        }
        let entry = Entry { snapshot: tip.id(), runs };
        let head = Head {
            snapshot: tip.id(),
            name: added.name.to_string(),
            entry: Blob::default(),
            added: now(),
            retired: false,
            stats,
        };
        let mut heads = self.state.heads.clone();
        heads.push(head);
        let at = heads.len() - 1;
        self.publish(heads, &[(at, entry)])?;
        Ok(self.state.heads[at].clone())
    }

    /// All pages that are not zero, each with its place in the pool, if it has one.
    fn read_pages(
        &mut self,
        chain: &Chain,
        resolved: &[ResolvedRun],
        index: &mut Index,
        progress: Progress,
    ) -> Result<Vec<Page>, super::super::Error> {
        let held: u64 = resolved.iter().filter(|run| run.content != Content::Zero).map(|run| run.extent.bytes()).sum();
        let mut done = 0;
        let mut pages: Vec<Page> = Vec::with_capacity((held / PAGE_SIZE) as usize);
        let mut buffer = vec![0; (PIECE_PAGES * PAGE_SIZE) as usize];
        for run in resolved {
            let Some(layer) = chain.layer_of(run.content) else { continue };
            for piece in run.extent.chunks(PIECE_PAGES) {
                let bytes = &mut buffer[..piece.bytes() as usize];
                layer.memory_file().read(piece.first, bytes)?;
                for (gfn, page) in (piece.first.0..).zip(bytes.chunks_exact(PAGE_SIZE as usize)) {
                    if is_zero(page) {
                        continue;
                    }
                    let before = pages.last().filter(|last| last.gfn + 1 == gfn).and_then(|last| last.known);
                    let known = index.find(self.medium, self.state.geometry(), page, before)?;
                    pages.push(Page { gfn, known });
                }
                done += piece.bytes();
                // The second half is the writing.
                progress(done, held * 2);
                self.beat()?;
            }
        }
        Ok(pages)
    }

    /// Writes the pages of `placed`, with their checksums, and waits until they are durable.
    fn store(
        &mut self,
        chain: &Chain,
        resolved: &[ResolvedRun],
        placed: &[Run],
        progress: Progress,
    ) -> Result<(), super::super::Error> {
        let medium = self.medium;
        let geometry = *self.state.geometry();
        let path = medium.path().to_path_buf();
        let writing = || Error::io("write pages of", &path);
        let all: u64 = placed.iter().map(|run| run.pages * PAGE_SIZE).sum();
        let mut done = 0;
        let mut buffer = vec![0; (PIECE_PAGES * PAGE_SIZE) as usize];
        for run in placed {
            for piece in run.extent().chunks(PIECE_PAGES) {
                let bytes = &mut buffer[..piece.bytes() as usize];
                read_guest(chain, resolved, piece, bytes)?;
                let at = run.at + (piece.first.0 - run.gfn);
                // Checked right before the write: an ousted writer must not write where its successor may have written.
                self.beat()?;
                medium.write(geometry.page(at), bytes).map_err(writing())?;
                let mut sums = Vec::new();
                let mut hashes = Vec::new();
                for page in bytes.chunks_exact(PAGE_SIZE as usize) {
                    sums.extend(crc32c::crc32c(page).to_le_bytes());
                    hashes.extend(hash_of(page));
                }
                medium.write(geometry.sums.offset + at * SUM_LEN, &sums).map_err(writing())?;
                medium.write(geometry.hashes.offset + at * HASH_LEN, &hashes).map_err(writing())?;
                done += piece.bytes();
                progress(all + done, all * 2);
            }
        }
        let piece_pages = if medium.facts().shared_between_hosts { FLUSH_PAGES } else { u64::MAX };
        for (at, pages) in placed.iter().flat_map(|run| pieces(run.at, run.pages, piece_pages)) {
            self.beat()?;
            medium.flush(geometry.page(at), pages * PAGE_SIZE).map_err(writing())?;
            medium.flush(geometry.sums.offset + at * SUM_LEN, pages * SUM_LEN).map_err(writing())?;
            medium.flush(geometry.hashes.offset + at * HASH_LEN, pages * HASH_LEN).map_err(writing())?;
        }
        Ok(())
    }
}

/// Reads guest memory as the snapshot has it, zeros included.
fn read_guest(
    chain: &Chain,
    resolved: &[ResolvedRun],
    extent: Extent,
    bytes: &mut [u8],
) -> Result<(), super::super::Error> {
    bytes.fill(0);
    let first = resolved.partition_point(|run| run.extent.end() <= extent.first);
    for run in resolved[first..].iter().take_while(|run| run.extent.first < extent.end()) {
        let Some(part) = run.extent.intersection(&extent) else { continue };
        let Some(layer) = chain.layer_of(run.content) else { continue };
        let start = ((part.first.0 - extent.first.0) * PAGE_SIZE) as usize;
        let bytes = &mut bytes[start..start + part.bytes() as usize];
        layer.memory_file().read(part.first, bytes)?;
    }
    Ok(())
}

/// The class that the profile gives a page.
fn page_class(profile: Option<&Profile>, gfn: u64) -> Class {
    match profile {
        Some(profile) if profile.written.contains(Gfn(gfn)) || profile.unclassified.contains(Gfn(gfn)) => {
            Class::Written
        }
        Some(profile) if profile.read.contains(Gfn(gfn)) => Class::Read,
        _ => Class::Cold,
    }
}

/// The class that the profile gives a block: written if any page is.
fn block_class(profile: Option<&Profile>, block: u64) -> Class {
    let extent = Extent { first: Gfn(block * BLOCK_PAGES), pages: BLOCK_PAGES };
    match profile {
        Some(profile) if profile.written.len_in(extent) + profile.unclassified.len_in(extent) > 0 => Class::Written,
        Some(profile) if profile.read.len_in(extent) > 0 => Class::Read,
        _ => Class::Cold,
    }
}

/// The choice for every page.
struct Layout {
    stretches: Vec<Stretch>,
    /// The number of runs if every known page were shared.
    all_shared: u64,
}

impl Layout {
    fn of(layout: &MemoryLayout, pages: &[Page], added: &Added) -> Layout {
        let class = |gfn: u64| page_class(added.profile, gfn);
        let prices = Prices::new(added.costs, added.restores);
        let free = Prices { split: 0.0, touch: 0.0, ..prices };
        let stretches = decide(layout, pages, &class, &prices);
        let is_run = |stretch: &&Stretch| stretch.choice != Choice::Leave;
        let all_shared = decide(layout, pages, &class, &free).iter().filter(is_run).count() as u64;
        Layout { stretches, all_shared }
    }

    fn stored(&self) -> Vec<Extent> {
        let stored = self.stretches.iter().filter(|stretch| stretch.choice == Choice::Store);
        stored.map(|stretch| stretch.extent).collect()
    }

    /// The entry's runs: the shared ones, and the placed ones.
    fn runs(&self, placed: &[Run]) -> Vec<Run> {
        let shared = self.stretches.iter().filter_map(|stretch| match stretch.choice {
            Choice::Share(at) => Some(Run { gfn: stretch.extent.first.0, pages: stretch.extent.pages, at }),
            _ => None,
        });
        let mut runs: Vec<Run> = shared.chain(placed.iter().copied()).collect();
        runs.sort_unstable_by_key(|run| run.gfn);
        runs.dedup_by(|next, last| {
            let joins = last.gfn + last.pages == next.gfn && last.at + last.pages == next.at;
            if joins {
                last.pages += next.pages;
            }
            joins
        });
        runs
    }
}

fn stats(layout: &MemoryLayout, pages: &[Page], plan: &Layout, runs: &[Run]) -> Stats {
    let shared: u64 =
        plan.stretches.iter().filter(|s| matches!(s.choice, Choice::Share(_))).map(|s| s.extent.pages).sum();
    let stored: u64 = plan.stored().iter().map(|extent| extent.pages).sum();
    let nonzero = pages.len() as u64;
    let known = pages.iter().filter(|page| page.known.is_some()).count() as u64;
    let blocks = |run: &Run| {
        if run.gfn % BLOCK_PAGES == run.at % BLOCK_PAGES {
            ((run.gfn + run.pages) / BLOCK_PAGES).saturating_sub(run.gfn.div_ceil(BLOCK_PAGES))
        } else {
            0
        }
    };
    Stats {
        guest_pages: layout.pages(),
        nonzero,
        shared,
        again: known - shared,
        padding: (stored + shared) - nonzero,
        runs: runs.len() as u64,
        runs_if_all_shared: plan.all_shared,
        huge_blocks: runs.iter().map(blocks).sum(),
    }
}

/// The pages of a pool by hash.
pub struct Index {
    by_hash: HashMap<Hash, u64>,
    /// Hashes by page of data; zeros for unused pages.
    hashes: Vec<Hash>,
}

impl Index {
    fn of(writer: &mut Writer) -> Result<Index, Error> {
        let geometry = *writer.state.geometry();
        let mut used = super::space::Space::new(0, geometry.pages());
        let mut by_hash = HashMap::new();
        let mut hashes = Vec::new();
        for run in writer.state.used(writer.medium)? {
            used.take(run.at, run.pages);
        }
        for (start, len) in taken(&used, geometry.pages()).into_iter().flat_map(|(at, len)| pieces(at, len, HASH_PAGES))
        {
            writer.beat()?;
            let read = read_hashes(writer.medium, &geometry, start, len)?;
            hashes.resize((start + len) as usize, Hash::default());
            for (page, hash) in (start..).zip(read) {
                by_hash.entry(hash).or_insert(page);
                hashes[page as usize] = hash;
            }
        }
        Ok(Index { by_hash, hashes })
    }

    /// The place of this page in the pool: right after `before` if the pool has it there, else anywhere. A page with
    /// the same hash and other bytes is damaged, and not shared.
    fn find(
        &self,
        medium: &dyn Medium,
        geometry: &Geometry,
        page: &[u8],
        before: Option<u64>,
    ) -> Result<Option<u64>, Error> {
        let hash = hash_of(page);
        let next = before.map(|before| before + 1).filter(|next| self.hashes.get(*next as usize) == Some(&hash));
        let Some(at) = next.or_else(|| self.by_hash.get(&hash).copied()) else { return Ok(None) };
        let mut there = vec![0; PAGE_SIZE as usize];
        medium.read(geometry.page(at), &mut there).map_err(Error::io("read pages of", medium.path()))?;
        Ok((there == page).then_some(at))
    }
}

/// `len` pages from `start` on, as stretches of at most `most`.
fn pieces(start: u64, len: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len.div_ceil(most)).map(move |piece| (start + piece * most, most.min(len - piece * most)))
}

/// The stretches of `[0, end)` that are not free.
pub fn taken(space: &super::space::Space, end: u64) -> Vec<(u64, u64)> {
    let mut out = Vec::new();
    let mut at = 0;
    for (start, len) in space.runs().chain([(end, 0)]) {
        if at < start {
            out.push((at, start - at));
        }
        at = start + len;
    }
    out
}

pub fn read_hashes(medium: &dyn Medium, geometry: &Geometry, start: u64, len: u64) -> Result<Vec<Hash>, Error> {
    let mut bytes = vec![0; (len * HASH_LEN) as usize];
    let at = geometry.hashes.offset + start * HASH_LEN;
    medium.read(at, &mut bytes).map_err(Error::io("read the hashes of", medium.path()))?;
    Ok(bytes.chunks_exact(HASH_LEN as usize).map(|hash| hash.try_into().unwrap_or_default()).collect())
}

/// The name of a snapshot in a pool: that of its directory.
pub fn name_of(path: &Path) -> String {
    let name = std::fs::canonicalize(path)
        .ok()
        .as_deref()
        .and_then(Path::file_name)
        .map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| path.display().to_string())
}
