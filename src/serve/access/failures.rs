//! Failed log-ins by the address of their client. Secrets of tokens cannot be guessed; the limit keeps clients that try
//! from filling the audit log.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};

use tokio::time::{Duration, Instant};

/// Failed log-ins of an address that are answered as such within [`WINDOW`].
const MAX_FAILURES: u32 = 20;
/// The time after which an address begins anew.
const WINDOW: Duration = Duration::from_secs(60);
/// Addresses that are counted apart; those beyond share a count.
const MAX_ADDRESSES: usize = 4096;

/// The answer to a failed log-in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The address has not failed often.
    Counted,
    /// The address fails too often from now on: it is told to wait so many seconds.
    First(u32),
    /// The address has been told before.
    Further(u32),
}

#[derive(Debug)]
struct Count {
    failures: u32,
    since: Instant,
}

/// The failed log-ins of the last time.
#[derive(Debug, Default)]
pub struct Failures(Mutex<HashMap<IpAddr, Count>>);

impl Failures {
    /// Counts a failed log-in.
    pub fn count(&self, address: IpAddr) -> Failure {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = network_of(address);
        if counts.len() >= MAX_ADDRESSES && !counts.contains_key(&key) {
            counts.retain(|_, count| count.since.elapsed() < WINDOW);
            if counts.len() >= MAX_ADDRESSES {
                key = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
            }
        }
        let count = counts.entry(key).or_insert_with(|| Count { failures: 0, since: Instant::now() });
        if count.since.elapsed() >= WINDOW {
            *count = Count { failures: 0, since: Instant::now() };
        }
        count.failures = count.failures.saturating_add(1);
        let wait_s = (WINDOW.saturating_sub(count.since.elapsed())).as_secs() as u32 + 1;
        match count.failures {
            ..=MAX_FAILURES => Failure::Counted,
            failures if failures == MAX_FAILURES + 1 => Failure::First(wait_s),
            _ => Failure::Further(wait_s),
        }
    }
}

/// An IPv6 client may have all addresses of a /64 network.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_that_fails_often_is_told_to_wait() {
        let failures = Failures::default();
        let address = "192.0.2.1".parse().unwrap();
        for _ in 0..MAX_FAILURES {
            assert_eq!(failures.count(address), Failure::Counted);
        }
        assert!(matches!(failures.count(address), Failure::First(1..=61)));
        assert!(matches!(failures.count("::ffff:192.0.2.1".parse().unwrap()), Failure::Further(1..=61)));
        assert_eq!(failures.count("192.0.2.2".parse().unwrap()), Failure::Counted);
        failures.0.lock().unwrap().get_mut(&address).unwrap().since -= WINDOW;
        assert_eq!(failures.count(address), Failure::Counted);
    }

    #[test]
    fn addresses_beyond_the_table_share_a_count() {
        let failures = Failures::default();
        for bits in 1..=MAX_ADDRESSES as u32 {
            failures.count(Ipv4Addr::from_bits(bits).into());
        }
        for bits in 0..MAX_FAILURES {
            let address = Ipv6Addr::from_bits(u128::from(bits + 1) << 64);
            assert_eq!(failures.count(address.into()), Failure::Counted);
        }
        let one_more = Ipv6Addr::from_bits(1 << 100);
        assert!(matches!(failures.count(one_more.into()), Failure::First(_)));
        assert_eq!(failures.0.lock().unwrap().len(), MAX_ADDRESSES + 1);
    }
}
