//! Arbitrary content of the driver's queues, and arbitrary behaviour of programs.

use proptest::prelude::*;

use super::*;

/// An action of a hostile guest, or of a program.
#[derive(Clone, Debug)]
enum Act {
    Packet { header: Header, len: usize, lie: i8 },
    Descriptor { queue: usize, index: u16, at: u64, len: u32, flags: u16, next: u16 },
    Available { queue: usize, index: u16, count: u16 },
    Buffers(u16),
    ShortBuffer(usize),
    Program(u8),
    Reset,
}

fn acts() -> impl Strategy<Value = Act> {
    let port = || prop_oneof![Just(80u32), Just(9), Just(1 << 30), any::<u32>()];
    let cid = || prop_oneof![8 => Just(u64::from(CID)), 1 => any::<u64>()];
    let header = (cid(), port(), port(), 0u16..10, any::<u32>(), prop_oneof![Just(0u32), Just(65536), any::<u32>()])
        .prop_map(|(src_cid, src_port, dst_port, op, flags, buf_alloc)| Header {
            src_cid,
            dst_cid: HOST_CID,
            src_port,
            dst_port,
            kind: if flags % 16 == 5 { 2 } else { TYPE_STREAM },
            op,
            flags: flags % 8,
            buf_alloc,
            fwd_cnt: flags >> 8,
            len: 0,
        });
    let address = || prop_oneof![0..RAM as u64, any::<u64>()];
    prop_oneof![
        8 => (header, prop_oneof![Just(0usize), 1..0x1_0000usize], prop_oneof![9 => Just(0i8), 1 => any::<i8>()])
            .prop_map(|(header, len, lie)| Act::Packet { header, len, lie }),
        1 => (0usize..3, 0..SIZE, address(), any::<u32>(), 0u16..8, 0..SIZE)
            .prop_map(|(queue, index, at, len, flags, next)| Act::Descriptor { queue, index, at, len, flags, next }),
        1 => (0usize..3, any::<u16>(),
        0u16..SIZE).prop_map(|(queue, index, count)| Act::Available { queue, index, count }),
        4 => (1u16..8).prop_map(Act::Buffers),
        1 => (0usize..64).prop_map(Act::ShortBuffer),
        6 => any::<u8>().prop_map(Act::Program),
        1 => Just(Act::Reset),
    ]
}

/// Programs with arbitrary behaviour.
struct Programs {
    listener: UnixListener,
    streams: Vec<UnixStream>,
}

impl Programs {
    fn act(&mut self, path: &std::path::Path, what: u8) {
        if let Ok((stream, _)) = self.listener.accept() {
            stream.set_nonblocking(true).unwrap();
            self.streams.push(stream);
        }
        let which = usize::from(what) % self.streams.len().max(1);
        match (what % 7, self.streams.get_mut(which)) {
            (0, _) => {
                let mut stream = UnixStream::connect(path).unwrap();
                let lines: [&[u8]; 4] = [b"CONNECT 9\n", b"CONNECT 80\nhello", b"CONN", b"\0\xff\n"];
                stream.write_all(lines[usize::from(what) / 7 % 4]).unwrap();
                stream.set_nonblocking(true).unwrap();
                self.streams.push(stream);
            }
            (1 | 2, Some(stream)) => drop(stream.write(&[what; 5000])),
            (3, Some(stream)) => drop(stream.read(&mut [0; 70_000])),
            (4, Some(stream)) => drop(stream.shutdown(std::net::Shutdown::Write)),
            (5, Some(stream)) => drop(stream.shutdown(std::net::Shutdown::Read)),
            (6, Some(_)) => drop(self.streams.swap_remove(which)),
            _ => {}
        }
    }
}

proptest! {
    #[test]
    fn no_driver_and_no_program_makes_vsock_panic_or_hang(acts in prop::collection::vec(acts(), 1..120)) {
        let mut driver = Driver::booted();
        let listener = driver.listen(80);
        listener.set_nonblocking(true).unwrap();
        let mut programs = Programs { listener, streams: Vec::new() };
        let path = driver.dir.path().join("v");
        // No descriptor names this page as a buffer.
        let untouched = GuestAddress(RAM as u64 - 4096);
        for act in acts {
            match act {
                Act::Packet { header, len, lie } => {
                    let at = TX_AT + u64::from(driver.added[TX] % SIZE) * 0x1_1000;
                    let says = (len as u32).wrapping_add_signed(i32::from(lie));
                    let bytes = Header { len: says, ..header }.to_bytes();
                    driver.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
                    driver.add(TX, at, header::LEN + len, false);
                }
                Act::Descriptor { queue, index, at, len, flags, next } => {
                    let descriptor = Driver::at(queue, 0) + 16 * u64::from(index);
                    // Device areas and the untouched page are not named.
                    let at = if flags & 2 != 0 && at < RAM as u64 { at % 0x1000 + RX_AT } else { at };
                    let len = if at < RAM as u64 { len % 0x8000 } else { len };
                    driver.memory.write_obj(at, GuestAddress(descriptor)).unwrap();
                    driver.memory.write_obj(len, GuestAddress(descriptor + 8)).unwrap();
                    driver.memory.write_obj(flags, GuestAddress(descriptor + 12)).unwrap();
                    driver.memory.write_obj(next, GuestAddress(descriptor + 14)).unwrap();
                }
                Act::Available { queue, index, count } => {
                    let ring = Driver::at(queue, 1);
                    let slot = ring + 4 + 2 * u64::from(driver.added[queue] % SIZE);
                    driver.memory.write_obj(index, GuestAddress(slot)).unwrap();
                    driver.added[queue] = driver.added[queue].wrapping_add(count);
                    driver.memory.write_obj(driver.added[queue], GuestAddress(ring + 2)).unwrap();
                }
                Act::Buffers(count) => driver.give(count),
                Act::ShortBuffer(len) => driver.add(RX, RX_AT, len, true),
                Act::Program(what) => programs.act(&path, what),
                Act::Reset => {
                    driver.start();
                    driver.added = [0; 3];
                    for queue in 0..3 {
                        driver.memory.write_slice(&[0; 0x1000], GuestAddress(Driver::at(queue, 1))).unwrap();
                        driver.memory.write_slice(&[0; 0x1000], GuestAddress(Driver::at(queue, 2))).unwrap();
                    }
                }
            }
            driver.device.look_at_all();
            let status = driver.status();
            prop_assert!(status == 15 || status == 15 | 64, "{status}");
        }
        let live = driver.count("conns_added") - driver.count("conns_removed");
        prop_assert!(live <= table::CONNECTIONS_MAX as u64);
        let mut page = [1; 4096];
        driver.memory.read_slice(&mut page, untouched).unwrap();
        prop_assert_eq!(page, [0; 4096]);
        drop(programs);
        driver.run();
        driver.device.quiesce();
        driver.device.save().unwrap();
    }
}
