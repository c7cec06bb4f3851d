//! The entropy device (VIRTIO 1.2, 5.4): random bytes of the host for the guest.

use std::io;

use serde::{Deserialize, Serialize};

use super::{Broken, Io, RateLimiter, RateLimiterState, RateLimits, Source, VirtioDevice, id};
use crate::devices::Error;
use crate::devices::virtio::device::decode;

const QUEUE_SIZES: [u16; 1] = [256];
const QUEUE: usize = 0;
const TOKEN_LIMITER: u32 = 0;
/// The most bytes that a request gets: a driver may ask for its whole memory.
const MAX_BYTES: usize = 64 << 10;

/// The device as saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyState {
    limiter: RateLimiterState,
}

/// The entropy device.
#[derive(Debug)]
pub struct Entropy {
    limiter: RateLimiter,
    bytes: u64,
    buffer: Vec<u8>,
}

impl Entropy {
    /// # Errors
    /// If there can be no timer.
    pub fn new(limits: RateLimits) -> Result<Self, Error> {
        Ok(Entropy { limiter: RateLimiter::new(limits)?, bytes: 0, buffer: Vec::new() })
    }

    /// # Errors
    /// If there can be no timer.
    pub fn restore(state: &EntropyState) -> Result<Self, Error> {
        Ok(Entropy { limiter: RateLimiter::restore(&state.limiter)?, bytes: 0, buffer: Vec::new() })
    }

    pub fn limits(&self) -> RateLimits {
        self.limiter.limits()
    }

    /// Serves requests until the queue is empty, or the limit is reached: then it returns false.
    fn serve(&mut self, io: &mut Io<'_>) -> Result<bool, Broken> {
        let mut admitted = true;
        while let Some(chain) = io.pop(QUEUE)? {
            let wanted = chain.writable.len().min(MAX_BYTES);
            if !self.limiter.admit(wanted as u64) {
                io.unpop(QUEUE);
                admitted = false;
                break;
            }
            self.buffer.resize(wanted, 0);
            fill(&mut self.buffer).map_err(|source| Broken::Host { doing: "get random bytes", source })?;
            let written = chain.writable.write_at(0, &self.buffer);
            self.bytes += written as u64;
            io.push(QUEUE, chain.head, written as u32)?;
        }
        io.signal(QUEUE)?;
        Ok(admitted)
    }
}

impl VirtioDevice for Entropy {
    fn device_type(&self) -> u32 {
        id::ENTROPY
    }

    fn name(&self) -> &str {
        "entropy"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn reset(&mut self) {}

    fn process_queue(&mut self, _queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        io.drain_while(QUEUE, |io| self.serve(io))
    }

    fn sources(&self) -> Vec<Source> {
        vec![self.limiter.source(TOKEN_LIMITER)]
    }

    fn process_event(&mut self, _token: u32, io: &mut Io<'_>) -> Result<(), Broken> {
        self.process_queue(QUEUE, io)
    }

    fn save(&self) -> Result<Vec<u8>, postcard::Error> {
        postcard::to_stdvec(&EntropyState { limiter: self.limiter.save() })
    }

    fn rewind(&mut self, state: &[u8]) -> Result<(), Error> {
        let state: EntropyState = decode("entropy device", state)?;
        self.limiter.rewind(&state.limiter);
        // The former guest's random bytes.
        self.buffer = Vec::new();
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::json!({
            "entropy_bytes": self.bytes,
            "rate_limiter_throttled_events": self.limiter.throttled(),
        })
    }
}

/// Fills `buffer` from the kernel's generator.
fn fill(buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        done += rustix::rand::getrandom(&mut buffer[done..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BUFFERS, Driver};
    use super::super::{BucketLimit, RateLimits};
    use super::*;

    #[test]
    fn driver_that_asks_for_more_than_the_limit_waits_and_gets_everything() {
        let bandwidth = Some(BucketLimit { size: 1000, one_time_burst: 0, refill_time_ms: 100 });
        let mut driver = Driver::start(Entropy::new(RateLimits { bandwidth, ops: None }).unwrap());
        let start = std::time::Instant::now();
        for _ in 0..3 {
            driver.add(&[(BUFFERS, 1000, true)]);
        }
        driver.kick();
        assert_eq!(driver.used().map(|(_, len)| len), Some(1000));
        assert_eq!(driver.used(), None, "the bucket is empty");
        assert_eq!(driver.wait_used().1 + driver.wait_used().1, 2000);
        assert!(start.elapsed() >= std::time::Duration::from_millis(190), "two more buckets take 200 ms");
        assert_eq!(driver.device.metrics()["entropy_bytes"], 3000);
    }

    #[test]
    fn limit_goes_along_with_the_saved_state() {
        let ops = Some(BucketLimit { size: 1, one_time_burst: 0, refill_time_ms: 3_600_000 });
        let mut driver = Driver::start(Entropy::new(RateLimits { bandwidth: None, ops }).unwrap());
        driver.add(&[(BUFFERS, 10, true)]);
        driver.add(&[(BUFFERS, 10, true)]);
        driver.kick();
        assert!(driver.used().is_some() && driver.used().is_none());
        driver.device.quiesce();
        let (_, saved) = driver.device.save().unwrap();
        let entropy = Entropy::restore(&postcard::from_bytes(&saved).unwrap()).unwrap();
        assert_eq!(entropy.limits(), RateLimits { bandwidth: None, ops });
        let mut driver = driver.take_over(entropy);
        assert_eq!(driver.used(), None, "the bucket is still empty");
    }
}
