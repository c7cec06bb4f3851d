//! The transport against drivers that follow the specification, and drivers that do not.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};

use super::{Entropy, Memory, MmioDevice, region_bitmap};
use crate::devices::BusDevice;

const RAM: usize = 1 << 20;

fn memory() -> Memory {
    let builder = vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(RAM, region_bitmap(RAM));
    let region: MmapRegion<_> = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).build().unwrap();
    Memory::from_regions(vec![GuestRegionMmap::new(region, GuestAddress(0)).unwrap()]).unwrap()
}

fn device() -> (MmioDevice, Memory) {
    let memory = memory();
    let device =
        MmioDevice::new(Box::new(Entropy::new(super::RateLimits::default()).unwrap()), memory.clone()).unwrap();
    device.go_on();
    (device, memory)
}

fn write(device: &MmioDevice, register: u64, value: u32) {
    device.write(register, &value.to_le_bytes());
}

fn read(device: &MmioDevice, register: u64) -> u32 {
    let mut bytes = [0; 4];
    device.read(register, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Goes through VIRTIO 1.2, 3.1.1, with one queue of 16 entries at 0x1000, 0x2000 and 0x3000.
fn start(device: &MmioDevice) {
    for (register, value) in [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x38, 16),
        (0x80, 0x1000),
        (0x90, 0x2000),
        (0xa0, 0x3000),
        (0x44, 1),
        (0x70, 15),
    ] {
        write(device, register, value);
    }
}

#[test]
fn driver_that_follows_the_specification_gets_its_bytes() {
    let (device, memory) = device();
    assert_eq!([0x00, 0x04, 0x08].map(|register| read(&device, register)), [0x7472_6976, 2, 4]);
    start(&device);
    assert_eq!(read(&device, 0x70), 15);
    memory.write_obj(0x8000u64, GuestAddress(0x1000)).unwrap();
    memory.write_obj(64u32, GuestAddress(0x1008)).unwrap();
    memory.write_obj(2u16, GuestAddress(0x100c)).unwrap();
    memory.write_obj(1u16, GuestAddress(0x2002)).unwrap();
    device.queue_kicked(0);
    assert_eq!(memory.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), 1);
    assert_eq!(memory.read_obj::<u32>(GuestAddress(0x3008)).unwrap(), 64);
    assert_ne!(memory.read_obj::<[u8; 32]>(GuestAddress(0x8000)).unwrap(), [0; 32]);
    assert_eq!(read(&device, 0x60), 1);
    write(&device, 0x64, 1);
    assert_eq!(read(&device, 0x60), 0);
}

#[test]
fn features_are_settled_once_and_only_if_they_were_offered() {
    let (device, _) = device();
    for (status, features) in [(1, 0), (3, 0x8000_0000)] {
        write(&device, 0x70, status);
        write(&device, 0x20, features);
    }
    write(&device, 0x70, 11);
    assert_eq!(read(&device, 0x70), 3, "VERSION_1 is missing, and bit 31 was never offered");
    write(&device, 0x70, 7);
    assert_eq!(read(&device, 0x70), 3, "DRIVER_OK before FEATURES_OK");
    start(&device);
    write(&device, 0x80, 0xdead_0000);
    device.queue_kicked(0);
    assert_eq!(read(&device, 0x70), 15, "a queue cannot be moved while the device uses it");
}

#[test]
fn queue_outside_memory_breaks_the_device_until_it_is_reset() {
    let (device, _) = device();
    for register_value in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x80, 0xfff_0000), (0x44, 1)] {
        write(&device, register_value.0, register_value.1);
    }
    write(&device, 0x70, 15);
    assert_eq!(read(&device, 0x70) & 64, 64);
    assert_eq!(read(&device, 0x60), 2);
    write(&device, 0x70, 0);
    assert_eq!((read(&device, 0x70), read(&device, 0x60), read(&device, 0x44)), (0, 0, 0));
    start(&device);
    assert_eq!(read(&device, 0x70), 15);
}

#[test]
fn saved_state_goes_on_in_another_device_and_impossible_state_is_refused() {
    let (device, memory) = device();
    start(&device);
    memory.write_obj(5u16, GuestAddress(0x2002)).unwrap();
    device.quiesce();
    device.queue_kicked(0);
    assert_eq!(memory.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), 0, "a quiet device leaves its queue alone");
    let (state, _) = device.save().unwrap();
    let other = MmioDevice::new(Box::new(Entropy::new(super::RateLimits::default()).unwrap()), memory.clone()).unwrap();
    other.restore(&state).unwrap();
    assert_eq!(other.save().unwrap().0, state);
    other.go_on();
    other.look_at_all();
    assert_eq!(memory.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), 5);
    let bytes = postcard::to_stdvec(&state).unwrap();
    for at in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x55;
        if let Ok(state) = postcard::from_bytes(&bytes) {
            // Refused or not: it must come back, and the device must live.
            let other =
                MmioDevice::new(Box::new(Entropy::new(super::RateLimits::default()).unwrap()), memory.clone()).unwrap();
            let _ = other.restore(&state);
            other.go_on();
            other.look_at_all();
        }
    }
}

#[derive(Clone, Debug)]
enum Act {
    Register(u64, Vec<u8>),
    Read(u64, usize),
    Memory(u64, u64),
    Start,
    Kick,
    LookAtAll,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let value = prop_oneof![any::<u32>(), 0u32..32, Just(0x1000), Just(0x2000), Just(0x3000)];
    let register = (0u64..0x50).prop_map(|index| index * 4);
    let act = prop_oneof![
        4 => (register, value).prop_map(|(register, value)| Act::Register(register, value.to_le_bytes().to_vec())),
        1 => (0u64..0x1000, proptest::collection::vec(any::<u8>(),
        0..9)).prop_map(|(at, data)| Act::Register(at, data)),
        1 => (0u64..0x1000, 0usize..9).prop_map(|(at, len)| Act::Read(at, len)),
        6 => (0u64..0x600, prop_oneof![any::<u64>(),
        0u64..0x10_0000]).prop_map(|(at, v)| Act::Memory(0x1000 + at * 8, v)),
        2 => Just(Act::Start),
        3 => Just(Act::Kick),
        1 => Just(Act::LookAtAll),
    ];
    proptest::collection::vec(act, 1..200)
}

proptest! {
    #[test]
    fn no_driver_makes_the_transport_panic_or_hang(acts in acts()) {
        let (device, memory) = device();
        for act in acts {
            match act {
                Act::Register(register, data) => device.write(register, &data),
                Act::Read(register, len) => device.read(register, &mut vec![0; len]),
                Act::Memory(at, value) => memory.write_obj(value, GuestAddress(at)).unwrap(),
                Act::Start => start(&device),
                Act::Kick => device.queue_kicked(0),
                Act::LookAtAll => device.look_at_all(),
            }
        }
    }
}
