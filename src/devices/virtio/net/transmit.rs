//! From the driver's buffers to the tap.

use serde_json::{Map, Value, json};

use super::super::chain::Chain;
use super::super::{Broken, Io, RateLimiter};
use super::frame::{FRAME_MAX, HEADER_LEN};
use super::link::Link;
use super::tap::{BUFFERS_MAX, is_gone};

/// The queue of frames to transmit.
pub const TX: usize = 1;

/// Ethernet's header.
const ETHERNET_LEN: usize = 14;

/// The transmitting half.
pub struct Transmitter {
    pub limiter: RateLimiter,
    kicks: u64,
    frames: u64,
    bytes: u64,
    /// Frames that the tap did not take.
    fails: u64,
    /// Frames that are too short, too long, or in too many pieces.
    malformed: u64,
}

impl Transmitter {
    pub fn new(limiter: RateLimiter) -> Self {
        Transmitter { limiter, kicks: 0, frames: 0, bytes: 0, fails: 0, malformed: 0 }
    }

    pub fn count_kick(&mut self) {
        self.kicks += 1;
    }

    pub fn metrics(&self) -> Map<String, Value> {
        let metrics = json!({
            "tx_queue_event_count": self.kicks,
            "tx_packets_count": self.frames,
            "tx_bytes_count": self.bytes,
            "tx_fails": self.fails,
            "tx_malformed_frames": self.malformed,
            "tx_rate_limiter_throttled": self.limiter.throttled(),
        });
        metrics.as_object().cloned().unwrap_or_default()
    }
}

/// The reason why transmitting stopped.
enum Stop {
    /// The queue is empty.
    Idle,
    /// Other devices have their turn; the transport calls again.
    Turn,
    /// The limiter's timer will fire when it may go on.
    Limited,
}

impl Transmitter {
    /// Writes the driver's available frames to the tap.
    pub fn transmit(&mut self, link: &mut Link, io: &mut Io<'_>) -> Result<(), Broken> {
        let failed = |source| Broken::Queue { queue: TX, source };
        loop {
            io.queues[TX].disable_notification(io.memory).map_err(failed)?;
            let stop = self.transmit_some(link, io)?;
            io.signal(TX)?;
            match stop {
                Stop::Idle if io.queues[TX].enable_notification(io.memory).map_err(failed)? => {}
                _ => return Ok(()),
            }
        }
    }

    fn transmit_some(&mut self, link: &mut Link, io: &mut Io<'_>) -> Result<Stop, Broken> {
        while io.budget > 0 {
            let Some(chain) = io.pop(TX)? else { return Ok(Stop::Idle) };
            if !self.limiter.admit(chain.readable.len().saturating_sub(HEADER_LEN) as u64) {
                io.unpop(TX);
                return Ok(Stop::Limited);
            }
            self.transmit_frame(&chain, link, io);
            io.push(TX, chain.head, 0)?;
        }
        Ok(Stop::Turn)
    }

    fn transmit_frame(&mut self, chain: &Chain<'_>, link: &mut Link, io: &mut Io<'_>) {
        let len = chain.readable.len();
        let pieces = chain.readable.slices();
        if !(HEADER_LEN + ETHERNET_LEN..=FRAME_MAX).contains(&len) || pieces.len() > BUFFERS_MAX {
            self.malformed += 1;
            return;
        }
        match link.tap.write(pieces.iter()) {
            Ok(_) => {
                self.frames += 1;
                self.bytes += (len - HEADER_LEN) as u64;
            }
            Err(error) => {
                // A link that is down (EIO), a header that makes no sense (EINVAL), no memory: the frame is lost, as on
                // any network.
                self.fails += 1;
                if is_gone(&error) {
                    link.lose(io);
                }
            }
        }
    }
}
