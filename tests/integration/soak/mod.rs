//! Random operations with kills, full disks and failing disks, against a model: every snapshot that tvmm acknowledged
//! is there with the memory it was taken of, whatever happened since. `make soak SECONDS=600`; `SEED=N` repeats a
//! sequence.
//!
//! A step draws from a generator of its own, made of the seed and the step's number, so that the outcome of a race does
//! not change what later steps do.

mod faults;
mod pools;
mod service;
mod snapshots;
mod world;

use std::io::{IsTerminal, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use fastrand::Rng;

use world::World;

/// An operation and how often it comes.
type Operation = (&'static str, u32, fn(&mut World, &mut Rng));

const OPERATIONS: [Operation; 23] = [
    ("boot", 4, snapshots::boot),
    ("touch", 6, snapshots::touch),
    ("end a VM", 2, snapshots::end),
    ("full", 5, snapshots::full),
    ("diff", 8, snapshots::diff),
    ("restore", 14, snapshots::restore),
    ("restore and keep", 6, snapshots::restore_and_keep),
    ("kill a restore", 3, snapshots::kill_a_restore),
    ("rewind", 8, snapshots::rewind),
    ("repurpose", 8, snapshots::repurpose),
    ("merge", 3, snapshots::merge),
    ("copy", 3, snapshots::copy),
    ("delete", 3, snapshots::delete),
    ("profile", 5, snapshots::profile),
    ("plan", 3, snapshots::plan),
    ("pool add", 4, pools::add),
    ("pool remove", 2, pools::remove),
    ("pool restore", 4, pools::restore),
    ("cold add", 3, pools::cold_add),
    ("cold restore", 4, pools::cold_restore),
    ("full disk", 3, faults::full_disk),
    ("failing disk", 3, faults::failing_disk),
    ("serve", 6, service::invocations),
];

/// The length of a run.
enum Length {
    Time(Duration),
    Steps(u64),
}

impl Length {
    fn is_reached(&self, since: Instant, steps: u64) -> bool {
        match self {
            Length::Time(time) => since.elapsed() >= *time,
            Length::Steps(most) => steps >= *most,
        }
    }
}

/// Draws an operation by its weight.
fn draw(rng: &mut Rng) -> Operation {
    let mut at = rng.u32(0..OPERATIONS.iter().map(|(_, weight, _)| weight).sum());
    for operation in OPERATIONS {
        if at < operation.1 {
            return operation;
        }
        at -= operation.1;
    }
    unreachable!("the weights add up")
}

/// One line that is written over, on a terminal; else a line every ten seconds.
struct Progress {
    start: Instant,
    last: Option<Instant>,
    is_terminal: bool,
}

impl Progress {
    fn new() -> Progress {
        Progress { start: Instant::now(), last: None, is_terminal: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, world: &World, steps: u64) {
        let pause = if self.is_terminal { Duration::from_millis(200) } else { Duration::from_secs(10) };
        if self.last.is_some_and(|last| last.elapsed() < pause) {
            return;
        }
        self.last = Some(Instant::now());
        let line = format!("soak: {} s, {steps} steps, {}", self.start.elapsed().as_secs(), world.counts());
        // A terminal that is gone is no finding.
        let _ = match self.is_terminal {
            true => write!(std::io::stderr(), "\r\x1b[K{line}"),
            false => writeln!(std::io::stderr(), "{line}"),
        };
    }

    fn end(&self) {
        if self.is_terminal {
            let _ = writeln!(std::io::stderr());
        }
    }
}

/// Runs; panics with the seed, the step and the directory of the evidence at the first violation.
fn soak(seed: u64, length: &Length) {
    println!("soak: SEED={seed}");
    let mut world = World::new();
    let mut progress = Progress::new();
    let mut steps = 0;
    while !length.is_reached(progress.start, steps) {
        let mut rng = Rng::with_seed(seed ^ (steps + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (name, _, operation) = draw(&mut rng);
        world.begin(steps, name);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| operation(&mut world, &mut rng))) {
            fail(world, seed, &format!("step {steps} ({name})"), panic.as_ref());
        }
        steps += 1;
        progress.show(&world, steps);
    }
    progress.end();
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| world.check_everything())) {
        fail(world, seed, "the check at the end", panic.as_ref());
    }
    println!("soak: SEED={seed}: {steps} steps in {} s, {}", progress.start.elapsed().as_secs(), world.counts());
}

fn fail(world: World, seed: u64, when: &str, panic: &(dyn std::any::Any + Send)) -> ! {
    let what = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    let counts = world.counts();
    let kept = world.keep();
    panic!("SEED={seed}: {when}: {}\n{counts}; evidence: {}", what.unwrap_or("?"), kept.display());
}

/// The length and the seed from the environment, which `make soak` sets.
#[test]
#[ignore = "takes as long as TVMM_SOAK_SECONDS says: make soak"]
fn random_operations_for_a_while() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let seconds = number("TVMM_SOAK_SECONDS").unwrap_or(60);
    let seed = number("TVMM_SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
    soak(seed, &Length::Time(Duration::from_secs(seconds)));
}

#[test]
fn a_fixed_sequence_of_operations_loses_nothing() {
    soak(11, &Length::Steps(crate::support::rounds(60) as u64));
}
