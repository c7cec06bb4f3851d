//! From the driver's buffers to the tap.

use serde_json::{Map, Value, json};

use super::super::chain::Chain;
use super::super::{Broken, Io, RateLimiter};
use super::tap::BUFFERS_MAX;
use super::{FRAME_MAX, HEADER_LEN, Net, TX, is_gone};

/// Ethernet's header.
const ETHERNET_LEN: usize = 14;

/// The transmitting half.
pub(super) struct Transmitter {
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

/// The reason why transmitting stopped with frames left.
enum Left {
    Nothing,
    /// Other devices have their turn; the transport calls again.
    Turn,
    /// The limiter's timer will fire when it may go on.
    Limited,
}

impl Net {
    /// Writes the driver's available frames to the tap.
    pub(super) fn transmit(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        let failed = |source| Broken::Queue { queue: TX, source };
        loop {
            io.queues[TX].disable_notification(io.memory).map_err(failed)?;
            let left = self.transmit_some(io)?;
            io.signal(TX)?;
            match left {
                Left::Nothing if io.queues[TX].enable_notification(io.memory).map_err(failed)? => {}
                _ => return Ok(()),
            }
        }
    }

    fn transmit_some(&mut self, io: &mut Io<'_>) -> Result<Left, Broken> {
        while io.budget > 0 {
            let Some(chain) = io.pop(TX)? else { return Ok(Left::Nothing) };
            if !self.tx.limiter.admit(chain.readable.len().saturating_sub(HEADER_LEN) as u64) {
                io.unpop(TX);
                return Ok(Left::Limited);
            }
            self.transmit_frame(&chain, io);
            io.push(TX, chain.head, 0)?;
        }
        Ok(Left::Turn)
    }

    fn transmit_frame(&mut self, chain: &Chain<'_>, io: &mut Io<'_>) {
        let (len, pieces) = (chain.readable.len(), chain.readable.slices());
        if !(HEADER_LEN + ETHERNET_LEN..=FRAME_MAX).contains(&len) || pieces.len() > BUFFERS_MAX {
            self.tx.malformed += 1;
            return;
        }
        match self.tap.write(pieces.iter()) {
            Ok(_) => {
                self.tx.frames += 1;
                self.tx.bytes += (len - HEADER_LEN) as u64;
            }
            Err(error) => {
                // A link that is down (EIO), a header that makes no sense (EINVAL), no memory: the frame is lost, as on
                // any network.
                self.tx.fails += 1;
                if is_gone(&error) {
                    self.lose_tap(io);
                }
            }
        }
    }
}
