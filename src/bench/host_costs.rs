//! The costs of the device and of userfaultfd on this host. `tvmm calibrate` measures all others through restores.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::Advice;

use crate::bench::Error;
use crate::snapshot::PAGE_SIZE;
use crate::sys::clock;
use crate::sys::mapping::Reservation;
use crate::sys::uffd::{FaultKinds, Install, Uffd};
use crate::tiering::costs::Costs;

const PAGE: usize = PAGE_SIZE as usize;
/// Bytes of memory in each measurement.
const LEN: usize = 32 << 20;
const PAGES: usize = LEN / PAGE;
/// Single pages read from the device.
const SEEKS: usize = 256;

/// Measures the costs that need no guest, with a file in `dir`, and writes them to `costs`. Returns the numbers that
/// could not be measured, with the reasons; those stay as they were.
pub fn host(costs: &mut Costs, dir: &Path, rounds: usize) -> Result<Vec<(&'static str, String)>, Error> {
    let path = dir.join(format!("tvmm-calibrate-{}", std::process::id()));
    let file = Scratch::new(&path).map_err(|source| Error::File { doing: "write", path: path.clone(), source })?;
    let bench = Bench { file: &file.0, rounds };
    let mut left = Vec::new();
    let mut note = |name: &'static str, measured: io::Result<f64>| match measured {
        Ok(ns) => costs.set_measured(name, ns.round().max(1.0) as u64),
        Err(error) => left.push((name, error.to_string())),
    };
    let sequential = bench.sequential();
    let seek = sequential.as_ref().map_or(0.0, |ns| *ns);
    note("device_seek_ns", bench.random().map(|ns| ns - seek));
    note("device_sequential_page_ns", sequential);
    note("uffd_copy_ns", bench.uffd_copy());
    Ok(left)
}

/// A file that is removed at the end.
struct Scratch(File);

impl Scratch {
    fn new(path: &Path) -> io::Result<Scratch> {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        // The open descriptor is enough.
        std::fs::remove_file(path)?;
        let mut piece = vec![0u8; 1 << 20];
        for at in (0..LEN).step_by(piece.len()) {
            // Random bytes, in case the file system compresses.
            let mut state = at as u64 + 1;
            for byte in &mut piece {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *byte = (state >> 56) as u8;
            }
            file.write_all_at(&piece, at as u64)?;
        }
        file.sync_all()?;
        Ok(Scratch(file))
    }
}

struct Bench<'a> {
    file: &'a File,
    rounds: usize,
}

impl Bench<'_> {
    /// Ns per operation, from some rounds. `run` prepares, runs `operations`, and returns their time.
    fn rounds(&self, operations: usize, mut run: impl FnMut() -> io::Result<u64>) -> io::Result<f64> {
        let all: Vec<u64> = (0..self.rounds.max(1)).map(|_| run()).collect::<io::Result<_>>()?;
        Ok(median(all.iter().map(|ns| *ns as f64).collect()) / operations as f64)
    }

    fn evict(&self) -> io::Result<()> {
        Ok(rustix::fs::fadvise(self.file, 0, None, Advice::DontNeed)?)
    }

    fn read_all(&self) -> io::Result<()> {
        let mut piece = vec![0u8; 1 << 20];
        (0..LEN).step_by(piece.len()).try_for_each(|at| self.file.read_exact_at(&mut piece, at as u64))
    }

    fn sequential(&self) -> io::Result<f64> {
        self.rounds(PAGES, || {
            self.evict()?;
            timed(|| self.read_all())
        })
    }

    fn random(&self) -> io::Result<f64> {
        rustix::fs::fadvise(self.file, 0, None, Advice::Random)?;
        let result = self.rounds(SEEKS, || {
            self.evict()?;
            let mut page = [0; PAGE];
            // A stride that is coprime to the number of pages visits no page twice.
            timed(|| (0..SEEKS).try_for_each(|i| self.file.read_exact_at(&mut page, (i * 4099 % PAGES * PAGE) as u64)))
        });
        rustix::fs::fadvise(self.file, 0, None, Advice::Normal)?;
        result
    }

    fn uffd_copy(&self) -> io::Result<f64> {
        let bytes = vec![1u8; LEN];
        self.rounds(PAGES, || {
            let memory = Reservation::new(LEN)?;
            memory.map_anon(0, LEN)?;
            let uffd = Uffd::open(FaultKinds::Missing)?;
            uffd.register(&memory, 0, LEN, FaultKinds::Missing)?;
            timed(|| uffd.install(memory.base() as usize, &bytes, Install::default()).map(drop))
        })
    }
}

/// The median of some rounds, the lower one of two; of no rounds it is infinite.
pub fn median(mut rounds: Vec<f64>) -> f64 {
    rounds.sort_unstable_by(f64::total_cmp);
    rounds.get(rounds.len().saturating_sub(1) / 2).copied().unwrap_or(f64::INFINITY)
}

fn timed(run: impl FnOnce() -> io::Result<()>) -> io::Result<u64> {
    let start = clock::monotonic_ns();
    run()?;
    Ok(clock::monotonic_ns() - start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calibration_measures_the_host_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut costs = Costs::default();
        let left = host(&mut costs, dir.path(), 1).unwrap();
        assert!(costs.is_measured("uffd_copy_ns") && costs.is_measured("device_sequential_page_ns"), "{left:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
