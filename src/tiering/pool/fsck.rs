//! Checks that a pool still holds what was written to it.

use super::add::{hash_of, read_hashes, taken};
use super::catalogue::Catalogue;
use super::error::Error;
use super::format::{BLOCK_PAGES, SUM_LEN};
use super::lease::{self, EXPIRY_S};
use super::medium::Medium;
use super::space::Space;
use crate::snapshot::PAGE_SIZE;

/// The result of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    pub generation: u64,
    /// True if both superblocks are valid. Only one is valid while the other is being written, or if its writer died
    /// then.
    pub both_states: bool,
    pub snapshots: u64,
    /// Pages of data that were compared with their checksums.
    pub pages: u64,
    /// Pages that differ, ascending.
    pub bad_pages: Vec<u64>,
    /// Names of the snapshots that have such pages.
    pub bad_snapshots: Vec<String>,
    /// Descriptions of faulty entries.
    pub problems: Vec<String>,
    pub live_leases: u64,
}

impl Checked {
    pub fn is_good(&self) -> bool {
        self.bad_pages.is_empty() && self.problems.is_empty()
    }
}

/// Compares everything that has a checksum with it.
///
/// # Errors
/// As for [`Catalogue::read`]: there is no state to check.
pub fn check(medium: &dyn Medium, progress: &mut dyn FnMut(u64, u64)) -> Result<Checked, Error> {
    let states = Catalogue::read_all(medium)?;
    let whole = states.iter().filter(|state| state.is_ok()).count();
    let state = Catalogue::read(medium)?;
    let geometry = *state.geometry();
    let mut done = Checked {
        generation: state.superblock.generation,
        both_states: whole == 2,
        snapshots: state.heads.iter().filter(|head| !head.retired).count() as u64,
        live_leases: lease::live(medium, EXPIRY_S)?.len() as u64,
        ..Checked::default()
    };
    if let (Some(Err(newest)), Some(Ok(_))) = (states.first(), states.get(1)) {
        done.problems.push(format!("the newest state cannot be read, the one before counts: {newest}"));
    }
    let mut used = Space::new(0, geometry.pages());
    let mut entries = Vec::new();
    for head in &state.heads {
        match state.entry(medium, head) {
            Ok(entry) => {
                entry.runs.iter().for_each(|run| used.take(run.at, run.pages));
                entries.push((head, entry));
            }
            Err(error) => done.problems.push(error.to_string()),
        }
    }
    let taken = taken(&used, geometry.pages());
    let all: u64 = taken.iter().map(|(_, len)| len).sum();
    for (start, len) in taken {
        let pieces = (start..start + len).step_by(BLOCK_PAGES as usize);
        for (at, pages) in pieces.map(|at| (at, BLOCK_PAGES.min(start + len - at))) {
            check_pages(medium, &state, at, pages, &mut done)?;
            progress(done.pages, all);
        }
    }
    let is_bad = |at: u64, pages: u64| {
        let first = done.bad_pages.partition_point(|page| *page < at);
        done.bad_pages.get(first).is_some_and(|page| *page < at + pages)
    };
    let bad = entries.iter().filter(|(_, entry)| entry.runs.iter().any(|run| is_bad(run.at, run.pages)));
    done.bad_snapshots = bad.map(|(head, _)| head.name.clone()).collect();
    Ok(done)
}

fn check_pages(medium: &dyn Medium, state: &Catalogue, at: u64, pages: u64, done: &mut Checked) -> Result<(), Error> {
    let geometry = state.geometry();
    let reading = || Error::io("read pages of", medium.path());
    let mut bytes = vec![0; (pages * PAGE_SIZE) as usize];
    medium.read(geometry.page(at), &mut bytes).map_err(reading())?;
    let mut sums = vec![0; (pages * SUM_LEN) as usize];
    medium.read(geometry.sums.offset + at * SUM_LEN, &mut sums).map_err(reading())?;
    let hashes = read_hashes(medium, geometry, at, pages)?;
    let pages_of = bytes.chunks_exact(PAGE_SIZE as usize);
    for (index, (page, (sum, hash))) in (at..).zip(pages_of.zip(sums.chunks_exact(SUM_LEN as usize).zip(hashes))) {
        if crc32c::crc32c(page).to_le_bytes() != *sum || hash_of(page) != hash {
            done.bad_pages.push(index);
        }
    }
    done.pages += pages;
    Ok(())
}
