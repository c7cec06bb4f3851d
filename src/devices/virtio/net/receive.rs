//! From the tap to the driver's buffers.
//!
//! The length of a frame is known only after it was read. So buffers are gathered for the expected frame, and a reserve
//! takes the bytes that do not fit: with mergeable buffers they are copied on into further ones. A frame for which
//! there are too few buffers waits until the driver has brought more. It is lost if the driver has never had more.

use std::collections::VecDeque;
use std::io::ErrorKind;

use serde_json::{Map, Value, json};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};

use super::super::chain::Chain;
use super::super::{Broken, Io, RateLimiter};
use super::frame::{FRAME_MAX, HEADER_LEN};
use super::link::Link;
use super::tap::{BUFFERS_MAX, is_gone};

/// The queue of receive buffers, and its size.
pub const RX: usize = 0;
pub const QUEUE_SIZE: u16 = 256;

/// Bytes gathered for a frame that is not segmented.
const FRAME_SMALL: usize = HEADER_LEN + 1522;
/// The number of small frames in a row after which large ones are no longer expected.
const SMALL_IN_A_ROW: u32 = 64;

/// Room for any frame, and a byte that shows that there was a longer one.
const RESERVE: usize = FRAME_MAX + 1;

/// Offsets in the header.
const FLAGS: usize = 0;
const NUM_BUFFERS: usize = 10;

/// The receiving half.
pub struct Receiver {
    pub limiter: RateLimiter,
    /// Takes the bytes that do not fit into the gathered buffers. Allocated by the first frame.
    reserve: Vec<u8>,
    /// A frame that waits for buffers.
    waiting: Option<Vec<u8>>,
    /// The most buffers that the driver had available at a time.
    most_buffers: usize,
    /// Small frames in a row.
    small: u32,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    kicks: u64,
    tap_events: u64,
    frames: u64,
    bytes: u64,
    /// The queue was empty although there may have been frames.
    no_buffers: u64,
    /// Frames that did not fit into the driver's available buffers.
    fails: u64,
    /// Frames of which a part was copied.
    copied: u64,
    read_fails: u64,
}

impl Receiver {
    pub fn new(limiter: RateLimiter) -> Self {
        let counts = Counts::default();
        Receiver { limiter, reserve: Vec::new(), waiting: None, most_buffers: 0, small: SMALL_IN_A_ROW, counts }
    }

    pub fn count_kick(&mut self) {
        self.counts.kicks += 1;
    }

    pub fn count_tap_event(&mut self) {
        self.counts.tap_events += 1;
    }

    pub fn reset(&mut self) {
        self.waiting = None;
        self.most_buffers = 0;
        self.small = SMALL_IN_A_ROW;
    }

    fn expected(&self) -> usize {
        if self.small < SMALL_IN_A_ROW { FRAME_MAX } else { FRAME_SMALL }
    }

    fn learn(&mut self, len: usize) {
        self.small = if len > FRAME_SMALL { 0 } else { self.small.saturating_add(1) };
    }

    pub fn metrics(&self) -> Map<String, Value> {
        let counts = &self.counts;
        let metrics = json!({
            "rx_queue_event_count": counts.kicks,
            "rx_tap_event_count": counts.tap_events,
            "rx_packets_count": counts.frames,
            "rx_bytes_count": counts.bytes,
            "rx_fails": counts.fails,
            "rx_partly_copied": counts.copied,
            "no_rx_avail_buffer": counts.no_buffers,
            "tap_read_fails": counts.read_fails,
            "rx_rate_limiter_throttled": self.limiter.throttled(),
        });
        metrics.as_object().cloned().unwrap_or_default()
    }
}

/// Chains that were popped and not used yet, in order; those left over go back into the queue.
#[derive(Default)]
struct Gathered<'m> {
    chains: VecDeque<Chain<'m>>,
    bytes: usize,
    pieces: usize,
    /// A system call takes no more pieces.
    is_full: bool,
}

impl<'m> Gathered<'m> {
    /// Pops chains until there is room for `wanted` bytes, or, without mergeable buffers, one. Returns whether there is
    /// room for `wanted`.
    fn gather(&mut self, io: &mut Io<'m>, wanted: usize) -> Result<bool, Broken> {
        let mergeable = io.has_feature(VIRTIO_NET_F_MRG_RXBUF);
        self.is_full = false;
        while self.chains.is_empty() || mergeable && self.bytes < wanted {
            let Some(chain) = io.pop(RX)? else { break };
            let len = chain.writable.len();
            let pieces = chain.writable.slices().len();
            if len < HEADER_LEN {
                return Err(Broken::Chain("a receive buffer is shorter than a header"));
            }
            // One piece is left for the reserve.
            if self.pieces + pieces >= BUFFERS_MAX {
                io.unpop(RX);
                self.is_full = true;
                break;
            }
            (self.bytes, self.pieces) = (self.bytes + len, self.pieces + pieces);
            self.chains.push_back(chain);
        }
        Ok(self.bytes >= wanted)
    }

    /// Writes `data` at `offset` of all chains taken together.
    fn write_at(&self, mut offset: usize, mut data: &[u8]) {
        for chain in &self.chains {
            data = &data[chain.writable.write_at(offset, data)..];
            offset = offset.saturating_sub(chain.writable.len());
        }
    }

    /// The first `len` bytes.
    fn read(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        let mut done = 0;
        for chain in &self.chains {
            done += chain.writable.read_at(0, &mut data[done..]);
        }
        data
    }

    /// Marks the first `len` bytes, which the kernel has written.
    fn mark_written(&self, mut len: usize) {
        for chain in &self.chains {
            chain.writable.mark_written(len);
            len = len.saturating_sub(chain.writable.len());
        }
    }

    /// Gives the chains that hold the first `len` bytes to the driver, as one frame.
    fn publish(&mut self, io: &mut Io<'m>, len: usize) -> Result<(), Broken> {
        let mut used = Vec::with_capacity(1);
        let mut left = len;
        let mut first = None;
        while left > 0 {
            let Some(chain) = self.chains.pop_front() else { break };
            let room = chain.writable.len();
            used.push((chain.head, room.min(left) as u32));
            (self.bytes, self.pieces) = (self.bytes - room, self.pieces - chain.writable.slices().len());
            left = left.saturating_sub(room);
            first.get_or_insert(chain.writable);
        }
        if let Some(first) = first {
            first.write_at(NUM_BUFFERS, &(used.len() as u16).to_le_bytes());
            // The kernel reports checksums that it has verified; only a driver with this feature may be told
            // (5.1.6.4.1).
            if !io.has_feature(VIRTIO_NET_F_GUEST_CSUM) {
                first.write_at(FLAGS, &[0]);
            }
        }
        io.push_all(RX, &used)
    }

    /// Puts the remaining chains back into the queue.
    fn give_back(self, io: &mut Io<'m>) {
        self.chains.iter().for_each(|_| io.unpop(RX));
    }
}

/// The reason why receiving stopped.
enum Stop {
    /// The tap has no more frames, or was deleted.
    Idle,
    /// The queue is empty.
    NoBuffers,
    /// A frame waits for more buffers than these, which are all that are available.
    TooFewBuffers(u16),
    /// Other devices have their turn.
    Turn,
    /// The limiter's timer will fire when it may go on.
    Limited,
}

impl Receiver {
    /// Reads frames as long as there are frames and buffers. Called when there may be frames, but no new buffers: does
    /// nothing while a frame waits for buffers.
    pub fn receive_unless_waiting(&mut self, link: &mut Link, io: &mut Io<'_>) -> Result<(), Broken> {
        if self.waiting.is_some() { Ok(()) } else { self.receive(link, io) }
    }

    /// Reads frames as long as there are frames and buffers. Called when the driver may have brought buffers.
    pub fn receive(&mut self, link: &mut Link, io: &mut Io<'_>) -> Result<(), Broken> {
        let failed = |source| Broken::Queue { queue: RX, source };
        if link.is_lost() {
            return Ok(());
        }
        let available = io.queues[RX].waiting(io.memory).map_err(failed)?;
        self.most_buffers = self.most_buffers.max(usize::from(available));
        loop {
            io.queues[RX].disable_notification(io.memory).map_err(failed)?;
            let mut gathered = Gathered::default();
            let stop = self.receive_some(link, io, &mut gathered);
            gathered.give_back(io);
            let stop = stop?;
            io.signal(RX)?;
            let more = match stop {
                Stop::NoBuffers => {
                    self.counts.no_buffers += 1;
                    io.queues[RX].enable_notification(io.memory).map_err(failed)?
                }
                Stop::TooFewBuffers(seen) => io.queues[RX].ask_for_more(io.memory, seen).map_err(failed)?,
                Stop::Turn => {
                    link.look_again();
                    false
                }
                Stop::Idle | Stop::Limited => false,
            };
            if !more {
                return Ok(());
            }
        }
    }

    fn receive_some<'m>(
        &mut self,
        link: &mut Link,
        io: &mut Io<'m>,
        gathered: &mut Gathered<'m>,
    ) -> Result<Stop, Broken> {
        // Gathering takes at most the whole queue, and must not end for lack of budget.
        let is_over = |io: &Io<'_>| io.budget <= u32::from(QUEUE_SIZE);
        if is_over(io) {
            return Ok(Stop::Turn);
        }
        if let Some(frame) = self.waiting.take() {
            if gathered.gather(io, frame.len())? {
                gathered.write_at(0, &frame);
                self.publish(io, gathered, frame.len())?;
            } else if let Some(stop) = self.wait_or_lose(gathered, frame) {
                return Ok(stop);
            }
        }
        while !is_over(io) {
            if !self.limiter.may_begin() {
                return Ok(Stop::Limited);
            }
            gathered.gather(io, self.expected())?;
            if gathered.chains.is_empty() {
                return Ok(Stop::NoBuffers);
            }
            let Some(len) = self.read_frame(link, io, gathered) else { return Ok(Stop::Idle) };
            if let Some(stop) = self.deliver(io, gathered, len)? {
                return Ok(stop);
            }
        }
        Ok(Stop::Turn)
    }

    /// Reads a frame into the gathered buffers, and the reserve. `None` if there is none.
    fn read_frame(&mut self, link: &mut Link, io: &mut Io<'_>, gathered: &Gathered<'_>) -> Option<usize> {
        self.reserve.resize(RESERVE, 0);
        let buffers = gathered.chains.iter().flat_map(|chain| chain.writable.slices());
        match link.tap.read(buffers, &mut self.reserve) {
            Ok(len) => {
                gathered.mark_written(len);
                self.limiter.pay(len.saturating_sub(HEADER_LEN) as u64);
                self.learn(len);
                Some(len)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => {
                self.counts.read_fails += 1;
                if is_gone(&error) {
                    link.lose(io);
                }
                None
            }
        }
    }

    /// Gives a frame that was read to the driver, unless it has to wait.
    fn deliver<'m>(
        &mut self,
        io: &mut Io<'m>,
        gathered: &mut Gathered<'m>,
        len: usize,
    ) -> Result<Option<Stop>, Broken> {
        let room = gathered.bytes;
        if len <= room {
            self.publish(io, gathered, len)?;
            return Ok(None);
        }
        // A full reserve may mean that there was even more.
        let rest = len - room;
        if !io.has_feature(VIRTIO_NET_F_MRG_RXBUF) || rest >= RESERVE {
            self.counts.fails += 1;
            return Ok(None);
        }
        self.counts.copied += 1;
        if gathered.gather(io, len)? {
            gathered.write_at(room, &self.reserve[..rest]);
            self.publish(io, gathered, len)?;
            return Ok(None);
        }
        let mut frame = gathered.read(room);
        frame.extend_from_slice(&self.reserve[..rest]);
        Ok(self.wait_or_lose(gathered, frame))
    }

    /// All available buffers were gathered and are too few for `frame`.
    fn wait_or_lose(&mut self, gathered: &Gathered<'_>, frame: Vec<u8>) -> Option<Stop> {
        let seen = gathered.chains.len();
        if gathered.is_full || seen >= self.most_buffers {
            self.counts.fails += 1;
            return None;
        }
        self.waiting = Some(frame);
        Some(Stop::TooFewBuffers(seen as u16))
    }

    fn publish<'m>(&mut self, io: &mut Io<'m>, gathered: &mut Gathered<'m>, len: usize) -> Result<(), Broken> {
        self.counts.frames += 1;
        self.counts.bytes += len.saturating_sub(HEADER_LEN) as u64;
        gathered.publish(io, len)
    }
}
