//! Tests on any device of this host with an IPv4 address: lent memory can be read, and nothing else can.

use std::fs::File;
use std::net::{IpAddr, Ipv6Addr};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rdma_mummy_sys::ibv_gid_entry;

use super::port::octets;
use super::queue_pair::addresses;
use super::*;
use crate::backends::cold::wire::Attached;

const LEN: u64 = 3 << 20;

/// An address of this host that a device has. Without one, prints the reason and returns `None`.
fn address() -> Option<IpAddr> {
    let addresses = devices().ok().into_iter().flat_map(|devices| {
        let tables = devices.iter().filter_map(|device| {
            let context = device.open().ok()?;
            addresses(&context).ok()
        });
        let mapped = |entry: ibv_gid_entry| Ipv6Addr::from(octets(&entry)).to_ipv4_mapped().map(IpAddr::V4);
        tables.flatten().filter_map(mapped).collect::<Vec<_>>()
    });
    let found = addresses.into_iter().next();
    if found.is_none() {
        crate::skip::skip!("rdma", "no RDMA device of this host has an IPv4 address (RoCE v2)");
    }
    found
}

fn byte(seed: u64, offset: u64) -> u8 {
    (offset.wrapping_mul(0x9e37_79b9).wrapping_add(seed) >> 13) as u8
}

/// A lent file of `LEN` bytes.
fn lent(port: &Port, seed: u64) -> Arc<Lent> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), (0..LEN).map(|offset| byte(seed, offset)).collect::<Vec<_>>()).unwrap();
    Arc::new(Lent::new(port, &File::open(file.path()).unwrap(), LEN).unwrap())
}

/// A reader of it, whose facts about it are changed by `lie`.
fn reader(port: &Port, address: IpAddr, lent: &Arc<Lent>, lie: impl Fn(Attached) -> Attached) -> (Reader, Loan) {
    let mut reader = Reader::new(port, 4).unwrap();
    let (loan, attached) = lent.lend(address, reader.endpoint()).unwrap();
    reader.connect(address, lie(attached)).unwrap();
    reader.prepare(4, 64 << 10).unwrap();
    (reader, loan)
}

/// The outcome of one read.
fn outcome(reader: &mut Reader, range: Range<u64>) -> Result<Vec<u8>, String> {
    let (_other, silent) = UnixStream::pair().unwrap();
    reader.begin(&range).map_err(|error| error.to_string())?;
    let waited = reader.wait(silent.as_fd(), Duration::from_secs(60)).map_err(|error| error.to_string())?;
    assert_eq!(waited, Waited::Read);
    let bytes = reader.bytes((range.end - range.start) as usize).unwrap().to_vec();
    reader.free();
    Ok(bytes)
}

#[test]
fn lent_file_is_read_in_the_order_of_the_reads_and_slots_are_not_reused_before() {
    let Some(address) = address() else { return };
    let port = Port::at(address).unwrap();
    let lent = lent(&port, 7);
    let (mut reader, _loan) = reader(&port, address, &lent, |truth| truth);
    let ranges: Vec<_> = (0..24_u64).map(|n| n * 99_991..n * 99_991 + 1 + n * 2_700).collect();
    let (_other, silent) = UnixStream::pair().unwrap();
    for four in ranges.chunks(4) {
        four.iter().for_each(|range| reader.begin(range).unwrap());
        assert!(reader.begin(&four[0]).is_err(), "there is no fifth slot");
        assert!(reader.prepare(1, 1).is_err(), "reads are under way");
        for range in four {
            while reader.wait(silent.as_fd(), Duration::from_secs(1)).unwrap() != Waited::Read {}
            let bytes = reader.bytes((range.end - range.start) as usize).unwrap();
            assert!(bytes.iter().zip(range.clone()).all(|(found, offset)| *found == byte(7, offset)), "{range:?}");
            reader.free();
        }
        assert!(reader.bytes(1).is_none());
    }
    for bad in [0..0, LEN - 1..LEN + 1, 0..(64 << 10) + 1, u64::MAX - 1..u64::MAX] {
        assert!(reader.begin(&bad).is_err(), "{bad:?}");
    }
    drop(silent);
    let (other, closed) = UnixStream::pair().unwrap();
    drop(other);
    assert_eq!(reader.wait(closed.as_fd(), Duration::from_secs(60)).unwrap(), Waited::Other);
}

#[test]
fn what_is_not_lent_to_a_reader_cannot_be_read() {
    let Some(address) = address() else { return };
    let port = Port::at(address).unwrap();
    let (lent, other) = (lent(&port, 1), lent(&port, 2));
    let another = other.lend(address, Reader::new(&port, 1).unwrap().endpoint()).unwrap().1;
    let lies: [&dyn Fn(Attached) -> Attached; 4] = [
        &|truth| Attached { len: u64::MAX - truth.address, ..truth },
        &|truth| Attached { key: truth.key ^ 1, ..truth },
        // The address of another object, with its own key.
        &|_| another,
        &|truth| Attached { address: truth.address - (1 << 20), ..truth },
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let (mut reader, _loan) =
            reader(&port, address, &lent, |truth| Attached { endpoint: truth.endpoint, ..lie(truth) });
        let range = if number == 0 { LEN - 100..LEN + 5000 } else { 0..100 };
        let said = outcome(&mut reader, range).unwrap_err();
        assert!(said.contains("permit") || said.contains("understand"), "lie {number}: {said}");
    }
}

#[test]
fn reader_whose_loan_has_ended_is_told_that_nobody_answers() {
    let Some(address) = address() else { return };
    let port = Port::at(address).unwrap();
    let lent = lent(&port, 3);
    let (mut reader, loan) = reader(&port, address, &lent, |truth| truth);
    assert_eq!(outcome(&mut reader, 5..6), Ok(vec![byte(3, 5)]));
    drop(loan);
    let said = outcome(&mut reader, 5..6).unwrap_err();
    assert!(said.contains("does not answer reads any more"), "{said}");
}
