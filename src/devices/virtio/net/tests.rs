//! The device through its transport, with a socket that keeps datagrams apart in place of the tap.

use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};

use super::super::{BucketLimit, Memory, MmioDevice, region_bitmap};
use super::control::CONTROL;
use super::frame::{FRAME_MAX, HEADER_LEN};
use super::*;
use crate::devices::BusDevice;

const RAM: usize = 4 << 20;
const SIZE: u16 = 256;
const MAC: [u8; 6] = [6, 0, 0xac, 16, 0, 2];
/// Addresses of the rings of queue `q`, and of buffers.
const RINGS: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const ANNOUNCE: u64 = 1 << VIRTIO_NET_F_GUEST_ANNOUNCE | 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_STATUS;
const EVENT_IDX: u64 = 1 << 29;

fn memory() -> Memory {
    let builder = vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(RAM, region_bitmap(RAM));
    let region: MmapRegion<_> = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).build().unwrap();
    Memory::from_regions(vec![GuestRegionMmap::new(region, GuestAddress(0)).unwrap()]).unwrap()
}

fn params() -> NetParams {
    let limits = RateLimits::default();
    let id = "eth0".to_owned();
    let tap = "test".to_owned();
    NetParams { id, tap, mac: Some(MAC), mtu: Some(1400), rx_limits: limits, tx_limits: limits }
}

/// A device, its driver, and the other end of the "tap".
struct Bench {
    device: MmioDevice,
    memory: Memory,
    wire: UnixDatagram,
    /// Indices of the avail rings, and of the used rings as far as they were read.
    avail: [u16; 3],
    used: [u16; 3],
}

impl Bench {
    fn new(features: u64) -> Self {
        Bench::with(params(), false, features)
    }

    fn with(params: NetParams, restored: bool, features: u64) -> Self {
        let (wire, tap) = UnixDatagram::pair().unwrap();
        wire.set_nonblocking(true).unwrap();
        tap.set_nonblocking(true).unwrap();
        let rx = RateLimiter::new(params.rx_limits).unwrap();
        let tx = RateLimiter::new(params.tx_limits).unwrap();
        let net = Net { restored, ..Net::with_tap(params, Tap::over(tap.into()), rx, tx).unwrap() };
        let memory = memory();
        let device = MmioDevice::new(Box::new(net), memory.clone()).unwrap();
        device.go_on();
        let bench = Bench { device, memory, wire, avail: [0; 3], used: [0; 3] };
        bench.start(features);
        bench
    }

    fn register(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    fn start(&self, features: u64) {
        let features = features | 1 << 32;
        let [low, high] = [features as u32, (features >> 32) as u32];
        // Resets the device, unless it is new.
        let mut status = [0; 4];
        self.device.read(0x70, &mut status);
        if status != [0; 4] {
            self.register(0x70, 0);
        }
        [(0x70, 1), (0x70, 3), (0x24, 0), (0x20, low), (0x24, 1), (0x20, high), (0x70, 11)]
            .iter()
            .for_each(|&(register, value)| self.register(register, value));
        for queue in 0..3u32 {
            let size = QUEUE_SIZES[queue as usize];
            let [desc, avail, used] = Self::rings(queue as usize);
            [
                (0x30, queue),
                (0x38, size.into()),
                (0x80, desc as u32),
                (0x90, avail as u32),
                (0xa0, used as u32),
                (0x44, 1),
            ]
            .iter()
            .for_each(|&(register, value)| self.register(register, value));
        }
        self.register(0x70, 15);
        let mut status = [0; 4];
        self.device.read(0x70, &mut status);
        assert_eq!(u32::from_le_bytes(status), 15);
    }

    fn rings(queue: usize) -> [u64; 3] {
        let at = RINGS + 0x4000 * queue as u64;
        [at, at + 0x1000, at + 0x2000]
    }

    /// Makes a chain of one buffer available; its descriptor is the index modulo the size.
    fn add(&mut self, queue: usize, at: u64, len: u32, write: bool) {
        let size = QUEUE_SIZES[queue];
        let [desc, avail, _] = Self::rings(queue);
        let head = self.avail[queue] % size;
        let flags = if write { 2u16 } else { 0 };
        self.memory.write_obj(at, GuestAddress(desc + 16 * u64::from(head))).unwrap();
        self.memory.write_obj(len, GuestAddress(desc + 16 * u64::from(head) + 8)).unwrap();
        self.memory.write_obj(u32::from(flags), GuestAddress(desc + 16 * u64::from(head) + 12)).unwrap();
        self.memory.write_obj(head, GuestAddress(avail + 4 + 2 * u64::from(head))).unwrap();
        self.avail[queue] += 1;
        self.memory.write_obj(self.avail[queue], GuestAddress(avail + 2)).unwrap();
    }

    /// Chains that came back since the last look: heads and lengths.
    fn take_used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let used = Self::rings(queue)[2];
        let now: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
        let mut taken = Vec::new();
        while self.used[queue] != now {
            let at = used + 4 + 8 * u64::from(self.used[queue] % QUEUE_SIZES[queue]);
            taken.push(self.memory.read_obj::<[u32; 2]>(GuestAddress(at)).unwrap().into());
            self.used[queue] += 1;
        }
        taken
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// A frame arrives at the tap.
    fn arrive(&self, frame: &[u8]) {
        self.wire.send(&[&[0u8; HEADER_LEN], frame].concat()).unwrap();
    }

    /// The guest's next sent frame, without its header.
    fn sent(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 17];
        match self.wire.recv(&mut frame) {
            Ok(len) => Some(frame[HEADER_LEN..len].to_vec()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                None
            }
        }
    }

    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        self.device.read(0x100, &mut config);
        config
    }

    /// The interrupt status, acknowledged.
    fn interrupt(&self) -> u32 {
        let mut status = [0; 4];
        self.device.read(0x60, &mut status);
        self.device.write(0x64, &status);
        u32::from_le_bytes(status)
    }

    fn count(&self, key: &str) -> u64 {
        self.device.metrics()[key].as_u64().unwrap()
    }
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 7 + len) as u8).collect()
}

#[test]
fn frames_go_both_ways_with_their_headers() {
    let mut bench = Bench::new(0);
    bench.add(RX, BUFFERS, 2048, true);
    bench.device.queue_kicked(RX);
    bench.arrive(&frame(100));
    bench.device.source_ready(token::TAP);
    assert_eq!(bench.take_used(RX), [(0, 112)]);
    assert_eq!(bench.bytes(BUFFERS, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "num_buffers is always there");
    assert_eq!(bench.bytes(BUFFERS + 12, 100), frame(100));
    assert_eq!(bench.interrupt(), 1);
    bench.memory.write_slice(&[[0; 12].as_slice(), &frame(60)].concat(), GuestAddress(BUFFERS)).unwrap();
    bench.add(TX, BUFFERS, 72, false);
    bench.device.queue_kicked(TX);
    assert_eq!(bench.take_used(TX), [(0, 0)]);
    assert_eq!(bench.sent(), Some(frame(60)));
    assert_eq!([bench.count("rx_bytes_count"), bench.count("tx_bytes_count")], [100, 60]);
}

#[test]
fn frame_waits_in_the_tap_until_there_is_a_buffer() {
    let mut bench = Bench::new(EVENT_IDX);
    bench.arrive(&frame(100));
    bench.device.source_ready(token::TAP);
    assert_eq!(bench.take_used(RX), []);
    assert_eq!(bench.count("no_rx_avail_buffer"), 1);
    bench.add(RX, BUFFERS, 2048, true);
    bench.device.queue_kicked(RX);
    assert_eq!(bench.take_used(RX), [(0, 112)]);
}

#[test]
fn large_frame_is_spread_over_mergeable_buffers_and_its_buffers_show_at_once() {
    for expected in [FRAME_MAX, 0] {
        let mut bench = Bench::new(MERGEABLE);
        for index in 0..8 {
            bench.add(RX, BUFFERS + 0x1000 * index, 1500, true);
        }
        if expected > 0 {
            bench.arrive(&frame(5000));
            bench.device.source_ready(token::TAP);
            bench.take_used(RX);
            (0..4).for_each(|index| bench.add(RX, BUFFERS + 0x1000 * index, 1500, true));
        }
        let first = bench.used[RX] % 8;
        bench.arrive(&frame(5000));
        bench.device.source_ready(token::TAP);
        let used = bench.take_used(RX);
        assert_eq!(used.iter().map(|(_, len)| *len).collect::<Vec<_>>(), [1500, 1500, 1500, 512]);
        let at = |index: u16| BUFFERS + 0x1000 * u64::from((first + index) % 8);
        assert_eq!(bench.bytes(at(0) + 10, 2), [4, 0]);
        let mut got = bench.bytes(at(0) + 12, 1488);
        (1..3).for_each(|index| got.extend(bench.bytes(at(index), 1500)));
        got.extend(bench.bytes(at(3), 512));
        assert_eq!(got, frame(5000));
        assert_eq!(bench.count("rx_partly_copied"), 1, "only the first large frame is a surprise");
    }
}

#[test]
fn frame_for_which_buffers_are_too_few_waits_for_more_unless_there_were_never_more() {
    for (more, wanted) in [(4, vec![1500, 1500, 1500, 512]), (1, vec![])] {
        let mut bench = Bench::new(MERGEABLE | EVENT_IDX);
        // The driver has had this many buffers at a time.
        let had = wanted.len().max(3) as u64;
        (0..had).for_each(|index| bench.add(RX, BUFFERS + 0x8000 + 0x1000 * index, 1500, true));
        bench.device.queue_kicked(RX);
        (0..had).for_each(|_| bench.arrive(&frame(20)));
        bench.device.source_ready(token::TAP);
        assert_eq!(bench.take_used(RX).len() as u64, had);
        (0..2).for_each(|index| bench.add(RX, BUFFERS + 0x1000 * index, 1500, true));
        bench.arrive(&frame(5000));
        bench.arrive(&frame(50));
        bench.device.source_ready(token::TAP);
        bench.device.source_ready(token::TAP);
        assert_eq!(bench.take_used(RX), []);
        let event: u16 = bench.memory.read_obj(GuestAddress(Bench::rings(RX)[2] + 4 + 8 * u64::from(SIZE))).unwrap();
        assert_eq!(u64::from(event), had + 2, "the driver is to tell of buffers beyond those that wait");
        (2..2 + more).for_each(|index| bench.add(RX, BUFFERS + 0x1000 * index, 1500, true));
        bench.device.queue_kicked(RX);
        let mut used: Vec<u32> = bench.take_used(RX).iter().map(|(_, len)| *len).collect();
        assert_eq!(used.pop(), Some(62), "the next frame");
        assert_eq!(used, wanted);
        assert_eq!(bench.count("rx_fails"), u64::from(wanted.is_empty()));
        if !wanted.is_empty() {
            assert_eq!(bench.bytes(BUFFERS + 12, 1488), frame(5000)[..1488]);
            assert_eq!(bench.bytes(BUFFERS + 0x3000, 512), frame(5000)[4488..]);
        }
    }
}

#[test]
fn frame_longer_than_its_buffer_is_lost_and_the_buffer_is_not() {
    let mut bench = Bench::new(0);
    bench.add(RX, BUFFERS, 1000, true);
    bench.arrive(&frame(1400));
    bench.arrive(&frame(988));
    bench.device.source_ready(token::TAP);
    assert_eq!(bench.take_used(RX), [(0, 1000)]);
    assert_eq!(bench.bytes(BUFFERS + 12, 988), frame(988));
    assert_eq!(bench.count("rx_fails"), 1);
}

#[test]
fn frames_that_cannot_be_are_counted_and_given_back() {
    let mut bench = Bench::new(0);
    for (len, write) in [(25, false), (0, false), (FRAME_MAX as u32 + 1, false), (100, true)] {
        bench.add(TX, BUFFERS, len, write);
    }
    bench.add(TX, BUFFERS, 26, false);
    bench.device.queue_kicked(TX);
    assert_eq!(bench.take_used(TX).len(), 5);
    assert_eq!(bench.sent().map(|frame| frame.len()), Some(14));
    assert_eq!(bench.sent(), None);
    assert_eq!(bench.count("tx_malformed_frames"), 4);
}

#[test]
fn receive_buffer_without_room_for_a_header_breaks_the_device() {
    let mut bench = Bench::new(0);
    bench.add(RX, BUFFERS, 11, true);
    bench.device.queue_kicked(RX);
    let mut status = [0; 4];
    bench.device.read(0x70, &mut status);
    assert_eq!(u32::from_le_bytes(status) & 64, 64);
}

#[test]
fn quiet_device_writes_nothing_and_goes_on_where_it_was() {
    let mut bench = Bench::new(MERGEABLE);
    (0..4).for_each(|index| bench.add(RX, BUFFERS + 0x1000 * index, 2048, true));
    bench.arrive(&frame(100));
    bench.device.quiesce();
    bench.device.source_ready(token::TAP);
    bench.device.queue_kicked(RX);
    bench.device.look_at_all();
    assert_eq!(bench.take_used(RX), []);
    assert_eq!(bench.bytes(BUFFERS, 2048), vec![0; 2048]);
    bench.device.go_on();
    bench.device.look_at_all();
    assert_eq!(bench.take_used(RX), [(0, 112)]);
}

#[test]
fn limits_hold_frames_back_and_a_change_lets_them_go() {
    let one = Some(BucketLimit { size: 1, one_time_burst: 0, refill_time_ms: 3_600_000 });
    let limits = RateLimits { bandwidth: None, ops: one };
    let mut bench = Bench::with(NetParams { rx_limits: limits, tx_limits: limits, ..params() }, false, 0);
    for index in 0..3 {
        bench.add(RX, BUFFERS + 0x1000 * index, 2048, true);
        bench.add(TX, BUFFERS + 0x8000, 72, false);
        bench.arrive(&frame(100));
    }
    bench.device.look_at_all();
    assert_eq!((bench.take_used(RX).len(), bench.take_used(TX).len()), (1, 1));
    bench.device.source_ready(token::RX_TIMER);
    bench.device.source_ready(token::TX_TIMER);
    assert_eq!((bench.take_used(RX).len(), bench.take_used(TX).len()), (0, 0));
    assert_eq!((bench.count("rx_rate_limiter_throttled"), bench.count("tx_rate_limiter_throttled")), (1, 1));
    let none = RateLimits { bandwidth: None, ops: Some(BucketLimit { size: 0, one_time_burst: 0, refill_time_ms: 0 }) };
    bench.device.with_device(|net: &mut Net| {
        net.set_limits(none, none);
        assert!(net.link.again().read().is_ok(), "the device thread is woken");
        ((), false)
    });
    bench.device.source_ready(token::TX_TIMER);
    bench.device.source_ready(token::RX_TIMER);
    assert_eq!((bench.take_used(RX).len(), bench.take_used(TX).len()), (2, 2));
}

#[test]
fn configuration_says_address_link_and_mtu_and_the_driver_announces_after_a_restore() {
    let bench = Bench::new(ANNOUNCE);
    assert_eq!(bench.config(), [6, 0, 0xac, 16, 0, 2, 1, 0, 1, 0, 0x78, 5]);
    let mut bench = Bench::with(NetParams { mac: None, mtu: None, ..params() }, true, ANNOUNCE);
    assert_eq!(bench.config(), [0, 0, 0, 0, 0, 0, 3, 0, 1, 0, 0, 0]);
    assert_eq!(bench.interrupt(), 2);
    // An unknown command, then the one that acknowledges the announcement.
    for (index, command) in [[1u8, 0], [3, 0]].into_iter().enumerate() {
        let at = BUFFERS + 0x100 * index as u64;
        bench.memory.write_slice(&command, GuestAddress(at)).unwrap();
        bench.memory.write_obj(9u8, GuestAddress(at + 16)).unwrap();
        let desc = Bench::rings(CONTROL)[0] + 16 * 8;
        bench.add(CONTROL, at, 2, false);
        // The head goes on to descriptor 8, for the answer.
        let head = Bench::rings(CONTROL)[0] + 16 * index as u64;
        bench.memory.write_obj(u32::from(1u16) | 8 << 16, GuestAddress(head + 12)).unwrap();
        bench.memory.write_obj(at + 16, GuestAddress(desc)).unwrap();
        bench.memory.write_obj([1u32, 2], GuestAddress(desc + 8)).unwrap();
        bench.device.queue_kicked(CONTROL);
        assert_eq!(bench.take_used(CONTROL), [(index as u32, 1)]);
        assert_eq!(bench.bytes(at + 16, 1), [u8::from(index == 0)]);
        assert_eq!(bench.config()[6], if index == 0 { 3 } else { 1 });
    }
}

#[test]
fn state_remembers_everything_but_the_tap_and_a_mac_needs_one_before() {
    let limits = RateLimits {
        bandwidth: Some(BucketLimit { size: 9, one_time_burst: 8, refill_time_ms: 7 }),
        ops: Some(BucketLimit { size: 0, one_time_burst: 0, refill_time_ms: 1 }),
    };
    let before = NetParams { rx_limits: limits, ..params() };
    let bench = Bench::with(before.clone(), false, 0);
    let (_, bytes) = bench.device.save().unwrap();
    let state: NetState = postcard::from_bytes(&bytes).unwrap();
    assert_eq!((&state.id, &state.tap, state.mac, state.mtu), (&before.id, &before.tap, before.mac, before.mtu));
    assert_eq!((state.rx_limiter.limits(), state.tx_limiter.limits()), (limits, RateLimits::default()));
    let without = NetState { mac: None, ..state };
    let refused = Net::restore(without, |_| NetOverride { tap: None, mac: Some(MAC) });
    assert!(matches!(refused.err(), Some(Error::NoMac { .. })));
}

#[test]
fn offloads_are_those_the_driver_can_take() {
    let bit = |feature: u32| 1u64 << feature;
    let all = bit(VIRTIO_NET_F_GUEST_TSO4) | bit(VIRTIO_NET_F_GUEST_TSO6) | bit(VIRTIO_NET_F_GUEST_UFO);
    assert_eq!(offload(all), 0, "no segmentation without checksums");
    assert_eq!(offload(all | bit(VIRTIO_NET_F_GUEST_CSUM)), 1 | 2 | 4 | 16);
    assert_eq!(offload(bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_GUEST_TSO6)), 1 | 4);
}

#[test]
fn tap_names_that_no_interface_can_have_are_refused() {
    for name in ["", "sixteen-letters-", "a b", "tvmm-no-such"] {
        let error = Net::new(NetParams { tap: name.into(), ..params() }).err().expect("no such tap");
        let text = error.to_string();
        assert!(text.contains("`eth0`") && text.contains(&format!("`{name}`")), "{text}");
    }
}

#[derive(Clone, Debug)]
enum Act {
    Start(bool),
    Register(u64, u32),
    /// Writes the rings.
    Ring(u64, u64),
    Descriptor(u64, u64, u32, u32),
    /// Makes this many chains available.
    Avail(usize, u16),
    Kick(usize),
    Event(u32),
    LookAtAll,
    Arrive(usize),
    Pause,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let queue = 0usize..3;
    let value = prop_oneof![any::<u64>(), 0u64..RAM as u64, 0u64..0x100];
    let len = prop_oneof![Just(12u32), Just(2048), Just(70_000), any::<u32>()];
    let act = prop_oneof![
        2 => any::<bool>().prop_map(Act::Start),
        1 => ((0u64..0x42).prop_map(|index| index * 4), any::<u32>()).prop_map(|(at, value)| Act::Register(at, value)),
        3 => (0u64..0x1800, value.clone()).prop_map(|(at, value)| Act::Ring(RINGS + at * 8, value)),
        8 => (0u64..24, value, len, 0u32..0x18_0008).prop_map(|(at, address, len, flags)| {
            Act::Descriptor(at, address, len, flags)
        }),
        8 => (queue.clone(), 0u16..20).prop_map(|(queue, count)| Act::Avail(queue, count)),
        6 => queue.prop_map(Act::Kick),
        4 => (0u32..4).prop_map(Act::Event),
        1 => Just(Act::LookAtAll),
        6 => prop_oneof![Just(1usize), Just(60), Just(1500), Just(9000), 0usize..66_000].prop_map(Act::Arrive),
        1 => Just(Act::Pause),
    ];
    proptest::collection::vec(act, 1..120)
}

/// Descriptor `at % 8` of queue `at / 8`: flags in the low half, the next one in the high half.
fn write_descriptor(bench: &Bench, at: u64, address: u64, len: u32, flags: u32) {
    let desc = GuestAddress(Bench::rings(at as usize / 8)[0] + 16 * (at % 8));
    let fields = u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96;
    bench.memory.write_obj(fields.to_le_bytes(), desc).unwrap();
}

proptest! {
    #[test]
    fn no_driver_makes_the_device_panic_or_hang(acts in acts(), event_idx: bool) {
        let features = if event_idx { EVENT_IDX } else { 0 };
        let mut bench = Bench::new(features | MERGEABLE);
        for act in acts {
            match act {
                Act::Start(mergeable) => bench.start(features | if mergeable { MERGEABLE } else { 0 }),
                Act::Register(register, value) => bench.register(register, value),
                Act::Ring(at, value) => bench.memory.write_obj(value, GuestAddress(at)).unwrap(),
                Act::Descriptor(at, address, len, flags) => write_descriptor(&bench, at, address, len, flags),
                Act::Avail(queue, count) => {
                    let at = GuestAddress(Bench::rings(queue)[1] + 2);
                    let index: u16 = bench.memory.read_obj(at).unwrap();
                    bench.memory.write_obj(index.wrapping_add(count), at).unwrap();
                }
                Act::Kick(queue) => bench.device.queue_kicked(queue),
                Act::Event(token) => bench.device.source_ready(token),
                Act::LookAtAll => bench.device.look_at_all(),
                Act::Arrive(len) => drop(bench.wire.send(&frame(len))),
                Act::Pause => {
                    bench.device.quiesce();
                    drop(bench.device.save().unwrap());
                    bench.device.go_on();
                }
            }
            while bench.sent_raw() {}
        }
        bench.avail = [0; 3];
    }
}

impl Bench {
    /// Takes a datagram that the device has sent; returns whether there was one.
    fn sent_raw(&self) -> bool {
        self.wire.recv(&mut [0; 16]).is_ok()
    }
}
