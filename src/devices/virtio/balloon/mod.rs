//! The memory balloon (VIRTIO 1.2, 5.5): the guest gives pages back to the host, and takes them again.
//!
//! ```text
//!  inflate ─► page numbers ─► runs ─┐
//!  hint, report ─► ranges ──────────┴─► ReleasePages ─► they leave the host's memory, and the snapshot
//!  deflate ─► nothing to do: the next touch of a page brings a zero page
//!  statistics ─► the driver's buffer is kept, and given back when the timer expires
//! ```
//!
//! Optional queues follow each other without gaps in the order statistics, hints, reports, as Linux numbers them: by
//! the features that the driver accepted.

mod hinting;
mod statistics;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Broken, Chain, Io, Source, VirtioDevice, id};
use crate::devices::Error;
use crate::snapshot::{Extent, Gfn, PAGE_SIZE};
use crate::sys::guest_memory::{Outcome, ReleasePages};

use hinting::{Hinting, HintingState};
use statistics::{Statistics, StatisticsState};

const QUEUE_SIZE: u16 = 256;
/// Inflate, deflate, and the optional ones.
const QUEUES: [u16; 5] = [QUEUE_SIZE; 5];
const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// Features (VIRTIO 1.2, 5.5.3).
const VIRTIO_BALLOON_F_STATS_VQ: u32 = 1;
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_FREE_PAGE_HINT: u32 = 3;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

const PAGES_PER_MIB: u32 = 256;
/// Page numbers in one request. Linux sends 256.
const NUMBERS_MAX: usize = 4096;
/// Runs of pages that cost as much work as an ordinary chain.
const RUNS_PER_CHAIN: u32 = 16;

/// Configuration space (VIRTIO 1.2, 5.5.4): `num_pages`, `actual`, `free_page_hint_cmd_id`, `poison_val`.
const CONFIG_LEN: usize = 16;
const CONFIG_ACTUAL: u64 = 4;

const TOKEN_TIMER: u32 = 0;

/// The parameters of a balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonParams {
    /// Memory that the guest is asked to give up, MiB.
    pub amount_mib: u32,
    pub deflate_on_oom: bool,
    /// 0: no statistics.
    pub stats_polling_interval_s: u16,
    pub free_page_hinting: bool,
    pub free_page_reporting: bool,
}

/// A balloon as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    pub params: BalloonParams,
    actual_pages: u32,
    statistics: StatisticsState,
    hinting: HintingState,
}

#[derive(Debug, Default)]
struct Counters {
    inflated: u64,
    deflated: u64,
    reported: u64,
    hinted: u64,
    hints_ignored: u64,
    released: u64,
    outside: u64,
    refused: u64,
}

/// The role of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hints,
    Reports,
}

/// The balloon.
pub struct Balloon {
    params: BalloonParams,
    /// The driver is ready, and accepted free page hinting.
    takes_hints: bool,
    /// Pages given up, as the driver reports them.
    actual_pages: u32,
    statistics: Statistics,
    hinting: Hinting,
    release: Box<dyn ReleasePages>,
    counters: Counters,
}

impl Balloon {
    /// Makes the balloon of a guest that boots.
    ///
    /// # Errors
    /// There can be no timer.
    pub fn new(params: BalloonParams, release: Box<dyn ReleasePages>) -> Result<Self, Error> {
        let statistics = Statistics::new(StatisticsState::default())?;
        let hinting = Hinting::new(HintingState::default());
        Ok(Balloon {
            params,
            takes_hints: false,
            actual_pages: 0,
            statistics,
            hinting,
            release,
            counters: Counters::default(),
        })
    }

    /// Makes the balloon of a restored guest.
    ///
    /// # Errors
    /// As for [`new`](Self::new), and for a state that no balloon has.
    pub fn restore(state: BalloonState, release: Box<dyn ReleasePages>) -> Result<Self, Error> {
        let BalloonState { params, actual_pages, statistics, hinting } = state;
        let mut balloon = Balloon::new(params, release)?;
        balloon.actual_pages = actual_pages;
        balloon.statistics = Statistics::new(statistics)?;
        balloon.hinting = Hinting::new(hinting);
        Ok(balloon)
    }

    pub fn params(&self) -> &BalloonParams {
        &self.params
    }

    /// Asks the guest for another amount. The caller then tells the guest that the configuration space has changed.
    pub fn set_amount(&mut self, amount_mib: u32) {
        self.params.amount_mib = amount_mib;
    }

    /// Asks for statistics in another interval. Neither the old nor the new interval may be 0.
    pub fn set_interval(&mut self, interval_s: u16) {
        self.params.stats_polling_interval_s = interval_s;
        self.statistics.set_interval(interval_s);
    }

    /// Begins a round of hints, in which the guest names its free pages. The caller then tells the guest that the
    /// configuration space has changed. `acknowledge_on_stop`: when the guest has named all, it may use them again at
    /// once. Returns false if there is no driver that could do it.
    pub fn start_hinting(&mut self, acknowledge_on_stop: bool) -> bool {
        if self.takes_hints {
            self.hinting.start(acknowledge_on_stop);
        }
        self.takes_hints
    }

    /// Ends a round of hints: the guest may use the pages again. The caller then tells it that the configuration space
    /// has changed.
    pub fn stop_hinting(&mut self) {
        self.hinting.stop();
    }

    /// `GET /balloon/hinting/status`.
    pub fn hinting_status(&self) -> serde_json::Value {
        let HintingState { host_cmd, guest_cmd, .. } = self.hinting.state();
        json!({ "host_cmd": host_cmd, "guest_cmd": guest_cmd })
    }

    /// `GET /balloon/statistics`: sizes, and the guest's last statistics.
    pub fn statistics(&self) -> serde_json::Value {
        let mut all = self.statistics.named();
        all.insert("target_pages".into(), self.target_pages().into());
        all.insert("actual_pages".into(), self.actual_pages.into());
        all.insert("target_mib".into(), self.params.amount_mib.into());
        all.insert("actual_mib".into(), (self.actual_pages / PAGES_PER_MIB).into());
        all.into()
    }

    fn target_pages(&self) -> u32 {
        self.params.amount_mib.saturating_mul(PAGES_PER_MIB)
    }

    /// The role of `queue`, for a driver that accepted `features`.
    fn role(queue: usize, features: u64) -> Option<Role> {
        let optional = [
            (VIRTIO_BALLOON_F_STATS_VQ, Role::Statistics),
            (VIRTIO_BALLOON_F_FREE_PAGE_HINT, Role::Hints),
            (VIRTIO_BALLOON_F_REPORTING, Role::Reports),
        ];
        let accepted = optional.into_iter().filter(|(bit, _)| features & 1 << bit != 0).map(|(_, role)| role);
        [Role::Inflate, Role::Deflate].into_iter().chain(accepted).nth(queue)
    }

    fn statistics_queue(features: u64) -> Option<usize> {
        (0..QUEUES.len()).find(|&queue| Self::role(queue, features) == Some(Role::Statistics))
    }

    /// Takes page numbers until the queue is empty.
    fn process_numbers(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        io.drain(queue, |io| {
            while let Some(chain) = io.pop(queue)? {
                let (runs, numbers) = runs_of(&chain)?;
                if queue == INFLATE {
                    io.spend(runs.len() as u32 / RUNS_PER_CHAIN);
                    self.counters.inflated += numbers;
                    runs.into_iter().for_each(|run| self.give_back(run));
                } else {
                    self.counters.deflated += numbers;
                }
                io.push(queue, chain.head, 0)?;
            }
            io.signal(queue)
        })
    }

    /// Takes ranges of free pages until the queue is empty: reported ones, or hints and the commands around them.
    fn process_ranges(&mut self, queue: usize, role: Role, io: &mut Io<'_>) -> Result<(), Broken> {
        io.drain(queue, |io| {
            while let Some(ranges) = io.pop_ranges(queue)? {
                if role == Role::Hints
                    && let Some(&(at, len)) = ranges.readable.first()
                    && self.hinting.command(at, len, io.memory)?
                {
                    io.signal_config();
                }
                let wanted = role == Role::Reports || self.hinting.is_round();
                io.spend(ranges.writable.len() as u32 / RUNS_PER_CHAIN);
                for pages in ranges.writable.iter().filter_map(|&(at, len)| whole_pages(at, len)) {
                    match (role, wanted) {
                        (Role::Reports, _) => self.counters.reported += pages.pages,
                        (_, true) => self.counters.hinted += pages.pages,
                        (_, false) => self.counters.hints_ignored += pages.pages,
                    }
                    if wanted {
                        self.give_back(pages);
                    }
                }
                io.push(queue, ranges.head, 0)?;
            }
            io.signal(queue)
        })
    }

    fn process_statistics(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        io.drain(queue, |io| {
            let mut returned = false;
            while let Some(chain) = io.pop(queue)? {
                // The driver has one buffer; any further one is given back at once.
                if let Some(older) = self.statistics.take(&chain) {
                    io.push(queue, older, 0)?;
                    returned = true;
                }
            }
            if returned { io.signal(queue) } else { Ok(()) }
        })
    }

    fn give_back(&mut self, pages: Extent) {
        let Outcome { released, outside, refused } = self.release.release(pages);
        self.counters.released += released;
        self.counters.outside += outside;
        self.counters.refused += refused;
    }
}

/// The pages that a chain of 32-bit page numbers names, as runs, and the count of numbers.
fn runs_of(chain: &Chain<'_>) -> Result<(Vec<Extent>, u64), Broken> {
    let len = chain.readable.len();
    if !len.is_multiple_of(4) || len / 4 > NUMBERS_MAX {
        return Err(Broken::Chain("it is no list of at most 4096 page numbers"));
    }
    let mut bytes = vec![0; len];
    chain.readable.read_at(0, &mut bytes);
    let mut numbers: Vec<u32> = bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    let count = numbers.len() as u64;
    numbers.sort_unstable();
    numbers.dedup();
    let runs = numbers.chunk_by(|a, b| a + 1 == *b);
    Ok((runs.map(|run| Extent { first: Gfn(run[0].into()), pages: run.len() as u64 }).collect(), count))
}

/// The whole pages inside a range.
fn whole_pages(address: u64, len: u32) -> Option<Extent> {
    let first = address.div_ceil(PAGE_SIZE);
    let end = address.checked_add(u64::from(len))? / PAGE_SIZE;
    (first < end).then(|| Extent { first: Gfn(first), pages: end - first })
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        id::BALLOON
    }

    fn name(&self) -> &str {
        "balloon"
    }

    fn queue_sizes(&self) -> &[u16] {
        let has =
            [self.params.stats_polling_interval_s > 0, self.params.free_page_hinting, self.params.free_page_reporting];
        &QUEUES[..2 + has.into_iter().filter(|has| *has).count()]
    }

    fn features(&self) -> u64 {
        let bit = |wanted: bool, bit: u32| u64::from(wanted) << bit;
        bit(self.params.deflate_on_oom, VIRTIO_BALLOON_F_DEFLATE_ON_OOM)
            | bit(self.params.stats_polling_interval_s > 0, VIRTIO_BALLOON_F_STATS_VQ)
            | bit(self.params.free_page_hinting, VIRTIO_BALLOON_F_FREE_PAGE_HINT)
            | bit(self.params.free_page_reporting, VIRTIO_BALLOON_F_REPORTING)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let fields = [self.target_pages(), self.actual_pages, self.hinting.state().host_cmd, 0];
        let mut space = [0; CONFIG_LEN];
        for (bytes, field) in space.as_chunks_mut().0.iter_mut().zip(fields) {
            *bytes = field.to_le_bytes();
        }
        let start = usize::try_from(offset).unwrap_or(CONFIG_LEN).min(CONFIG_LEN);
        let len = data.len().min(CONFIG_LEN - start);
        data[..len].copy_from_slice(&space[start..start + len]);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (CONFIG_ACTUAL, Ok(bytes)) = (offset, data.try_into()) {
            self.actual_pages = u32::from_le_bytes(bytes);
        }
    }

    fn activate(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        self.takes_hints = io.has_feature(VIRTIO_BALLOON_F_FREE_PAGE_HINT);
        if Self::statistics_queue(io.features).is_some() {
            self.statistics.set_interval(self.params.stats_polling_interval_s);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.takes_hints = false;
        self.actual_pages = 0;
        self.statistics.reset();
        self.hinting = Hinting::new(HintingState::default());
    }

    fn process_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        match Self::role(queue, io.features) {
            Some(Role::Inflate) => self.process_numbers(INFLATE, io),
            Some(Role::Deflate) => self.process_numbers(DEFLATE, io),
            Some(Role::Statistics) => self.process_statistics(queue, io),
            Some(role) => self.process_ranges(queue, role, io),
            None => Ok(()),
        }
    }

    fn sources(&self) -> Vec<Source> {
        vec![self.statistics.source(TOKEN_TIMER)]
    }

    fn process_event(&mut self, _token: u32, io: &mut Io<'_>) -> Result<(), Broken> {
        let Some(queue) = Self::statistics_queue(io.features) else { return Ok(()) };
        match self.statistics.wanted() {
            Some(buffer) => {
                io.push(queue, buffer, 0)?;
                io.signal(queue)
            }
            None => Ok(()),
        }
    }

    fn save(&self) -> Result<Vec<u8>, postcard::Error> {
        let statistics = self.statistics.state();
        let hinting = self.hinting.state();
        postcard::to_stdvec(&BalloonState { params: self.params, actual_pages: self.actual_pages, statistics, hinting })
    }

    fn metrics(&self) -> serde_json::Value {
        let Counters { inflated, deflated, reported, hinted, hints_ignored, released, outside, refused } =
            self.counters;
        json!({
            "inflate_count": inflated,
            "deflate_count": deflated,
            "stats_updates_count": self.statistics.updates(),
            "free_page_report_count": reported,
            "free_page_hint_count": hinted,
            "free_page_hint_ignored": hints_ignored,
            "released_pages": released,
            "pages_outside_ram": outside,
            "pages_kept": refused,
        })
    }
}
