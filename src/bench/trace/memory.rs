//! The memory of a service's processes: VMs, processes that wait to become VMs, and those of finished VMs.

use std::fs;
use std::time::{Duration, Instant};

use super::outcome::Sample;
use super::service::Service;
use super::stage::living;
use crate::sys::process_memory::ProcessMemory;

/// Pause between two samples, of the real clock. A slow sample is followed by a longer one.
const PAUSE: Duration = Duration::from_millis(100);
/// The kernel walks the page tables of each process: samples take at most this part of the time.
const PART: u32 = 10;
/// Pause between two counts of the VMs: the service writes a record of each.
const COUNT: Duration = Duration::from_secs(1);

/// The processes that `parent` has started.
pub(super) fn children(parent: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| parent_of(*pid) == Some(parent)).collect()
}

/// The parent of a process (proc_pid_stat(5)); `None` if it has ended.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The memory of processes. Those that have ended meanwhile have none.
pub(super) fn of(pids: &[u32]) -> ProcessMemory {
    let mut all = ProcessMemory::default();
    for memory in pids.iter().filter_map(|pid| ProcessMemory::of(*pid).ok()) {
        all += memory;
    }
    all
}

pub(super) fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// Samples the memory of the processes that `service` has started, and more seldom the numbers of its VMs, until
/// `is_over`. Times are of the trace, which runs `speed` times as fast as the clock and began at `begun`.
pub(super) fn watch(service: &Service, begun: Instant, speed: f64, is_over: impl Fn() -> bool) -> Vec<Sample> {
    let mut samples = Vec::new();
    let mut counted: Option<Instant> = None;
    while !is_over() {
        let now = Instant::now();
        let memory = of(&children(service.pid()));
        let is_due = counted.is_none_or(|counted| now - counted >= COUNT);
        // A service that does not answer has failed the requests of the trace, too.
        let vms = if is_due { living(service).ok() } else { None };
        counted = vms.map(|_| now).or(counted);
        samples.push(Sample {
            at_s: (now - begun).as_secs_f64() * speed,
            local_mib: mib(memory.own_kib()),
            all_mib: Some(mib(memory.own_kib() + memory.shared_kib)),
            vms,
        });
        std::thread::sleep(PAUSE.max(now.elapsed() * PART));
    }
    samples
}

/// The mean of a number of samples that are not evenly spaced: each counts until the next, the last until `end_s`. A
/// sample without the number does not count.
pub(super) fn mean(samples: &[Sample], end_s: f64, number: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
    let ends = samples.iter().skip(1).map(|sample| sample.at_s).chain([end_s]);
    let mut sum = 0.0;
    let mut time = 0.0;
    for (sample, end) in samples.iter().zip(ends) {
        let Some(number) = number(sample) else { continue };
        let span = (end.min(end_s) - sample.at_s).max(0.0);
        sum += span * number;
        time += span;
    }
    (time > 0.0).then_some(sum / time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_found_and_have_memory() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let found = children(std::process::id());
        assert!(found.contains(&child.id()), "{found:?}");
        assert!(of(&[child.id()]).own_kib() > 0);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(of(&[child.id()]), ProcessMemory::default());
    }

    #[test]
    fn samples_count_for_the_time_until_the_next() {
        let sample = |at_s, local_mib| Sample { at_s, local_mib, all_mib: None, vms: None };
        let local = |sample: &Sample| Some(sample.local_mib);
        assert_eq!(mean(&[sample(0.0, 1.0), sample(1.0, 4.0), sample(9.0, 100.0)], 3.0, local), Some(3.0));
        assert_eq!(mean(&[sample(0.0, 1.0)], 3.0, |sample| sample.all_mib), None);
        assert_eq!(mean(&[], 3.0, local), None);
    }
}
