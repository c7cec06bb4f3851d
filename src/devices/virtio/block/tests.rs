//! The block device behind the real transport, against drivers that follow the specification and drivers that do not.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::devices::virtio::testing::{BUFFERS, Driver, RAM};
use crate::devices::virtio::{BucketLimit, MmioDevice};

const BYTES: u64 = 64 * SECTOR;
const ENGINES: [Engine; 2] = [Engine::Sync, Engine::Async];
/// Header and status of the only request in flight; the data begins at `DATA`.
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x20;
const DATA: u64 = BUFFERS + 0x1000;

struct Fixture {
    _dir: TempDir,
    path: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        Fixture::with_len(BYTES)
    }

    fn with_len(len: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let file = File::create(&path).unwrap();
        for sector in 0..len.div_ceil(SECTOR) {
            let end = SECTOR.min(len - sector * SECTOR) as usize;
            file.write_all_at(&[sector as u8 + 1; SECTOR as usize][..end], sector * SECTOR).unwrap();
        }
        Fixture { _dir: dir, path }
    }

    fn params(&self, engine: Engine) -> BlockParams {
        let path = self.path.clone();
        let is_root = false;
        let partuuid = None;
        BlockParams { id: "disk".into(), path, read_only: false, writeback: true, engine, is_root, partuuid }
    }

    fn drive(&self, engine: Engine) -> Driver {
        Driver::start(Block::new(self.params(engine), RateLimits::default()).unwrap())
    }

    fn file(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.path).unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }
}

fn begin(driver: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32, bool)]) {
    driver.put(HEADER, &[kind.to_le_bytes(), [0; 4]].concat());
    driver.put(HEADER + 8, &sector.to_le_bytes());
    driver.put(STATUS, &[0xff]);
    let buffers = [&[(HEADER, 16, false)], data, &[(STATUS, 1, true)]].concat();
    driver.add(&buffers);
    driver.kick();
}

/// Does one request; returns its status and the number of bytes written.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
    begin(driver, kind, sector, data);
    let (_, written) = driver.wait_used();
    (driver.bytes(STATUS, 1)[0], written)
}

fn range(driver: &mut Driver, kind: u32, range: (u64, u32, u32)) -> u8 {
    driver.put(DATA, &range.0.to_le_bytes());
    driver.put(DATA + 8, &[range.1.to_le_bytes(), range.2.to_le_bytes()].concat());
    request(driver, kind, 0, &[(DATA, 16, false)]).0
}

#[test]
fn reads_and_writes_go_to_the_image_in_pieces_of_any_length() {
    for engine in ENGINES {
        let fixture = Fixture::new();
        let mut driver = fixture.drive(engine);
        assert_eq!(request(&mut driver, 0, 3, &[(DATA, 100, true), (DATA + 0x1000, 924, true)]), (0, 1025));
        assert_eq!(driver.bytes(DATA, 101), [vec![4; 100], vec![0]].concat());
        assert_eq!(driver.bytes(DATA + 0x1000, 924), [vec![4; 412], vec![5; 512]].concat());
        driver.put(DATA, &[0xaa; 700]);
        driver.put(DATA + 0x2000, &[0xbb; 324]);
        assert_eq!(request(&mut driver, 1, 62, &[(DATA, 700, false), (DATA + 0x2000, 324, false)]), (0, 1));
        assert_eq!(fixture.bytes()[62 * 512..], [vec![0xaa; 700], vec![0xbb; 324]].concat());
        assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
        assert_eq!(request(&mut driver, 0, 0, &[]), (0, 1), "nothing at all can be read");
        assert_eq!(driver.device.metrics()["write_bytes"], 1024);
    }
}

#[test]
fn pages_that_the_device_writes_are_marked() {
    for engine in ENGINES {
        let fixture = Fixture::new();
        let mut driver = fixture.drive(engine);
        let marks = |driver: &Driver| driver.memory.take_marks().next().unwrap();
        begin(&mut driver, 0, 0, &[(DATA + 0x800, 4096, true)]);
        driver.wait_used();
        let page = |address: u64| 1 << (address / 4096);
        let wanted = page(DATA) | page(DATA + 0x1000);
        assert_eq!(marks(&driver)[0] & wanted, wanted);
        // The test's own writes of header and status mark that page too; data that is only read is not marked.
        request(&mut driver, 1, 0, &[(DATA + 0x800, 4096, false)]);
        assert_eq!(marks(&driver)[0] & wanted, 0);
    }
}

#[test]
fn requests_beyond_the_end_or_of_no_whole_sectors_are_io_errors() {
    for engine in ENGINES {
        let fixture = Fixture::new();
        let mut driver = fixture.drive(engine);
        let before = fixture.bytes();
        for (kind, sector, len) in
            [(0, 64, 512), (1, 64, 512), (1, 63, 1024), (0, u64::MAX, 512), (1, u64::MAX / 512, 512), (1, 0, 511)]
        {
            assert_eq!(request(&mut driver, kind, sector, &[(DATA, len, kind == 0)]), (1, 1), "{kind} {sector} {len}");
        }
        assert_eq!(fixture.bytes(), before);
        assert_eq!(request(&mut driver, 7, 0, &[]).0, 2, "an unknown request");
        assert_eq!(driver.device.metrics()["invalid_reqs_count"], 7);
    }
}

#[test]
fn read_only_drive_says_so_and_refuses_writes() {
    let fixture = Fixture::new();
    let params = BlockParams { read_only: true, ..fixture.params(Engine::Sync) };
    let mut driver = Driver::start(Block::new(params.clone(), RateLimits::default()).unwrap());
    assert_eq!(driver.features() & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    assert_eq!(request(&mut driver, 1, 0, &[(DATA, 512, false)]).0, 1);
    assert_eq!(range(&mut driver, 11, (0, 8, 0)), 1);
    assert_eq!(request(&mut driver, 0, 0, &[(DATA, 512, true)]).0, 0);
    // Readers share an image; a writer does not.
    let second = Block::new(params, RateLimits::default()).unwrap();
    assert!(Block::new(fixture.params(Engine::Sync), RateLimits::default()).is_err());
    drop((driver, second));
    assert!(Block::new(fixture.params(Engine::Sync), RateLimits::default()).is_ok());
}

#[test]
fn flush_without_a_cache_to_flush_is_not_supported() {
    let fixture = Fixture::new();
    let params = BlockParams { writeback: false, ..fixture.params(Engine::Sync) };
    let mut driver = Driver::start(Block::new(params, RateLimits::default()).unwrap());
    assert_eq!(driver.features() & 1 << 9, 0);
    assert_eq!(request(&mut driver, 4, 0, &[]).0, 2);
}

#[test]
fn discard_and_write_zeroes_change_exactly_their_range() {
    for engine in ENGINES {
        let fixture = Fixture::new();
        let mut driver = fixture.drive(engine);
        for (kind, flags, sector) in [(11, 0, 8u64), (13, 1, 24), (13, 0, 40)] {
            let before = fixture.bytes();
            let status = range(&mut driver, kind, (sector, 8, flags));
            let mut wanted = before.clone();
            wanted[sector as usize * 512..][..4096].fill(0);
            // A file system without the operation gives an error; then nothing has changed.
            assert_eq!(fixture.bytes(), if status == 0 { wanted } else { before });
            assert!([0, 2].contains(&status), "{status}");
        }
        assert_eq!(range(&mut driver, 11, (0, 8, 1)), 2, "a discard has no flags");
        assert_eq!(range(&mut driver, 13, (0, 8, 2)), 2, "an unknown flag");
        assert_eq!(range(&mut driver, 11, (60, 8, 0)), 1, "beyond the end");
        assert_eq!(range(&mut driver, 13, (0, u32::MAX, 0)), 1, "more than the limit");
        assert_eq!(request(&mut driver, 11, 0, &[(DATA, 15, false)]).0, 1);
        assert_eq!(request(&mut driver, 11, 0, &[(DATA, 17 * 16, false)]).0, 1, "too many ranges");
        assert_eq!(request(&mut driver, 11, 0, &[]).0, 1);
    }
}

#[test]
fn id_is_the_serial_number() {
    let fixture = Fixture::new();
    let mut driver = fixture.drive(Engine::Sync);
    assert_eq!(request(&mut driver, 8, 0, &[(DATA, 20, true)]), (0, 21));
    assert_eq!(driver.bytes(DATA, 6), b"disk\0\0");
}

#[test]
fn image_cut_under_the_guest_gives_io_errors_and_is_not_made_longer_again() {
    for engine in ENGINES {
        let fixture = Fixture::new();
        let mut driver = fixture.drive(engine);
        fixture.file().set_len(10 * SECTOR + 100).unwrap();
        assert_eq!(request(&mut driver, 0, 9, &[(DATA, 512, true)]).0, 0);
        assert_eq!(request(&mut driver, 0, 10, &[(DATA, 512, true)]).0, 1);
        assert_eq!(request(&mut driver, 1, 20, &[(DATA, 512, false)]).0, 1);
        assert_eq!(range(&mut driver, 13, (0, 8, 0)), 1);
        assert_eq!(fixture.bytes().len() as u64, 10 * SECTOR + 100);
        fixture.file().set_len(BYTES).unwrap();
        assert_eq!(request(&mut driver, 1, 20, &[(DATA, 512, false)]).0, 0, "and it recovers");
    }
}

#[test]
fn full_device_gives_io_errors() {
    for engine in ENGINES {
        let fixture = Fixture::new();
        let mut block = Block::new(fixture.params(engine), RateLimits::default()).unwrap();
        // Writes to it fail with ENOSPC.
        let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        block.backing.replace_file_for_test(full);
        let mut driver = Driver::start(block);
        assert_eq!(request(&mut driver, 1, 0, &[(DATA, 512, false)]), (1, 1));
        assert_eq!(driver.device.metrics()["execute_fails"], 1);
    }
}

#[test]
fn images_that_cannot_be_a_drive_are_refused_with_the_reason() {
    let fixture = Fixture::with_len(511);
    let refused = |path: &Path| {
        let params = BlockParams { path: path.to_owned(), ..fixture.params(Engine::Sync) };
        Block::new(params, RateLimits::default()).err().unwrap().to_string()
    };
    assert!(refused(&fixture.path).ends_with("less than one sector of 512 bytes"));
    assert!(refused(Path::new("/dev/null")).ends_with("neither a file nor a block device"));
    assert!(refused(Path::new("/nonexistent")).starts_with("Cannot open /nonexistent for drive `disk`"));
    let fifo = fixture.path.with_extension("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    assert!(refused(&fifo).ends_with("neither a file nor a block device"));
    let odd = Fixture::with_len(BYTES + 100);
    let block = Block::new(odd.params(Engine::Sync), RateLimits::default()).unwrap();
    assert_eq!(block.bytes(), BYTES, "the end that is no whole sector is left out");
    let message = Block::new(odd.params(Engine::Sync), RateLimits::default()).err().unwrap().to_string();
    assert!(message.contains("another process has locked it"), "{message}");
}

#[test]
fn rate_limiter_leaves_requests_in_the_queue_until_its_timer() {
    for engine in ENGINES {
        let fixture = Fixture::new();
        let ops = Some(BucketLimit { size: 1, one_time_burst: 0, refill_time_ms: 50 });
        let limits = RateLimits { bandwidth: None, ops };
        let mut driver = Driver::start(Block::new(fixture.params(engine), limits).unwrap());
        let start = std::time::Instant::now();
        for _ in 0..4 {
            assert_eq!(request(&mut driver, 0, 0, &[(DATA, 512, true)]).0, 0);
        }
        assert!(start.elapsed().as_millis() >= 140, "three refills");
        driver.device.with_device(|block: &mut Block| {
            (block.change_limits(RateLimits { bandwidth: None, ops: Some(BucketLimit::default()) }), false)
        });
        for _ in 0..100 {
            request(&mut driver, 0, 0, &[(DATA, 512, true)]);
        }
        assert!(driver.device.metrics()["rate_limiter_throttled_events"].as_u64() >= Some(3));
    }
}

#[test]
fn many_requests_at_once_all_come_back_once() {
    for engine in ENGINES {
        let fixture = Fixture::new();
        let mut driver = fixture.drive(engine);
        for round in 0..50u64 {
            driver.put(HEADER, &[0; 16]);
            let mut heads: Vec<u16> = (0..21)
                .map(|i| driver.add(&[(HEADER, 16, false), (DATA + i * 4096, 4096, true), (STATUS + i, 1, true)]))
                .collect();
            driver.kick();
            while !heads.is_empty() {
                let (head, written) = driver.wait_used();
                let at = heads.iter().position(|other| *other == head).expect("a head that was given");
                heads.remove(at);
                assert_eq!(written, 4097, "{round}");
            }
            assert!(driver.used().is_none());
        }
    }
}

#[test]
fn quiesce_finishes_requests_in_flight_and_another_device_goes_on() {
    for engine in ENGINES {
        let fixture = Fixture::new();
        let mut driver = fixture.drive(engine);
        begin(&mut driver, 0, 5, &[(DATA, 512, true)]);
        driver.device.quiesce();
        assert_eq!(driver.used(), Some((0, 513)));
        // The device no longer serves the queue: the request waits for the restored device.
        begin(&mut driver, 0, 6, &[(DATA, 512, true)]);
        assert_eq!(driver.used(), None);
        let (_, bytes) = driver.device.save().unwrap();
        let state: BlockState = postcard::from_bytes(&bytes).unwrap();
        let busy = Block::restore(state.clone(), Image::Own).err().unwrap().to_string();
        assert!(busy.contains("another process has locked it"), "{busy}");
        let copy = fixture.path.with_extension("copy");
        std::fs::copy(&fixture.path, &copy).unwrap();
        let block = Block::restore(state, Image::Instead(&copy)).unwrap();
        assert_eq!(block.params().path, copy);
        let mut driver = driver.take_over(block);
        assert_eq!(driver.wait_used().1, 513);
        assert_eq!(driver.bytes(DATA, 1), [7]);
    }
}

#[test]
fn restore_refuses_an_image_that_changed_and_one_of_another_size() {
    let fixture = Fixture::new();
    let saved = {
        let block = Block::new(fixture.params(Engine::Sync), RateLimits::default()).unwrap();
        postcard::from_bytes::<BlockState>(&block.save().unwrap()).unwrap()
    };
    drop(Block::restore(saved.clone(), Image::Own).unwrap());
    fixture.file().write_all_at(&[9], 0).unwrap();
    let changed = Block::restore(saved.clone(), Image::Own).err().unwrap().to_string();
    assert!(changed.contains("was written to after the snapshot"), "{changed}");
    drop(Block::restore(saved.clone(), Image::Instead(&fixture.path)).unwrap());
    fixture.file().set_len(BYTES * 2).unwrap();
    for image in [Image::Own, Image::Instead(&fixture.path)] {
        let size = Block::restore(saved.clone(), image).err().unwrap().to_string();
        assert!(size.ends_with("the guest knows a disk of 32768 bytes, this one has 65536"), "{size}");
    }
}

#[test]
fn change_of_the_image_shows_in_the_configuration_and_a_bad_one_changes_nothing() {
    for engine in ENGINES {
        let fixture = Fixture::new();
        let larger = Fixture::with_len(BYTES * 2);
        let mut driver = fixture.drive(engine);
        let change = |driver: &Driver, path: &Path| {
            let work = |block: &mut Block| {
                let result = block.change_image(path);
                let changed = result.is_ok();
                (result, changed)
            };
            driver.device.with_device(work).unwrap()
        };
        let generation = driver.read_register(0xfc);
        assert!(change(&driver, Path::new("/nonexistent")).is_err());
        assert_eq!((driver.read_register(0x100), driver.read_register(0xfc)), (64, generation));
        change(&driver, &larger.path).unwrap();
        assert_eq!((driver.read_register(0x100), driver.read_register(0xfc)), (128, generation + 1));
        assert_eq!(driver.read_register(0x60) & 2, 2, "a configuration change interrupt");
        assert_eq!(request(&mut driver, 0, 100, &[(DATA, 512, true)]).0, 0);
        assert_eq!(driver.bytes(DATA, 1), [101]);
        // The same file again, grown meanwhile.
        larger.file().set_len(BYTES * 3).unwrap();
        change(&driver, &larger.path).unwrap();
        assert_eq!(driver.read_register(0x100), 192);
        // The old image is unlocked again.
        drop(Block::new(fixture.params(engine), RateLimits::default()).unwrap());
    }
}

#[test]
fn reset_with_requests_in_flight_leaves_memory_alone_afterwards() {
    for _ in 0..20 {
        let fixture = Fixture::new();
        let mut driver = fixture.drive(Engine::Async);
        begin(&mut driver, 0, 0, &[(DATA, 4096, true)]);
        driver.set_up();
        driver.put(DATA, &[0; 4096]);
        driver.device.look_at_all();
        assert_eq!(driver.bytes(DATA, 4096), [0; 4096]);
        assert_eq!(driver.used(), None);
        assert_eq!(request(&mut driver, 0, 0, &[(DATA, 512, true)]).0, 0);
    }
}

#[test]
fn chain_that_cannot_be_answered_breaks_the_device_until_it_is_reset() {
    for engine in ENGINES {
        let fixture = Fixture::new();
        let mut driver = fixture.drive(engine);
        let cut: [&[(u64, u32, bool)]; 4] = [
            &[(HEADER, 15, false), (STATUS, 1, true)],
            &[(HEADER, 16, false), (DATA, 512, false)],
            &[(DATA, 512, true), (HEADER, 16, false)],
            &[(HEADER, 16, false), (RAM as u64 - 1, 512, true), (STATUS, 1, true)],
        ];
        for chain in cut {
            driver.add(chain);
            driver.kick();
            assert_eq!(driver.read_register(0x70) & 64, 64, "{chain:?}");
            driver.set_up();
            assert_eq!(request(&mut driver, 0, 0, &[(DATA, 512, true)]).0, 0);
        }
    }
}

/// A drive whose reads stay in flight until something is written to the pipe that comes with it.
fn slow_drive(fixture: &Fixture) -> (Driver, File) {
    let mut block = Block::new(fixture.params(Engine::Async), RateLimits::default()).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    block.backing.replace_file_for_test(reader.into());
    (Driver::start(block), writer.into())
}

#[test]
fn quiesce_waits_for_a_slow_disk() {
    use std::io::Write;
    let fixture = Fixture::new();
    let (mut driver, mut disk) = slow_drive(&fixture);
    begin(&mut driver, 0, 0, &[(DATA, 512, true)]);
    driver.device.look_at_all();
    assert_eq!(driver.used(), None, "the disk has not answered");
    let answer = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        disk.write_all(&[0x5a; 512]).unwrap();
        disk
    });
    driver.device.quiesce();
    assert_eq!(driver.used(), Some((0, 513)), "answered, and nothing is in flight");
    assert_eq!((driver.bytes(DATA, 512), driver.bytes(STATUS, 1)), (vec![0x5a; 512], vec![0]));
    answer.join().unwrap();
}

#[test]
fn reset_waits_for_a_slow_disk_and_forgets_its_requests() {
    use std::io::Write;
    let fixture = Fixture::new();
    let (mut driver, mut disk) = slow_drive(&fixture);
    begin(&mut driver, 0, 0, &[(DATA, 512, true)]);
    disk.write_all(&[0x5a; 512]).unwrap();
    driver.set_up();
    driver.put(DATA, &[0; 512]);
    driver.device.look_at_all();
    assert_eq!((driver.used(), driver.bytes(DATA, 512)), (None, vec![0; 512]));
}

#[test]
fn more_requests_than_fit_in_flight_wait_in_the_queue() {
    use std::io::Write;
    let fixture = Fixture::new();
    let (mut driver, mut disk) = slow_drive(&fixture);
    driver.device.with_device(|block: &mut Block| {
        // All but two places are taken.
        let uring = block.uring.as_mut().unwrap();
        (uring.take_places_for_test(uring::DEPTH - 2), false)
    });
    for index in 0..5 {
        driver.put(HEADER, &[0; 16]);
        driver.add(&[(HEADER, 16, false), (DATA + index * 512, 512, true), (STATUS + index, 1, true)]);
    }
    driver.kick();
    assert_eq!(driver.device.metrics()["io_engine_throttled_events"], 1);
    disk.write_all(&[0x5a; 512 * 5]).unwrap();
    let mut heads: Vec<u16> = (0..5).map(|_| driver.wait_used().0).collect();
    heads.sort_unstable();
    assert_eq!(heads, [0, 3, 6, 9, 12]);
    assert_eq!(driver.bytes(DATA, 512 * 5), [0x5a; 512 * 5]);
}

/// Descriptors and ring entries as a hostile driver may write them, with likely values where they matter.
fn hostile() -> impl Strategy<Value = Vec<(u64, Vec<u8>)>> {
    let address = prop_oneof![
        Just(HEADER),
        Just(STATUS),
        Just(DATA),
        Just(0x1000u64),
        Just(RAM as u64 - 8),
        0..RAM as u64,
        any::<u64>()
    ];
    let len = prop_oneof![Just(0u32), Just(1), Just(16), Just(512), Just(513), 0u32..70_000, any::<u32>()];
    let descriptor = (0u64..64, address, len, 0u16..8, prop_oneof![0u16..64, any::<u16>()]);
    let descriptor = descriptor.prop_map(|(index, address, len, flags, next)| {
        let bytes =
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        (0x1000 + index * 16, bytes)
    });
    let header = (prop_oneof![0u32..16, any::<u32>()], prop_oneof![0u64..70, any::<u64>()]);
    let header =
        header.prop_map(|(kind, sector)| (HEADER, [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()));
    let available =
        (0u64..64, any::<u16>()).prop_map(|(at, head)| (0x2004 + at * 2, (head % 70).to_le_bytes().to_vec()));
    let index = (0u16..80).prop_map(|index| (0x2002, index.to_le_bytes().to_vec()));
    proptest::collection::vec(prop_oneof![6 => descriptor, 2 => header, 2 => available, 2 => index], 1..80)
}

proptest! {
    #[test]
    fn no_driver_makes_the_device_panic_hang_or_write_beyond_its_disk(writes in hostile(), asynchronous: bool) {
        let fixture = Fixture::new();
        let mut driver = fixture.drive(if asynchronous { Engine::Async } else { Engine::Sync });
        for (at, bytes) in writes {
            driver.put(at, &bytes);
            driver.kick();
            if driver.read_register(0x70) & 64 != 0 {
                driver.set_up();
            }
        }
        driver.device.quiesce();
        prop_assert_eq!(fixture.bytes().len() as u64, BYTES);
        driver.device.go_on();
        driver.set_up();
        prop_assert_eq!(request(&mut driver, 0, 0, &[(DATA, 512, true)]).0, 0, "the device lives");
    }

    #[test]
    fn no_saved_state_makes_a_drive_panic(at in 0usize..200, flip in 1u8..) {
        let fixture = Fixture::new();
        let saved = Block::new(fixture.params(Engine::Sync), RateLimits::default()).unwrap().save().unwrap();
        let mut bytes = saved;
        let at = at % bytes.len();
        bytes[at] ^= flip;
        if let Ok(state) = postcard::from_bytes::<BlockState>(&bytes)
            && let Ok(block) = Block::restore(state, Image::Instead(&fixture.path))
        {
            let memory = crate::devices::virtio::testing::memory();
            MmioDevice::new(Box::new(block), memory).unwrap().go_on();
        }
    }
}
