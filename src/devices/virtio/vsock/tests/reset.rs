//! A restored guest learns that its connections are gone, and gets its next packets as soon as it has acknowledged
//! that.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// Event buffers of Linux's driver, and of the test guest's.
const EVENT_BUFFERS: u16 = 8;
const EVENT_IDX: u32 = 1 << 29;
const HOST_PORT: u32 = (1 << 30) + 5;

/// A restored device whose driver had given it `event_buffers`, and a program that connects to port 52.
fn restored(features: u32, event_buffers: u16) -> (Driver, UnixStream) {
    let mut driver = Driver::booted();
    driver.start_with(features);
    for buffer in 0..event_buffers {
        add_event_buffer(&mut driver, buffer);
    }
    driver.give(4);
    // The device looks at its queues, as it did before the snapshot.
    driver.run();
    let (transport, _) = driver.device.save().unwrap();
    let path = driver.dir.path().join("w");
    let state = VsockState { guest_cid: CID, uds_path: b"-".to_vec(), next_port: HOST_PORT };
    let params = VsockParams { uds_path: path.clone(), ..VsockParams::restored(state).unwrap() };
    driver.device = MmioDevice::new(Box::new(Vsock::new(params).unwrap()), driver.memory.clone()).unwrap();
    driver.device.restore(&transport).unwrap();
    let mut program = UnixStream::connect(path).unwrap();
    program.write_all(b"CONNECT 52\n").unwrap();
    (driver, program)
}

fn add_event_buffer(driver: &mut Driver, buffer: u16) {
    driver.add(EVENT, EVENT_AT + u64::from(buffer) * 8, 8, true);
}

/// The driver's step after it has made one chain available (VIRTIO 1.2, 2.7.7.1 and 2.7.10.1); returns whether it
/// kicked.
fn kick_if_asked(driver: &Driver, queue: usize, event_idx: bool) -> bool {
    let used = Driver::at(queue, 2);
    let asked = if event_idx {
        let event: u16 = driver.memory.read_obj(GuestAddress(used + 4 + 8 * u64::from(SIZE))).unwrap();
        driver.added[queue].wrapping_sub(event).wrapping_sub(1) < 1
    } else {
        driver.memory.read_obj::<u16>(GuestAddress(used)).unwrap() & 1 == 0
    };
    if asked {
        driver.device.queue_kicked(queue);
    }
    asked
}

/// True if the next packet is there already, without another turn of the device.
fn next_without_looking(driver: &mut Driver) -> bool {
    driver.used_of(RX) != driver.used[RX]
}

#[test]
fn restored_guest_is_told_and_gets_nothing_else_before_it_has_seen_that() {
    for (features, event_buffers) in [(0, 1), (0, EVENT_BUFFERS), (EVENT_IDX, 1), (EVENT_IDX, EVENT_BUFFERS)] {
        let (mut driver, _program) = restored(features, event_buffers);
        driver.memory.write_obj(u64::MAX, GuestAddress(EVENT_AT)).unwrap();
        driver.device.go_on();
        assert_eq!(driver.next(), None);
        assert_eq!(driver.used_of(EVENT), 1);
        assert_eq!(driver.memory.read_obj::<u32>(GuestAddress(EVENT_AT)).unwrap(), EVENT_TRANSPORT_RESET);
        add_event_buffer(&mut driver, 0);
        assert!(kick_if_asked(&driver, EVENT, features != 0), "{event_buffers} event buffers");
        assert!(next_without_looking(&mut driver), "the kick alone lets the packet through");
        assert_eq!(driver.next_op(HOST_PORT, 52), Some(op::REQUEST));
        assert_eq!((driver.count("resets_seen"), driver.count("resets_expired")), (1, 0));
    }
}

#[test]
fn driver_without_event_buffers_is_asked_for_one() {
    for features in [0, EVENT_IDX] {
        let (mut driver, _program) = restored(features, 0);
        // The driver's position before the snapshot differs from the device's last request.
        let stale = Driver::at(EVENT, 2) + 4 + 8 * u64::from(SIZE);
        driver.memory.write_obj(1000u16, GuestAddress(stale)).unwrap();
        driver.device.go_on();
        assert_eq!(driver.next(), None);
        add_event_buffer(&mut driver, 0);
        assert!(kick_if_asked(&driver, EVENT, features != 0));
        assert_eq!(driver.used_of(EVENT), 1);
        add_event_buffer(&mut driver, 0);
        assert!(kick_if_asked(&driver, EVENT, features != 0));
        assert!(next_without_looking(&mut driver));
    }
}

/// A driver that polls the used ring answers while the device is still at work. Its answer must count at any time.
#[test]
fn answer_that_comes_at_once_is_not_taken_for_a_buffer_that_was_there() {
    for round in 0..200 {
        let (mut driver, _program) = restored(EVENT_IDX, EVENT_BUFFERS);
        let polls = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let device = &driver.device;
            let polls = &polls;
            let memory = driver.memory.clone();
            let added = driver.added[EVENT];
            scope.spawn(move || {
                polls.store(true, Ordering::Release);
                let used = GuestAddress(Driver::at(EVENT, 2) + 2);
                while memory.load::<u16>(used, Ordering::Acquire).unwrap() == 0 {
                    std::hint::spin_loop();
                }
                // The buffer that came back is the first, and is made available again.
                let ring = Driver::at(EVENT, 1);
                memory.write_obj(0u16, GuestAddress(ring + 4 + 2 * u64::from(added % SIZE))).unwrap();
                memory.store(added + 1, GuestAddress(ring + 2), Ordering::Release).unwrap();
                std::sync::atomic::fence(Ordering::SeqCst);
                let event: u16 = memory.read_obj(GuestAddress(used.0 - 2 + 4 + 8 * u64::from(SIZE))).unwrap();
                if event == added {
                    device.queue_kicked(EVENT);
                }
            });
            while !polls.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
            device.go_on();
            device.look_at_all();
        });
        driver.added[EVENT] += 1;
        assert_eq!(driver.next_op(HOST_PORT, 52), Some(op::REQUEST), "round {round}");
        assert_eq!((driver.count("resets_seen"), driver.count("resets_expired")), (1, 0));
    }
}

#[test]
fn driver_that_never_answers_gets_its_packets_late_and_is_counted() {
    let (mut driver, _program) = restored(EVENT_IDX, EVENT_BUFFERS);
    driver.device.go_on();
    assert_eq!(driver.next(), None);
    std::thread::sleep(RESET_TIMEOUT);
    assert_eq!(driver.next_op(HOST_PORT, 52), Some(op::REQUEST));
    assert_eq!((driver.count("resets_seen"), driver.count("resets_expired")), (0, 1));
}
