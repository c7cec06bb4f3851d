//! A file whose reads can be made to hang, to wait or to fail: a file system of one file, served by the test through
//! /dev/fuse (Linux `include/uapi/linux/fuse.h`), mounted over the file it shows. And a disk that is such a file.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::fs::Advice;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::skip::skip;
use super::text;

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
/// Reads of the page cache do not hold up each other.
const ASYNC_READ: u32 = 1;
/// Opening does not wait for reads of others that hang, which not even SIGKILL could end.
const KEEP_CACHE: u64 = 1 << 1;
const HEADER: usize = 40;
/// `struct fuse_write_in`, which the bytes to write follow.
const WRITE_HEAD: usize = 40;
const EIO: i32 = 5;
const ENOSYS: i32 = 38;

/// A read of the file.
#[derive(Clone, Copy)]
struct ReadRequest {
    unique: u64,
    offset: u64,
    len: usize,
}

/// Reads that wait.
#[derive(Default)]
struct Held {
    /// Reads that begin before this offset wait.
    below: u64,
    requests: Vec<ReadRequest>,
}

/// Tells which reads of the file hang, which wait and which fail.
struct Fate {
    held: Mutex<Held>,
    hangs: AtomicBool,
    /// The number of reads that are still answered before all others fail.
    good: AtomicU64,
}

impl Fate {
    /// Returns whether the read has to wait for [`SlowFile::let_go`].
    fn holds(&self, read: ReadRequest) -> bool {
        let mut held = self.held.lock().unwrap();
        let waits = read.offset < held.below;
        if waits {
            held.requests.push(read);
        }
        waits
    }

    fn fails(&self) -> bool {
        self.good.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |good| good.checked_sub(1)).is_err()
    }
}

/// The mounted file. Dropping it unmounts, which ends every read that hangs.
pub struct SlowFile {
    path: PathBuf,
    fate: Arc<Fate>,
    device: File,
    below: File,
    thread: Option<JoinHandle<()>>,
}

impl SlowFile {
    /// Mounts over `path`, which keeps its bytes. `None`, with the reason printed, where this user may not.
    pub fn over(path: &Path) -> Option<SlowFile> {
        let below = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let device = match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                skip!("fuse", "/dev/fuse cannot be opened: {error}");
                return None;
            }
        };
        let options = format!("fd={},rootmode=100644,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let options = std::ffi::CString::new(options).unwrap();
        if let Err(error) = mount("tvmm-test", path, "fuse", MountFlags::NOSUID, Some(options.as_c_str())) {
            skip!("fuse", "a FUSE file system cannot be mounted: {error}");
            return None;
        }
        let held = Mutex::new(Held::default());
        let fate = Arc::new(Fate { held, hangs: AtomicBool::new(false), good: AtomicU64::new(u64::MAX) });
        let thread = std::thread::spawn({
            let fate = fate.clone();
            let device = device.try_clone().unwrap();
            let below = below.try_clone().unwrap();
            move || serve(device, &below, &fate)
        });
        Some(SlowFile { path: path.to_owned(), fate, device, below, thread: Some(thread) })
    }

    /// From now on, reads that begin before `offset` and are not in the page cache wait.
    pub fn hold_below(&self, offset: u64) {
        self.fate.held.lock().unwrap().below = offset;
    }

    /// The number of reads that wait.
    pub fn held(&self) -> usize {
        self.fate.held.lock().unwrap().requests.len()
    }

    /// Answers the reads that wait, and all later ones.
    pub fn let_go(&self) {
        let held = std::mem::take(&mut *self.fate.held.lock().unwrap());
        held.requests.into_iter().for_each(|read| reply(&self.device, read.unique, Ok(bytes_of(&self.below, read))));
    }

    /// From now on, what is not in the page cache cannot be read.
    pub fn hang(&self) {
        self.fate.hangs.store(true, Ordering::SeqCst);
    }

    /// After so many reads (of up to 128 KiB each), what is not in the page cache cannot be read: EIO.
    pub fn fail_after(&self, reads: u64) {
        self.fate.good.store(reads, Ordering::SeqCst);
    }
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        let _ = unmount(&self.path, UnmountFlags::FORCE | UnmountFlags::DETACH);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A file system of its own on a [`SlowFile`].
pub struct SlowDisk {
    /// Dropped first: then no read of the disk hangs.
    slow: Option<SlowFile>,
    image: PathBuf,
    at: PathBuf,
}

impl SlowDisk {
    /// Makes one of `mib` MiB below `dir`. `None`, with the reason printed, where there are no tools for it or this
    /// user may not mount.
    pub fn new(dir: &Path, mib: u64) -> Option<SlowDisk> {
        let image = dir.join("slow.img");
        let at = dir.join("slow");
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        std::fs::create_dir(&at).unwrap();
        let works = |program: &str, args: &[&str]| {
            let done = Command::new(program).args(args).output();
            let works = done.as_ref().is_ok_and(|done| done.status.success());
            if !works {
                skip!("loop", "a file system cannot be made and mounted ({program}): {done:?}");
            }
            works
        };
        if !works("mkfs.ext4", &["-q", "-F", text(&image)]) {
            return None;
        }
        let slow = SlowFile::over(&image)?;
        if !works("mount", &["-o", "loop", text(&image), text(&at)]) {
            return None;
        }
        Some(SlowDisk { slow: Some(slow), image, at })
    }

    pub fn path(&self) -> &Path {
        &self.at
    }

    pub fn reads(&self) -> &SlowFile {
        self.slow.as_ref().unwrap()
    }

    /// Lets all reads that hang and all later ones fail.
    pub fn give_up(&mut self) {
        self.slow = None;
    }

    /// Takes a file of it out of the page cache, so that it is read again.
    pub fn uncache(&self, file: &File) {
        for file in [file, &File::open(&self.image).unwrap()] {
            rustix::fs::fdatasync(file).unwrap();
            rustix::fs::fadvise(file, 0, None, Advice::DontNeed).unwrap();
        }
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        self.slow = None;
        let _ = unmount(&self.at, UnmountFlags::DETACH);
    }
}

/// Answers requests until the file system is unmounted.
fn serve(device: File, below: &File, fate: &Fate) {
    let metadata = below.metadata().unwrap();
    let mut request = vec![0; 1 << 20];
    while let Ok(len) = (&device).read(&mut request) {
        let number = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().unwrap());
        assert!(len >= HEADER);
        let opcode = number(4);
        let unique = long(8);
        let read = || ReadRequest { unique, offset: long(HEADER + 8), len: number(HEADER + 16) as usize };
        let answer = match opcode {
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            READ if fate.hangs.load(Ordering::SeqCst) => continue,
            READ if fate.holds(read()) => continue,
            READ if fate.fails() => Err(EIO),
            READ => Ok(bytes_of(below, read())),
            WRITE => Ok(write_to(below, long(HEADER + 8), &request[HEADER + WRITE_HEAD..len])),
            INIT => Ok(init(number(HEADER + 4), number(HEADER + 12))),
            GETATTR => Ok(attributes(&metadata)),
            OPEN => Ok([0, KEEP_CACHE].into_iter().flat_map(u64::to_le_bytes).collect()),
            RELEASE | FLUSH => Ok(Vec::new()),
            _ => Err(ENOSYS),
        };
        reply(&device, unique, answer);
    }
}

fn bytes_of(file: &File, read: ReadRequest) -> Vec<u8> {
    let mut bytes = vec![0; read.len];
    let len = file.read_at(&mut bytes, read.offset).unwrap();
    bytes.truncate(len);
    bytes
}

/// Writes, and returns `struct fuse_write_out`.
fn write_to(file: &File, offset: u64, bytes: &[u8]) -> Vec<u8> {
    file.write_all_at(bytes, offset).unwrap();
    (bytes.len() as u64).to_le_bytes().to_vec()
}

fn reply(mut device: &File, unique: u64, answer: Result<Vec<u8>, i32>) {
    let (error, body) = match answer {
        Ok(body) => (0, body),
        Err(errno) => (-errno, Vec::new()),
    };
    let mut reply = ((16 + body.len()) as u32).to_le_bytes().to_vec();
    reply.extend(i32::to_le_bytes(error));
    reply.extend(unique.to_le_bytes());
    reply.extend(body);
    // A request that was given up meanwhile has no reader.
    let _ = device.write_all(&reply);
}

/// `struct fuse_init_out`.
fn init(minor: u32, offered: u32) -> Vec<u8> {
    let words = [7, minor.min(31), 128 << 10, offered & ASYNC_READ, 16 << 16 | 12, 128 << 10, 1];
    let mut body: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    body.resize(64, 0);
    body
}

/// `struct fuse_attr_out`, valid for an hour.
fn attributes(metadata: &Metadata) -> Vec<u8> {
    let mut body: Vec<u8> = [3600u64, 0].into_iter().flat_map(u64::to_le_bytes).collect();
    let times = [metadata.atime(), metadata.mtime(), metadata.ctime()].map(|seconds| seconds as u64);
    let longs = [1, metadata.size(), metadata.blocks(), times[0], times[1], times[2]];
    body.extend(longs.into_iter().flat_map(u64::to_le_bytes));
    let parts = [metadata.atime_nsec(), metadata.mtime_nsec(), metadata.ctime_nsec()].map(|part| part as u32);
    let words = [parts[0], parts[1], parts[2], metadata.mode(), 1, metadata.uid(), metadata.gid(), 0, 4096, 0];
    body.extend(words.into_iter().flat_map(u32::to_le_bytes));
    body
}
