//! A rate limiter: two token buckets, for bytes and operations, and the timer of the next attempt.
//!
//! A bucket holds at most `size` tokens and fills from empty to full in its refill time, continuously. Before it, there
//! is a burst that is spent once (the semantics of Firecracker's `rate_limiter`). A request larger than the bucket
//! passes when the bucket is full, and is paid for afterwards.
//!
//! ```text
//! work ─► admit(bytes) ─ true ─► do it
//!                      └ false ─► leave the request in its queue; the timer's descriptor is a source of the device,
//!                                 whose event means: look at the queue again
//! ```

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use serde::{Deserialize, Serialize};

use super::Source;
use crate::devices::Error;

/// The shortest wait: a wake per request costs more than it is worth. No bucket fills faster.
const WAIT_MIN: Duration = Duration::from_millis(1);
/// The longest time the timer is set to; then the bucket is checked again.
const WAIT_MAX: Duration = Duration::from_secs(3600);
/// More than any request can owe.
const DEBT_MAX: i128 = 1 << 40;

/// The parameters of a bucket. A size or refill time of 0 means that there is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketLimit {
    /// Tokens a full bucket holds.
    pub size: u64,
    /// Tokens available once, before the bucket.
    pub one_time_burst: u64,
    /// Time in which an empty bucket fills, ms.
    pub refill_time_ms: u64,
}

/// The limits of a device or a direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimits {
    /// Bytes.
    pub bandwidth: Option<BucketLimit>,
    /// Operations.
    pub ops: Option<BucketLimit>,
}

/// A bucket and its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct BucketState {
    limit: BucketLimit,
    burst_left: u64,
    /// Negative while a request larger than the bucket is not paid off.
    tokens: i64,
}

/// A limiter as saved. Time does not pass for it while the machine is stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterState {
    bandwidth: Option<BucketState>,
    ops: Option<BucketState>,
}

impl RateLimiterState {
    /// The limits it was made with.
    pub fn limits(&self) -> RateLimits {
        let limit = |bucket: &Option<BucketState>| bucket.map(|bucket| bucket.limit);
        RateLimits { bandwidth: limit(&self.bandwidth), ops: limit(&self.ops) }
    }
}

#[derive(Clone, Debug)]
struct Bucket {
    limit: BucketLimit,
    burst_left: u64,
    tokens: i128,
    /// The fraction of the next token: nanoseconds times `size`, below the refill time.
    fraction: u128,
    /// The time for which `tokens` and `fraction` hold.
    at: Instant,
}

impl Bucket {
    /// `None` if the limit is no limit.
    fn full(limit: Option<BucketLimit>, at: Instant) -> Option<Self> {
        let limit = limit.filter(|limit| limit.size > 0 && limit.refill_time_ms > 0)?;
        Some(Bucket { limit, burst_left: limit.one_time_burst, tokens: i128::from(limit.size), fraction: 0, at })
    }

    fn restored(state: Option<BucketState>, at: Instant) -> Option<Self> {
        let state = state?;
        let mut bucket = Bucket::full(Some(state.limit), at)?;
        bucket.burst_left = state.burst_left.min(state.limit.one_time_burst);
        bucket.tokens = i128::from(state.tokens).clamp(-DEBT_MAX, bucket.tokens);
        Some(bucket)
    }

    fn save(&self) -> BucketState {
        let tokens = i64::try_from(self.tokens).unwrap_or(i64::MAX);
        BucketState { limit: self.limit, burst_left: self.burst_left, tokens }
    }

    fn refill_time_ns(&self) -> u128 {
        u128::from(self.limit.refill_time_ms) * 1_000_000
    }

    /// Adds the tokens accrued since the last call.
    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_nanos();
        let size = u128::from(self.limit.size);
        let time = self.refill_time_ns();
        let accrued = elapsed.saturating_mul(size).saturating_add(self.fraction);
        let tokens = self.tokens.saturating_add(i128::try_from(accrued / time).unwrap_or(i128::MAX));
        let full = i128::from(self.limit.size);
        (self.tokens, self.fraction) = if tokens >= full { (full, 0) } else { (tokens, accrued % time) };
        self.at = self.at.max(now);
    }

    /// The time until `wanted` tokens can be taken; `None` if they can be taken now.
    fn wait(&mut self, wanted: u64, now: Instant) -> Option<Duration> {
        let wanted = wanted.saturating_sub(self.burst_left);
        self.refill(now);
        let missing = i128::from(wanted.min(self.limit.size)) - self.tokens;
        if missing <= 0 {
            return None;
        }
        let missing = missing.unsigned_abs().saturating_mul(self.refill_time_ns()).saturating_sub(self.fraction);
        let wait = missing.div_ceil(u128::from(self.limit.size));
        Some(Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX)))
    }

    fn take(&mut self, wanted: u64) {
        let burst = wanted.min(self.burst_left);
        self.burst_left -= burst;
        self.tokens = (self.tokens - i128::from(wanted - burst)).max(-DEBT_MAX);
    }
}

/// A rate limiter; without limits it admits everything.
#[derive(Debug)]
pub struct RateLimiter {
    limits: RateLimits,
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
    timer: OwnedFd,
    /// The time until which nothing is admitted; the timer then fires.
    blocked: Option<Instant>,
    throttled: u64,
}

impl RateLimiter {
    /// A limiter with full buckets.
    ///
    /// # Errors
    /// If there can be no timer.
    pub fn new(limits: RateLimits) -> Result<Self, Error> {
        let now = Instant::now();
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags);
        let failed =
            |error| Error::Event { doing: "make a timer", device: "rate limiter", source: std::io::Error::from(error) };
        Ok(RateLimiter {
            limits,
            bandwidth: Bucket::full(limits.bandwidth, now),
            ops: Bucket::full(limits.ops, now),
            timer: timer.map_err(failed)?,
            blocked: None,
            throttled: 0,
        })
    }

    /// A limiter that continues from `state`.
    ///
    /// # Errors
    /// If there can be no timer.
    pub fn restore(state: &RateLimiterState) -> Result<Self, Error> {
        let now = Instant::now();
        let limiter = RateLimiter::new(state.limits())?;
        let bandwidth = Bucket::restored(state.bandwidth, now);
        let ops = Bucket::restored(state.ops, now);
        Ok(RateLimiter { bandwidth, ops, ..limiter })
    }

    pub fn save(&self) -> RateLimiterState {
        // A limit that is none has no bucket, but it is part of the config.
        let state = |limit: Option<BucketLimit>, bucket: &Option<Bucket>| match bucket {
            Some(bucket) => Some(bucket.save()),
            None => limit.map(|limit| BucketState { limit, burst_left: 0, tokens: 0 }),
        };
        RateLimiterState {
            bandwidth: state(self.limits.bandwidth, &self.bandwidth),
            ops: state(self.limits.ops, &self.ops),
        }
    }

    pub fn limits(&self) -> RateLimits {
        self.limits
    }

    /// Replaces the buckets that `change` has by full ones; the others stay. The caller's device must then look at its
    /// queues.
    pub fn change(&mut self, change: RateLimits) {
        let now = Instant::now();
        if change.bandwidth.is_some() {
            self.limits.bandwidth = change.bandwidth;
            self.bandwidth = Bucket::full(change.bandwidth, now);
        }
        if change.ops.is_some() {
            self.limits.ops = change.ops;
            self.ops = Bucket::full(change.ops, now);
        }
        self.blocked = None;
    }

    /// The timer, for [`VirtioDevice::sources`](super::VirtioDevice::sources). It need not be read.
    pub fn source(&self, token: u32) -> Source {
        Source { fd: self.timer.as_raw_fd(), token }
    }

    /// True if an operation of `bytes` may be done now; it is then paid for. If not, the timer fires when it may be.
    pub fn admit(&mut self, bytes: u64) -> bool {
        if self.bandwidth.is_none() && self.ops.is_none() {
            return true;
        }
        self.admit_at(bytes, Instant::now())
    }

    /// True if an operation may begin whose size is known only afterwards: [`pay`](Self::pay). If not, the timer fires
    /// when it may. Bytes paid for on credit delay the next operation.
    pub fn may_begin(&mut self) -> bool {
        self.bandwidth.is_none() && self.ops.is_none() || self.may_at(0, Instant::now())
    }

    /// Pays for a finished operation of `bytes`.
    pub fn pay(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bandwidth {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.take(1);
        }
    }

    /// Requests that had to wait so far.
    pub fn throttled(&self) -> u64 {
        self.throttled
    }

    fn admit_at(&mut self, bytes: u64, now: Instant) -> bool {
        let admitted = self.may_at(bytes, now);
        if admitted {
            self.pay(bytes);
        }
        admitted
    }

    fn may_at(&mut self, bytes: u64, now: Instant) -> bool {
        if self.blocked.is_some_and(|until| now < until) {
            return false;
        }
        let bandwidth = self.bandwidth.as_mut().and_then(|bucket| bucket.wait(bytes, now));
        let wait = bandwidth.max(self.ops.as_mut().and_then(|bucket| bucket.wait(1, now)));
        if let Some(wait) = wait {
            self.block(wait.clamp(WAIT_MIN, WAIT_MAX), now);
            return false;
        }
        self.blocked = None;
        true
    }

    fn block(&mut self, wait: Duration, now: Instant) {
        self.throttled += u64::from(self.blocked.is_none());
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        let timer = Itimerspec { it_interval: zero, it_value: value };
        // The arguments are in range, so it cannot fail; if it did, the device would be stuck, hence not blocked.
        match rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer) {
            Ok(_) => self.blocked = Some(now + wait),
            Err(error) => tracing::error!(%error, "A rate limiter's timer cannot be set"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(size: u64, one_time_burst: u64, refill_time_ms: u64) -> Option<BucketLimit> {
        Some(BucketLimit { size, one_time_burst, refill_time_ms })
    }

    fn limiter(bandwidth: Option<BucketLimit>, ops: Option<BucketLimit>) -> (RateLimiter, Instant) {
        let limiter = RateLimiter::new(RateLimits { bandwidth, ops }).unwrap();
        let start = [&limiter.bandwidth, &limiter.ops].into_iter().flatten().map(|bucket| bucket.at).next();
        (limiter, start.unwrap_or_else(Instant::now))
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn admit_takes_the_burst_then_the_bucket_then_waits_for_the_refill() {
        let (mut limiter, start) = limiter(limit(1000, 500, 100), None);
        assert!(limiter.admit_at(500, start) && limiter.admit_at(1000, start));
        assert!(!limiter.admit_at(100, start));
        assert_eq!(limiter.blocked, Some(start + ms(10)), "100 of 1000 tokens take a tenth of 100 ms");
        assert!(!limiter.admit_at(1, start + ms(9)), "blocked is blocked");
        assert!(limiter.admit_at(100, start + ms(10)));
        assert!(limiter.admit_at(1000, start + ms(1000)), "never more than full");
        assert!(!limiter.admit_at(1, start + ms(1000)));
        assert_eq!(limiter.throttled(), 2);
    }

    #[test]
    fn admit_of_more_than_the_bucket_passes_when_it_is_full_and_is_paid_afterwards() {
        let (mut limiter, start) = limiter(limit(1000, 0, 100), None);
        assert!(limiter.admit_at(5000, start));
        assert!(!limiter.admit_at(1000, start));
        assert_eq!(limiter.blocked, Some(start + ms(500)), "4000 owed and 1000 wanted");
        assert!(limiter.admit_at(1000, start + ms(500)));
    }

    #[test]
    fn admit_refused_by_one_bucket_takes_nothing_from_the_other() {
        let (mut limiter, start) = limiter(limit(1000, 0, 100), limit(1, 0, 1000));
        assert!(limiter.admit_at(10, start));
        assert!(!limiter.admit_at(10, start));
        assert_eq!(limiter.bandwidth.as_ref().unwrap().tokens, 990);
        assert!(limiter.admit_at(10, start + ms(1000)));
    }

    #[test]
    fn operation_of_unknown_size_begins_when_nothing_is_owed_and_is_paid_afterwards() {
        let (mut limiter, start) = limiter(limit(1000, 0, 100), limit(2, 0, 100));
        assert!(limiter.may_at(0, start));
        assert!(limiter.may_at(0, start), "asking costs nothing");
        limiter.pay(1500);
        assert!(!limiter.may_at(0, start));
        assert_eq!(limiter.blocked, Some(start + ms(50)), "500 are owed");
        assert!(limiter.may_at(0, start + ms(50)));
    }

    #[test]
    fn refill_loses_no_fractions() {
        let (mut limiter, start) = limiter(limit(3, 0, 1000), None);
        assert!(limiter.admit_at(3, start));
        let mut admitted = 0;
        for step in 1..=10_000 {
            admitted += u64::from(limiter.admit_at(1, start + ms(step)));
        }
        assert_eq!(admitted, 30, "3 a second for 10 s");
    }

    #[test]
    fn a_limit_of_zero_limits_nothing_and_stays_in_the_config() {
        for nothing in [limit(0, 5, 100), limit(5, 5, 0), None] {
            let (mut limiter, start) = limiter(nothing, nothing);
            assert!((0..1000).all(|_| limiter.admit_at(u64::MAX, start)));
            assert_eq!(RateLimiter::restore(&limiter.save()).unwrap().limits(), limiter.limits());
        }
    }

    #[test]
    fn save_and_restore_keep_the_tokens_left() {
        let (mut limiter, start) = limiter(limit(1000, 100, 60_000), limit(10, 0, 60_000));
        assert!(limiter.admit_at(600, start));
        let bytes = postcard::to_stdvec(&limiter.save()).unwrap();
        let state: RateLimiterState = postcard::from_bytes(&bytes).unwrap();
        let mut restored = RateLimiter::restore(&state).unwrap();
        assert_eq!(restored.save(), limiter.save());
        let now = restored.ops.as_ref().unwrap().at;
        assert!(restored.admit_at(500, now) && !restored.admit_at(500, now));
    }

    #[test]
    fn restore_of_impossible_state_is_clamped() {
        let bucket = BucketState { limit: limit(10, 1, 10).unwrap(), burst_left: u64::MAX, tokens: i64::MIN };
        let state = RateLimiterState { bandwidth: Some(bucket), ops: Some(BucketState { tokens: i64::MAX, ..bucket }) };
        let restored = RateLimiter::restore(&state).unwrap();
        assert_eq!(restored.bandwidth.as_ref().unwrap().tokens, -DEBT_MAX);
        assert_eq!(restored.ops.as_ref().unwrap().tokens, 10);
        assert_eq!(restored.ops.as_ref().unwrap().burst_left, 1);
    }

    #[test]
    fn extreme_limits_do_not_overflow() {
        for (size, time) in [(u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)] {
            let (mut limiter, start) = limiter(limit(size, u64::MAX, time), limit(size, 0, time));
            for step in 0..4 {
                let _ = limiter.admit_at(u64::MAX, start + ms(step * 1_000_000));
            }
            let _ = RateLimiter::restore(&limiter.save()).unwrap();
        }
    }

    #[test]
    fn change_replaces_only_named_limits() {
        let (mut limiter, start) = limiter(limit(10, 0, 1000), limit(1, 0, 1000));
        assert!(limiter.admit_at(10, start) && !limiter.admit_at(10, start));
        limiter.change(RateLimits { bandwidth: None, ops: limit(0, 0, 0) });
        assert_eq!(limiter.limits().bandwidth, limit(10, 0, 1000));
        assert!(!limiter.admit_at(10, start), "bytes are still limited");
        limiter.change(RateLimits { bandwidth: limit(100, 0, 1000), ops: None });
        assert!(limiter.admit(100));
    }

    #[test]
    fn the_timer_fires_when_the_request_may_be_tried_again() {
        let mut limiter = RateLimiter::new(RateLimits { bandwidth: None, ops: limit(1, 0, 20) }).unwrap();
        assert!(limiter.admit(0) && !limiter.admit(0));
        let mut fds = [rustix::event::PollFd::new(&limiter.timer, rustix::event::PollFlags::IN)];
        let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&limit)), Ok(1));
        assert!(limiter.admit(0));
    }
}
