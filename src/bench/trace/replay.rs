//! Sends the requests of a trace to a service at their moments, whether or not earlier ones have been answered.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::arrivals::Arrival;
use super::load::Load;
use super::memory;
use super::outcome::{LivingVms, Outcome, Replayed, Request, Way};
use super::service::Service;
use super::stage::{counts, invocation};
use crate::sys::api_client::ClientError;
use crate::sys::errors::{BoxError, refuse};

/// Requests that may be under way at once. More wait for a thread; the wait counts as part of their time.
const THREADS: usize = 64;

/// A replay of one policy.
pub(super) struct Replay<'a> {
    pub(super) service: &'a Service,
    pub(super) load: Load<'a>,
}

/// A request, and its moment of the real clock.
struct Due {
    arrival: Arrival,
    at: Instant,
}

/// The state that the sending threads share.
struct Shared {
    /// The number of answers of each VM.
    answers: Mutex<BTreeMap<String, u32>>,
    requests: Mutex<Vec<(Request, Replayed)>>,
    reasons: Mutex<BTreeMap<String, u64>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Replay<'_> {
    /// Sends all requests, and waits for all answers and for the end of the trace's time.
    pub(super) fn run(&self) -> Result<Outcome, BoxError> {
        let Load { trace, workloads, speed, .. } = self.load;
        let functions = workloads.of.len();
        // VMs that stand by may have been made in the processes of others.
        let before = counts(self.service, 0..functions)?.repurposed;
        let shared = Shared {
            answers: Mutex::default(),
            requests: Mutex::new(Vec::with_capacity(trace.arrivals.len())),
            reasons: Mutex::default(),
        };
        let (send, receive) = channel::<Due>();
        let receive = Mutex::new(receive);
        let is_over = AtomicBool::new(false);
        let begun = Instant::now();
        let samples = std::thread::scope(|scope| {
            let watch = || memory::watch(self.service, begun, speed, || is_over.load(Ordering::Relaxed));
            let watching = std::thread::Builder::new().name("memory".into()).spawn_scoped(scope, watch);
            let watching = watching.map_err(|error| format!("Cannot start a thread that samples memory: {error}"))?;
            let mut threads = Vec::new();
            for _ in 0..THREADS.min(trace.arrivals.len()) {
                let work = || self.serve(&receive, &shared);
                match std::thread::Builder::new().name("request".into()).spawn_scoped(scope, work) {
                    Ok(thread) => threads.push(thread),
                    Err(error) if threads.is_empty() => {
                        is_over.store(true, Ordering::Relaxed);
                        return refuse(format!("Cannot start a thread that sends requests: {error}"));
                    }
                    Err(_) => break,
                }
            }
            for arrival in &trace.arrivals {
                let at = begun + self.of_clock(arrival.at_us);
                sleep_until(at);
                // All receivers live until this sender is dropped.
                let _ = send.send(Due { arrival: *arrival, at });
            }
            drop(send);
            for thread in threads {
                // The panic hook has reported a panic of the thread, and its request is missing in the results.
                let _ = thread.join();
            }
            sleep_until(begun + self.of_clock(trace.length_us));
            is_over.store(true, Ordering::Relaxed);
            let samples = watching.join().unwrap_or_default();
            Ok::<_, BoxError>(samples)
        })?;
        let requests = shared.requests.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (requests, replayed): (Vec<Request>, Vec<Replayed>) = requests.into_iter().unzip();
        let end_s = trace.length_us as f64 / 1e6;
        if requests.len() != trace.arrivals.len() {
            return refuse("A thread that sends requests has panicked");
        }
        let after = counts(self.service, 0..functions)?;
        let most = |number: fn(LivingVms) -> usize| samples.iter().filter_map(|sample| sample.vms).map(number).max();
        Ok(Outcome {
            requests,
            replayed,
            mean_local_mib: memory::mean(&samples, end_s, |sample| Some(sample.local_mib)).unwrap_or_default(),
            mean_all_mib: memory::mean(&samples, end_s, |sample| sample.all_mib),
            mean_vms: memory::mean(&samples, end_s, |sample| Some(sample.vms?.running as f64)).unwrap_or_default(),
            most_vms: most(|vms| vms.running).unwrap_or_default(),
            most_suspended: most(|vms| vms.suspended).unwrap_or_default(),
            memory: samples,
            pages: Some(after.pages),
            refused_steps: after.refused_steps,
            repurposed: after.repurposed - before,
            reasons: shared.reasons.into_inner().unwrap_or_else(PoisonError::into_inner),
            ..self.load.outcome(false)
        })
    }

    fn of_clock(&self, at_us: u64) -> Duration {
        Duration::from_secs_f64(self.load.clock_us(at_us) / 1e6)
    }

    /// Sends requests until no more come.
    fn serve(&self, receive: &Mutex<Receiver<Due>>, shared: &Shared) {
        loop {
            // The lock ends with this statement: the next thread waits for the next request.
            let next = lock(receive).recv();
            let Ok(Due { arrival, at }) = next else { return };
            let late_ms = at.elapsed().as_secs_f64() * 1000.0;
            let served = match self.request(arrival.function, shared) {
                Ok(served) => Some(served),
                Err(reason) => {
                    *lock(&shared.reasons).entry(reason).or_default() += 1;
                    None
                }
            };
            let latency_ms = at.elapsed().as_secs_f64() * 1000.0;
            let (way, vm_answered) = served.unzip();
            let request = Request { latency_ms, late_ms, way };
            lock(&shared.requests).push((request, Replayed { arrival, vm_answered }));
        }
    }

    /// Makes one request. The service chooses its VM. Returns the way to it, and how many requests it had answered.
    ///
    /// # Errors
    /// The reason of a failure, without what differs between requests.
    fn request(&self, function: u32, shared: &Shared) -> Result<(Way, u32), String> {
        let Some(workload) = self.load.workloads.workload(function as usize) else { return Err("no workload".into()) };
        let mut body = invocation(function as usize, workload);
        if let Some(keep) = self.load.rules.keep() {
            body.insert("keep".to_string(), json!(keep));
        }
        let answer = self.service.send("POST", "/invocations", Some(&Value::Object(body)));
        let answer = answer.map_err(|error| reason(&error))?;
        if answer["ok"] != true {
            return Err("the guest answered `err`".to_string());
        }
        let vm = answer["vmId"].as_str().unwrap_or_default().to_string();
        let answered = {
            let mut answers = lock(&shared.answers);
            let count = answers.entry(vm).or_default();
            *count += 1;
            *count - 1
        };
        let way = match answer["origin"].as_str() {
            Some("vm" | "parked") => Way::Warm,
            Some("trimmed") => Way::Trimmed,
            Some("spilled") => Way::Spilled,
            Some("suspended") => Way::Woken,
            Some("standby") if answered == 0 => Way::Standby,
            Some("standby") => Way::Rewound,
            Some("snapshot") => Way::Restored,
            other => return Err(format!("a VM of origin `{}`", other.unwrap_or("unknown"))),
        };
        Ok((way, answered))
    }
}

/// The reason of a failure. Failures of one status count together.
fn reason(error: &ClientError) -> String {
    match error {
        ClientError::Fault { status, .. } => format!("status {status}"),
        ClientError::TimedOut { .. } => "no answer in time".to_string(),
        _ => "no connection to the service".to_string(),
    }
}

fn sleep_until(at: Instant) {
    let left = at.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        std::thread::sleep(left);
    }
}
