//! The balloon against drivers that follow the specification, and drivers that do not.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::BusDevice;
use crate::devices::virtio::MmioDevice;
use crate::devices::virtio::testing::{BUFFERS, RAM, memory};
use crate::sys::guest_memory::Memory;

const SIZE: u16 = 16;
/// Descriptors, available ring, used ring of the first queue; the next ones follow.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const STEP: u64 = 0x1000;
const CONFIG: u64 = 0x100;

/// Records the pages that it is to release; RAM is the first 4 MiB.
#[derive(Clone, Default)]
struct Recorded(Arc<Mutex<Vec<Extent>>>);

impl ReleasePages for Recorded {
    fn release(&mut self, pages: Extent) -> Outcome {
        self.0.lock().unwrap().push(pages);
        let ram = Extent { first: Gfn(0), pages: RAM as u64 / PAGE_SIZE };
        let released = ram.intersection(&pages).map_or(0, |part| part.pages);
        Outcome { released, outside: pages.pages - released, refused: 0 }
    }
}

impl Recorded {
    fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *self.0.lock().unwrap()).into_iter().map(|run| (run.first.0, run.pages)).collect()
    }
}

const ALL: BalloonParams = BalloonParams {
    amount_mib: 3,
    deflate_on_oom: true,
    stats_polling_interval_s: 1,
    free_page_hinting: true,
    free_page_reporting: true,
};

/// A driver of all queues; chains have one buffer.
struct Driver {
    device: MmioDevice,
    memory: Memory,
    released: Recorded,
    available: [u16; 5],
    used: [u16; 5],
}

impl Driver {
    /// Accepts the features of `wanted` that the balloon offers.
    fn start(params: BalloonParams, wanted: u32) -> Self {
        let released = Recorded::default();
        let device = Balloon::new(params, Box::new(released.clone())).unwrap();
        let memory = memory();
        let device = MmioDevice::new(Box::new(device), memory.clone()).unwrap();
        device.go_on();
        let driver = Driver { device, memory, released, available: [0; 5], used: [0; 5] };
        // Without EVENT_IDX, so that every kick counts.
        let wanted = wanted & driver.read(0x10) & !(1 << 29);
        for (register, value) in [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 0), (0x20, wanted), (0x24, 1), (0x20, 1)] {
            driver.write(register, value);
        }
        driver.write(0x70, 11);
        for queue in 0..5u32 {
            let at = (DESCRIPTORS + u64::from(queue) * STEP) as u32;
            let available = at + AVAILABLE as u32;
            let used = at + USED as u32;
            for (register, value) in
                [(0x30, queue), (0x38, SIZE.into()), (0x80, at), (0x90, available), (0xa0, used), (0x44, 1)]
            {
                driver.write(register, value);
            }
        }
        driver.write(0x70, 15);
        assert_eq!(driver.read(0x70), 15);
        driver
    }

    fn write(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    fn read(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn send(&mut self, queue: usize, at: u64, len: u32, write: bool) {
        let base = DESCRIPTORS + queue as u64 * STEP;
        let index = self.available[queue] % SIZE;
        let descriptor = base + 16 * u64::from(index);
        self.memory.write_obj(at, GuestAddress(descriptor)).unwrap();
        self.memory.write_obj(len, GuestAddress(descriptor + 8)).unwrap();
        self.memory.write_obj(u16::from(write) << 1, GuestAddress(descriptor + 12)).unwrap();
        self.memory.write_obj(index, GuestAddress(base + AVAILABLE + 4 + 2 * u64::from(index))).unwrap();
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.memory.write_obj(self.available[queue], GuestAddress(base + AVAILABLE + 2)).unwrap();
        self.device.queue_kicked(queue);
    }

    fn send_numbers(&mut self, queue: usize, numbers: &[u32]) {
        for (index, number) in numbers.iter().enumerate() {
            self.memory.write_obj(*number, GuestAddress(BUFFERS + 4 * index as u64)).unwrap();
        }
        self.send(queue, BUFFERS, 4 * numbers.len() as u32, false);
    }

    /// True if a chain has come back since the last call.
    fn came_back(&mut self, queue: usize) -> bool {
        let index: u16 = self.memory.read_obj(GuestAddress(DESCRIPTORS + queue as u64 * STEP + USED + 2)).unwrap();
        let came = index != self.used[queue];
        self.used[queue] = index;
        came
    }

    fn with<R>(&self, ask: impl FnOnce(&mut Balloon) -> R) -> R {
        self.device.with_device(|balloon: &mut Balloon| (ask(balloon), false)).unwrap()
    }

    fn is_broken(&self) -> bool {
        self.read(0x70) & 64 != 0
    }
}

#[test]
fn inflated_pages_are_released_in_runs_and_deflated_ones_are_not() {
    let mut driver = Driver::start(ALL, u32::MAX);
    assert_eq!([0, 4, 8].map(|field| driver.read(CONFIG + field)), [3 * 256, 0, 0]);
    driver.send_numbers(INFLATE, &[9, 7, 8, 300, 8, u32::MAX, u32::MAX - 1]);
    assert_eq!(driver.released.take(), [(7, 3), (300, 1), (u64::from(u32::MAX) - 1, 2)]);
    assert!(driver.came_back(INFLATE));
    driver.send_numbers(DEFLATE, &[7, 8]);
    assert!(driver.came_back(DEFLATE) && driver.released.take().is_empty());
    driver.device.write(CONFIG + 4, &5u32.to_le_bytes());
    assert_eq!(driver.with(|balloon| balloon.statistics())["actual_pages"], 5);
    let metrics = driver.device.metrics();
    assert_eq!([&metrics["inflate_count"], &metrics["deflate_count"]], [7, 2]);
    assert_eq!([&metrics["released_pages"], &metrics["pages_outside_ram"]], [4, 2]);
}

#[test]
fn list_that_is_too_long_or_no_list_breaks_the_device() {
    for len in [6, 4 * NUMBERS_MAX as u32 + 4] {
        let mut driver = Driver::start(ALL, u32::MAX);
        driver.send(INFLATE, BUFFERS, len, false);
        assert!(driver.is_broken() && driver.released.take().is_empty(), "{len}");
    }
}

#[test]
fn reported_ranges_are_released_as_far_as_they_are_whole_pages() {
    let mut driver = Driver::start(ALL, u32::MAX);
    for (at, len) in [(0x10_0000, 0x20_0000), (0x1800, 0x2000), (0x1800, 0x100), (u64::MAX - 10, 100)] {
        driver.send(4, at, len, true);
        assert!(driver.came_back(4));
    }
    assert_eq!(driver.released.take(), [(0x100, 0x200), (2, 1)]);
    assert_eq!(driver.device.metrics()["free_page_report_count"], 0x201);
}

#[test]
fn queues_follow_the_features_that_the_driver_accepted() {
    let mut driver = Driver::start(ALL, 1 << VIRTIO_BALLOON_F_REPORTING);
    driver.send(2, 0x10_0000, 0x1000, true);
    assert_eq!(driver.released.take(), [(0x100, 1)], "the third queue is the one for reports");
    driver.send(3, 0x10_0000, 0x1000, true);
    assert!(driver.released.take().is_empty() && !driver.came_back(3), "and the fourth is none");
}

#[test]
fn hints_count_in_the_round_that_the_host_began_and_no_other() {
    let mut driver = Driver::start(ALL, u32::MAX);
    let command = |driver: &mut Driver, command: u32| {
        driver.memory.write_obj(command, GuestAddress(BUFFERS)).unwrap();
        driver.send(3, BUFFERS, 4, false);
    };
    let hint = |driver: &mut Driver| {
        driver.send(3, 0x20_0000, 0x4000, true);
        driver.released.take().len()
    };
    assert_eq!(hint(&mut driver), 0, "no round has begun");
    assert!(driver.with(|balloon| balloon.start_hinting(true)));
    let round = driver.read(CONFIG + 8);
    assert_eq!(round, 2);
    assert_eq!(hint(&mut driver), 0, "the driver has not seen it");
    command(&mut driver, round);
    assert_eq!(hint(&mut driver), 1);
    command(&mut driver, 0);
    assert_eq!(driver.read(CONFIG + 8), 1, "the pages may be used again");
    assert_eq!(driver.read(0x60) & 2, 2, "and the driver is told");
    assert_eq!(hint(&mut driver), 0, "the round is over");
    assert!(driver.with(|balloon| balloon.start_hinting(false)));
    assert_eq!(driver.read(CONFIG + 8), 3);
    command(&mut driver, 2);
    assert_eq!(hint(&mut driver), 0, "that was the round before");
    command(&mut driver, 3);
    command(&mut driver, 0);
    assert_eq!(driver.with(|balloon| balloon.hinting_status()), json!({ "host_cmd": 3, "guest_cmd": 0 }));
    driver.with(|balloon| balloon.stop_hinting());
    assert_eq!(driver.read(CONFIG + 8), 1);
    driver.send(3, BUFFERS, 3, false);
    assert!(driver.is_broken(), "a command of three bytes");
}

#[test]
fn statistics_are_asked_for_again_by_giving_the_buffer_back() {
    let mut driver = Driver::start(ALL, u32::MAX);
    let put = |driver: &Driver, value: u64| {
        let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let bytes = [entry(4, value), entry(0xffff, 7), entry(15, 1), vec![1, 2, 3]].concat();
        driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        bytes.len() as u32
    };
    let len = put(&driver, 4096);
    driver.send(2, BUFFERS, len, false);
    assert!(!driver.came_back(2), "the buffer is kept");
    driver.device.source_ready(TOKEN_TIMER);
    driver.device.look_at_all();
    assert!(!driver.came_back(2), "until the timer expires");
    let statistics = driver.with(|balloon| balloon.statistics());
    let expected = json!({ "target_pages": 768, "actual_pages": 0, "target_mib": 3, "actual_mib": 0,
        "free_memory": 4096, "direct_reclaim": 1 });
    assert_eq!(statistics, expected);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !driver.came_back(2) {
        assert!(std::time::Instant::now() < deadline, "the timer does not expire");
        std::thread::sleep(std::time::Duration::from_millis(20));
        driver.device.source_ready(TOKEN_TIMER);
    }
    let len = put(&driver, 8192);
    driver.send(2, BUFFERS, len, false);
    driver.send(2, BUFFERS, len, false);
    assert!(driver.came_back(2), "of two buffers one comes back");
    assert_eq!(driver.with(|balloon| balloon.statistics())["free_memory"], 8192);
}

#[test]
fn saved_balloon_goes_on_with_its_buffer_its_round_and_its_numbers() {
    let mut driver = Driver::start(ALL, u32::MAX);
    driver.send(2, BUFFERS, 10, false);
    assert!(driver.with(|balloon| balloon.start_hinting(true)));
    driver.device.write(CONFIG + 4, &77u32.to_le_bytes());
    driver.device.quiesce();
    let (transport, saved) = driver.device.save().unwrap();
    let state: BalloonState = postcard::from_bytes(&saved).unwrap();
    let released = driver.released.clone();
    let balloon = Balloon::restore(state, Box::new(released)).unwrap();
    assert_eq!(balloon.params(), &ALL);
    let device = MmioDevice::new(Box::new(balloon), driver.memory.clone()).unwrap();
    device.restore(&transport).unwrap();
    assert_eq!(device.save().unwrap().1, saved);
    device.go_on();
    let mut driver = Driver { device, ..driver };
    assert_eq!([4, 8].map(|field| driver.read(CONFIG + field)), [77, 2]);
    driver.send(2, BUFFERS, 10, false);
    assert!(driver.came_back(2), "the buffer from before the snapshot is known");
    driver.write(0x70, 0);
    assert!(!driver.with(|balloon| balloon.start_hinting(true)), "nobody would answer");
    assert_eq!([4, 8].map(|field| driver.read(CONFIG + field)), [0, 0]);
}

#[derive(Clone, Debug)]
enum Act {
    Send(usize, u64, u32, bool),
    Numbers(usize, Vec<u32>),
    Memory(u64, u64),
    Config(u64, Vec<u8>),
    StartHinting,
    LookAtAll,
    Renew,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let address = prop_oneof![0u64..RAM as u64 + 0x10000, any::<u64>(), Just(BUFFERS)];
    let len = prop_oneof![0u32..64, 0u32..0x1_0000, any::<u32>()];
    let number = prop_oneof![0u32..2000, any::<u32>()];
    let act = prop_oneof![
        4 => (0usize..5, address, len, any::<bool>()).prop_map(|(q, at, len, write)| Act::Send(q, at, len, write)),
        3 => (0usize..4, proptest::collection::vec(number, 0..300)).prop_map(|(q, numbers)| Act::Numbers(q, numbers)),
        3 => (0u64..0xa00, prop_oneof![any::<u64>(), 0u64..0x40_0000])
            .prop_map(|(at, value)| Act::Memory(DESCRIPTORS + at * 8, value)),
        1 => (0u64..32, proptest::collection::vec(any::<u8>(), 0..9)).prop_map(|(at, data)| Act::Config(at, data)),
        1 => Just(Act::StartHinting),
        1 => Just(Act::LookAtAll),
        1 => Just(Act::Renew),
    ];
    proptest::collection::vec(act, 1..100)
}

proptest! {
    #[test]
    fn no_driver_makes_the_balloon_panic_or_hang(acts in acts(), wanted in any::<u32>()) {
        let mut driver = Driver::start(ALL, wanted & 0x3f);
        for act in acts {
            match act {
                Act::Send(queue, at, len, write) => driver.send(queue, at, len, write),
                Act::Numbers(queue, numbers) => driver.send_numbers(queue, &numbers),
                Act::Memory(at, value) => driver.memory.write_obj(value, GuestAddress(at)).unwrap(),
                Act::Config(at, data) => driver.device.write(CONFIG + at, &data),
                Act::StartHinting => {
                    driver.with(|balloon| balloon.start_hinting(true));
                }
                Act::LookAtAll => driver.device.look_at_all(),
                Act::Renew => driver = Driver::start(ALL, wanted & 0x3f),
            }
        }
    }
}
