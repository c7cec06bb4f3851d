//! Drivers that follow the specification, and answers to those that do not.

use super::*;

#[test]
fn guest_talks_to_a_program_and_closes() {
    let mut driver = Driver::booted();
    let mut program = driver.connected(65536);
    driver.send(packet(80, 9, op::RW), b"question");
    let mut bytes = [0; 16];
    assert_eq!(program.read(&mut bytes).unwrap(), 8);
    assert_eq!(&bytes[..8], b"question");
    program.write_all(b"answer").unwrap();
    let (header, data) = driver.next().unwrap();
    assert_eq!((header.op, header.fwd_cnt, header.buf_alloc, &data[..]), (op::RW, 8, BUF_ALLOC, &b"answer"[..]));
    driver.send(shutdown(shut::BOTH), &[]);
    assert_eq!(driver.next_op(80, 9), Some(op::RST));
    assert_eq!(program.read(&mut bytes).unwrap(), 0);
    assert_eq!((driver.count("conns_added"), driver.count("conns_removed")), (1, 1));
}

#[test]
fn half_close_ends_one_direction_only() {
    let mut driver = Driver::booted();
    let mut program = driver.connected(65536);
    program.write_all(b"last words").unwrap();
    program.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(driver.next().unwrap().1, b"last words");
    let (header, _) = driver.next().unwrap();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, shut::SEND));
    driver.send(packet(80, 9, op::RW), b"answer");
    driver.send(shutdown(shut::SEND), &[]);
    let mut answer = String::new();
    program.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    let (header, _) = driver.next().unwrap();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, shut::BOTH), "both directions are over");
    driver.send(packet(80, 9, op::RST), &[]);
    assert_eq!(driver.count("conns_removed"), 1);
}

#[test]
fn program_that_goes_away_is_told_after_all_that_it_wrote() {
    let mut driver = Driver::booted();
    let mut program = driver.connected(5);
    program.write_all(b"0123456789").unwrap();
    drop(program);
    assert_eq!(driver.next().unwrap().1, b"01234");
    assert_eq!(driver.next_op(80, 9), Some(op::CREDIT_REQUEST));
    assert_eq!(driver.next(), None, "no credit, and it was asked for once");
    driver.send(Header { buf_alloc: 5, fwd_cnt: 5, ..packet(80, 9, op::CREDIT_UPDATE) }, &[]);
    assert_eq!(driver.next().unwrap().1, b"56789");
    let (header, _) = driver.next().unwrap();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, shut::BOTH), "the end is seen without credit too");
}

#[test]
fn guest_is_told_of_room_and_stopped_when_it_takes_more() {
    let mut driver = Driver::booted();
    let program = driver.connected(65536);
    let chunk = vec![7; 32 << 10];
    let mut sent = 0u32;
    let mut told = 0;
    let mut reset = false;
    // The program reads nothing: its socket fills first, then the connection's own room.
    for _ in 0..100 {
        driver.send(packet(80, 9, op::RW), &chunk);
        sent += chunk.len() as u32;
        while let Some((header, _)) = driver.next() {
            driver.give(1);
            match header.op {
                op::CREDIT_UPDATE => told = header.fwd_cnt,
                op::RST => reset = true,
                other => panic!("{other}"),
            }
        }
        if reset {
            break;
        }
        assert!(sent - told <= BUF_ALLOC + 262_144, "{sent} {told}");
    }
    assert!(reset && told > 0);
    assert_eq!(driver.count("conns_killed"), 1);
    drop(program);
}

#[test]
fn program_that_reads_late_gets_everything_after_the_guest_has_closed() {
    let mut driver = Driver::booted();
    let mut program = driver.connected(65536);
    let mut expected: Vec<u8> = Vec::new();
    let mut told = 0u32;
    while expected.len() < 1 << 20 {
        let room = BUF_ALLOC.saturating_sub(expected.len() as u32 - told);
        if room < 4096 {
            break;
        }
        let chunk: Vec<u8> = (0..4096).map(|i| (expected.len() / 4096 + i) as u8).collect();
        driver.send(packet(80, 9, op::RW), &chunk);
        expected.extend(&chunk);
        while let Some((header, _)) = driver.next() {
            driver.give(1);
            told = header.fwd_cnt;
        }
    }
    driver.send(shutdown(shut::BOTH), &[]);
    assert_eq!(driver.next_op(80, 9), Some(op::RST));
    let mut got: Vec<u8> = Vec::new();
    let mut buffer = [0; 10_000];
    loop {
        match program.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => got.extend(&buffer[..count]),
            Err(_) => driver.run(),
        }
    }
    assert!(got == expected, "{} of {} bytes", got.len(), expected.len());
}

#[test]
fn unknown_packets_are_reset_or_dropped() {
    let mut driver = Driver::booted();
    driver.give(32);
    driver.send(packet(81, 9, op::REQUEST), &[]);
    assert_eq!(driver.next_op(81, 9), Some(op::RST), "nobody listens");
    driver.send(packet(80, 9, op::RW), b"x");
    assert_eq!(driver.next_op(80, 9), Some(op::RST), "no such connection");
    driver.send(Header { kind: 2, ..packet(80, 9, op::REQUEST) }, &[]);
    let (header, _) = driver.next().unwrap();
    assert_eq!((header.op, header.kind), (op::RST, 2), "seqpacket");
    driver.send(packet(80, 9, op::RST), &[]);
    driver.send(Header { src_cid: 8, ..packet(80, 9, op::RW) }, &[]);
    driver.send(Header { dst_cid: 3, ..packet(80, 9, op::RW) }, &[]);
    driver.send(Header { dst_cid: 1 << 32 | 2, ..packet(80, 9, op::RW) }, &[]);
    assert_eq!(driver.next(), None);
    assert_eq!(driver.count("packets_dropped"), 3);
    for operation in [op::REQUEST, op::RESPONSE, 0, 99] {
        let _program = driver.connected(65536);
        std::fs::remove_file(driver.dir.path().join("v_80")).unwrap();
        driver.send(packet(80, 9, operation), &[]);
        assert_eq!(driver.next_op(80, 9), Some(op::RST), "{operation}");
    }
    assert_eq!(driver.status(), 15);
}

#[test]
fn guest_without_receive_buffers_is_not_read_from_for_ever() {
    let mut driver = Driver::booted();
    while driver.outstanding(TX) < SIZE {
        driver.send(packet(80, 9, op::RW), &[]);
    }
    let sent = driver.added[TX];
    let taken = driver.used_of(TX);
    assert_eq!(usize::from(taken), RESETS_MAX, "a reset for each, and no more");
    let mut got = 0;
    for _ in 0..32 {
        driver.give(32);
        while let Some((header, _)) = driver.next() {
            assert_eq!(header.op, op::RST);
            got += 1;
        }
    }
    assert_eq!((got, driver.used_of(TX)), (sent, sent), "and all of them once there are buffers");
}

#[test]
fn program_asks_for_a_port_of_the_guest() {
    let mut driver = Driver::booted();
    let mut program = UnixStream::connect(driver.dir.path().join("v")).unwrap();
    driver.give(8);
    driver.run();
    program.write_all(b"CONNECT 52\nearly").unwrap();
    let (request, _) = driver.next().unwrap();
    assert_eq!((request.op, request.src_port, request.dst_port), (op::REQUEST, 1 << 30, 52));
    assert_eq!(driver.next(), None, "nothing more before the guest has answered");
    driver.send(packet(1 << 30, 52, op::RESPONSE), &[]);
    assert_eq!(driver.next().unwrap().1, b"early");
    let mut line = [0; 14];
    program.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 1073741824\n");
    let mut refused = UnixStream::connect(driver.dir.path().join("v")).unwrap();
    refused.write_all(b"CONNECT 53\n").unwrap();
    assert_eq!(driver.next_op((1 << 30) + 1, 53), Some(op::REQUEST));
    driver.send(packet((1 << 30) + 1, 53, op::RST), &[]);
    assert_eq!(refused.read(&mut line).unwrap(), 0, "nobody listens in the guest");
    let mut rude = UnixStream::connect(driver.dir.path().join("v")).unwrap();
    rude.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    driver.run();
    assert!(!matches!(rude.read(&mut line), Ok(1..)));
}

#[test]
fn guest_that_does_not_answer_is_given_up() {
    let mut driver = Driver::booted();
    let set = |vsock: &mut Vsock| (vsock.guest_timeout = Duration::from_millis(50), false);
    driver.device.with_device::<Vsock, _>(set).unwrap();
    let mut program = UnixStream::connect(driver.dir.path().join("v")).unwrap();
    program.write_all(b"CONNECT 52\n").unwrap();
    driver.give(8);
    assert_eq!(driver.next_op(1 << 30, 52), Some(op::REQUEST));
    // The time limit does not run while the machine stands still.
    driver.device.quiesce();
    std::thread::sleep(Duration::from_millis(80));
    driver.device.go_on();
    assert_eq!(driver.next(), None);
    std::thread::sleep(Duration::from_millis(80));
    assert_eq!(driver.next_op(1 << 30, 52), Some(op::RST));
    assert_eq!(program.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(driver.count("conns_killed"), 1);
    let mut answered = UnixStream::connect(driver.dir.path().join("v")).unwrap();
    answered.write_all(b"CONNECT 52\n").unwrap();
    assert_eq!(driver.next_op((1 << 30) + 1, 52), Some(op::REQUEST));
    driver.send(packet((1 << 30) + 1, 52, op::RESPONSE), &[]);
    std::thread::sleep(Duration::from_millis(80));
    answered.write_all(b"still there").unwrap();
    assert_eq!(driver.next_op((1 << 30) + 1, 52), Some(op::RW), "an answer in time ends the waiting");
}

#[test]
fn saved_state_that_no_device_had_is_refused() {
    let state = VsockState { guest_cid: CID, uds_path: b"/v".to_vec(), next_port: 1 << 30 };
    assert!(VsockParams::restored(state.clone()).is_ok());
    for bad in [
        VsockState { guest_cid: 2, ..state.clone() },
        VsockState { uds_path: Vec::new(), ..state.clone() },
        VsockState { next_port: 5, ..state },
    ] {
        assert!(VsockParams::restored(bad).is_err());
    }
}
