//! Pmem devices against files and drivers of every kind.

use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::BucketLimit;
use crate::devices::virtio::testing::{BUFFERS, Driver};

fn params(path: &Path, read_only: bool) -> PmemParams {
    PmemParams { id: "image".into(), path: path.into(), read_only, is_root: false, gpa: 4 << 30 }
}

fn file(len: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

fn flush(driver: &mut Driver, request: &[u8]) -> Option<u32> {
    driver.put(BUFFERS, request);
    driver.put(BUFFERS + 0x100, &[0xff; 4]);
    driver.add(&[(BUFFERS, request.len() as u32, false), (BUFFERS + 0x100, 4, true)]);
    driver.kick();
    driver.used().map(|_| u32::from_le_bytes(driver.bytes(BUFFERS + 0x100, 4).try_into().unwrap()))
}

fn refused(result: Result<Pmem, Error>) -> String {
    let Err(error) = result else { panic!("it should be refused") };
    error.to_string()
}

#[test]
fn guest_learns_of_place_and_size_and_flushes_are_answered() {
    let file = file(5000);
    let mut driver = Driver::start(Pmem::new(params(file.path(), false), RateLimits::default()).unwrap());
    let config = [0, 4, 8, 12].map(|at| driver.read_register(0x100 + at));
    assert_eq!(config, [0, 1, 2 << 20, 0], "4 GiB, and whole 2 MiB");
    assert_eq!(flush(&mut driver, &[0; 4]), Some(DONE));
    assert_eq!(flush(&mut driver, &[1, 0, 0, 0]), Some(FAILED), "there is no such request");
    assert_eq!(flush(&mut driver, &[0; 3]), Some(FAILED), "it is too short");
    assert_eq!(driver.device.metrics()["flush_count"], 1);
    driver.add(&[(BUFFERS, 4, false)]);
    driver.kick();
    assert_eq!(driver.read_register(0x70) & 64, 64, "there is no room for an answer");
}

#[test]
fn flush_beyond_the_limit_waits() {
    let file = file(4096);
    let ops = Some(BucketLimit { size: 1, one_time_burst: 0, refill_time_ms: 100 });
    let pmem = Pmem::new(params(file.path(), true), RateLimits { bandwidth: None, ops }).unwrap();
    let mut driver = Driver::start(pmem);
    assert_eq!(flush(&mut driver, &[0; 4]), Some(DONE));
    assert_eq!(flush(&mut driver, &[0; 4]), None);
    driver.wait_used();
    assert_eq!(driver.device.metrics()["rate_limiter_throttled_events"], 1);
}

#[test]
fn images_that_cannot_be_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (path, what) in [(dir.path().join("none"), "Cannot open"), (dir.path().to_owned(), "it is no file")] {
        let said = refused(Pmem::new(params(&path, true), RateLimits::default()));
        assert!(said.contains(what) && said.contains("`image`") && said.contains(path.to_str().unwrap()), "{said}");
    }
    for (len, what) in [(0, "it is empty"), (LEN_MAX + 1, "larger than 1 TiB")] {
        let file = file(0);
        // Not every file system has files this long.
        if file.as_file().set_len(len).is_ok() {
            let said = refused(Pmem::new(params(file.path(), true), RateLimits::default()));
            assert!(said.contains(what), "{said}");
        }
    }
}

const LEN_MAX: u64 = 1 << 40;

#[test]
fn readers_share_an_image_and_a_writer_has_it_for_itself() {
    let file = file(4096);
    let open = |read_only| Pmem::new(params(file.path(), read_only), RateLimits::default());
    let first = open(true).unwrap();
    let second = open(true).unwrap();
    assert!(refused(open(false)).contains("locked"));
    drop((first, second));
    let writer = open(false).unwrap();
    assert!(refused(open(true)).contains("locked") && refused(open(false)).contains("locked"));
    drop(writer);
    open(true).unwrap();
}

#[test]
fn restored_device_wants_the_image_as_it_was_unless_another_is_named() {
    let file = file(8192);
    let pmem = Pmem::new(params(file.path(), true), RateLimits::default()).unwrap();
    let state: PmemState = postcard::from_bytes(&pmem.save().unwrap()).unwrap();
    assert_eq!(state.size(), 2 << 20);
    drop(pmem);
    let restored = Pmem::restore(state.clone(), None).unwrap();
    assert_eq!(restored.params(), &params(file.path(), true));
    drop(restored);
    // A file system's clock may be coarse.
    std::thread::sleep(std::time::Duration::from_millis(20));
    file.as_file().write_all_at(b"x", 0).unwrap();
    assert!(refused(Pmem::restore(state.clone(), None)).contains("it was written since"));
    Pmem::restore(state.clone(), Some(file.path())).unwrap();
    file.as_file().set_len(4096).unwrap();
    for instead in [None, Some(file.path())] {
        let said = refused(Pmem::restore(state.clone(), instead));
        assert!(said.contains("it has 4096 bytes, in the snapshot it had 8192"), "{said}");
    }
}

proptest! {
    #[test]
    fn no_driver_makes_pmem_panic_or_hang(
        chains in proptest::collection::vec(
            proptest::collection::vec((prop_oneof![any::<u64>(), BUFFERS..BUFFERS + 0x1000], any::<u32>(),
            any::<bool>()), 0..5),
            1..30,
        ),
    ) {
        let file = file(4096);
        let mut driver = Driver::start(Pmem::new(params(file.path(), false), RateLimits::default()).unwrap());
        for chain in chains {
            driver.add(&chain.into_iter().map(|(at, len, write)| (at, len % 0x2000, write)).collect::<Vec<_>>());
            driver.kick();
            if driver.read_register(0x70) & 64 != 0 {
                driver.set_up();
            }
        }
        prop_assert_eq!(file.as_file().metadata().unwrap().len(), 4096);
    }
}
