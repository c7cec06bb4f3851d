//! The media of pools, by their names for users: a device-DAX device, a directory, a NUMA node.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

use super::numa;
use crate::snapshot::{HUGE_PAGE_SIZE, PAGE_SIZE, PRIVATE};
use crate::sys::shared_map::{SharedMap, make_huge};
use crate::sys::{locks, mempolicy};
use crate::tiering::pool::{Facts, Medium};

/// The file of a pool in a directory.
pub const POOL_FILE: &str = "pool.tvmm";
/// Magic numbers of file systems (statfs(2)).
const TMPFS: u64 = 0x0102_1994;
const HUGETLBFS: u64 = 0x9584_58f6;

/// The reason why a medium cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Cannot {doing} {path}", path = path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} is neither a directory nor a device-DAX device (/dev/daxX.Y) nor numa:N", path = path.display())]
    What { path: PathBuf },
    #[error(
        "There is no pool at {path}; make one with `tvmm pool create --at {path} --size GiB`",
        path = path.display()
    )]
    NoPool { path: PathBuf },
    #[error(
        "There is a pool at {path} already; to make it anew, remove {file} first",
        path = path.display(), file = file.display()
    )]
    Exists { path: PathBuf, file: PathBuf },
    #[error("Say with --size how large the pool in {path} is to be", path = path.display())]
    NoSize { path: PathBuf },
    #[error("{path} has {have} bytes, {want} were asked for", path = path.display())]
    TooSmall { path: PathBuf, have: u64, want: u64 },
    #[error("{path}: {problem}", path = path.display())]
    Dax { path: PathBuf, problem: String },
    #[error(transparent)]
    Numa(#[from] numa::Error),
}

impl Error {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
        let path = path.to_path_buf();
        move |source| Error::Io { doing, path, source }
    }
}

/// The place of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Dax(PathBuf),
    Dir(PathBuf),
    Numa(u32),
}

impl Place {
    fn of(name: &Path) -> Result<Place, Error> {
        if let Some(node) = name.to_str().and_then(|name| name.strip_prefix("numa:")) {
            let node = node.parse().map_err(|_| Error::What { path: name.to_path_buf() })?;
            return Ok(Place::Numa(node));
        }
        let metadata = fs::metadata(name).map_err(Error::io("look at", name))?;
        match metadata.file_type() {
            kind if kind.is_dir() => Ok(Place::Dir(name.to_path_buf())),
            kind if kind.is_char_device() => Ok(Place::Dax(name.to_path_buf())),
            _ => Err(Error::What { path: name.to_path_buf() }),
        }
    }
}

/// Bytes that are accessed by system calls, or by a mapping where those do not work.
#[derive(Debug)]
pub struct PoolMedium {
    name: PathBuf,
    file: File,
    len: u64,
    facts: Facts,
    map: Option<SharedMap>,
    /// The node that its pages are allocated on.
    node: Option<u32>,
    is_writable: bool,
    /// The directories that [`create`] made for it, the outermost first.
    made: Vec<PathBuf>,
}

/// The purpose of opening a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Look,
    /// Map its pages for a VM, under a lease. The lease of a device that other hosts share is written, so the device is
    /// opened for writing if permissions allow it; that of a file is a lock, for which reading is enough.
    Lease,
    /// Change its contents.
    Change,
}

impl Access {
    /// Opens a file or device of a pool. Returns it, and whether it can be written.
    fn open(self, path: &Path, is_device: bool) -> io::Result<(File, bool)> {
        let read_only = || File::open(path).map(|file| (file, false));
        match (self, File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC)) {
            (Access::Change, options) => Ok((options.open(path)?, true)),
            (Access::Lease, options) if is_device => match options.open(path) {
                Err(error) if is_refusal(&error) => read_only(),
                opened => Ok((opened?, true)),
            },
            _ => read_only(),
        }
    }
}

fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

/// A file or directory that the user of a pool needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeededFile {
    pub path: PathBuf,
    /// True if a lease is written there.
    pub is_written: bool,
}

/// The files and directories that a VM needs to map the pages of a pool under a lease.
///
/// # Errors
/// [`Error::What`] or [`Error::NoPool`].
pub fn files(name: &Path) -> Result<Vec<NeededFile>, Error> {
    let read = |path: PathBuf| NeededFile { path, is_written: false };
    Ok(match Place::of(name)? {
        Place::Dir(dir) => vec![read(dir)],
        Place::Numa(node) => match numa::mounted(node)? {
            Some(dir) => vec![read(dir)],
            None => return Err(Error::NoPool { path: name.to_path_buf() }),
        },
        Place::Dax(device) => {
            let sysfs = ["/sys/dev/char", "/sys/devices", "/sys/bus/dax", "/sys/class/dax"];
            let device = NeededFile { path: device, is_written: true };
            sysfs.map(|path| read(path.into())).into_iter().chain([device]).collect()
        }
    })
}

/// Opens the medium of an existing pool.
///
/// # Errors
/// [`Error::NoPool`] if there can be none; errors of the host.
pub fn open(name: &Path, access: Access) -> Result<PoolMedium, Error> {
    match Place::of(name)? {
        Place::Dax(device) => open_dax(name, &device, access),
        Place::Dir(dir) => open_dir(name, &dir, None, access),
        Place::Numa(node) => match numa::mounted(node)? {
            Some(dir) => open_dir(name, &dir, Some(node), access),
            None => Err(Error::NoPool { path: name.to_path_buf() }),
        },
    }
}

/// Makes the medium of a new pool, and its directory if it does not exist; the caller formats it. `size` in bytes is
/// required unless it is a device.
///
/// # Errors
/// [`Error::Exists`], [`Error::NoSize`], [`Error::TooSmall`]; errors of the host.
pub fn create(name: &Path, size: Option<u64>) -> Result<PoolMedium, Error> {
    let path = || name.to_path_buf();
    let place = match Place::of(name) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound && may_be_made(name) => {
            let size = size.ok_or_else(|| Error::NoSize { path: path() })?;
            let made = make_dirs(name)?;
            return match create_in(name, name, size, None) {
                Ok(medium) => Ok(PoolMedium { made, ..medium }),
                Err(error) => {
                    remove_dirs(&made);
                    Err(error)
                }
            };
        }
        place => place?,
    };
    match place {
        Place::Dax(device) => {
            let mut medium = open_dax(name, &device, Access::Change)?;
            let want = size.unwrap_or(medium.len);
            if want > medium.len {
                return Err(Error::TooSmall { path: path(), have: medium.len, want });
            }
            medium.len = want;
            Ok(medium)
        }
        Place::Dir(dir) => create_in(name, &dir, size.ok_or_else(|| Error::NoSize { path: path() })?, None),
        Place::Numa(node) => {
            let size = size.ok_or_else(|| Error::NoSize { path: path() })?;
            create_in(name, &numa::mount(node, size)?, size, Some(node))
        }
    }
}

/// Returns whether a missing name can be made as a directory: devices and URLs cannot.
fn may_be_made(name: &Path) -> bool {
    name.parent() != Some(Path::new("/dev")) && !name.to_string_lossy().contains("://")
}

/// Makes a directory and its missing parents. Returns those it made, the outermost first.
fn make_dirs(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let is_missing = |dir: &&Path| !dir.as_os_str().is_empty() && dir.symlink_metadata().is_err();
    let mut made: Vec<PathBuf> = dir.ancestors().take_while(is_missing).map(Path::to_path_buf).collect();
    made.reverse();
    fs::create_dir_all(dir).map_err(Error::io("make", dir)).inspect_err(|_| remove_dirs(&made))?;
    Ok(made)
}

/// Removes directories made for a pool that failed. Directories that other processes have used meanwhile stay.
fn remove_dirs(made: &[PathBuf]) {
    for dir in made.iter().rev() {
        let _ = fs::remove_dir(dir);
    }
}

/// The text by which the user confirms that the medium is formatted whatever is on it.
pub fn format_name(name: &Path) -> String {
    name.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

fn create_in(name: &Path, dir: &Path, size: u64, node: Option<u32>) -> Result<PoolMedium, Error> {
    let path = dir.join(POOL_FILE);
    let size = size / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE;
    let making = || Error::io("make", &path);
    let made = File::options().read(true).write(true).create_new(true).mode(PRIVATE).open(&path);
    let file = match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(Error::Exists { path: name.to_path_buf(), file: path });
        }
        made => made.map_err(making())?,
    };
    let sized = file.set_len(size).and_then(|()| match magic(&file)? {
        // Reserved now: a page that is missing at a later touch would kill the process.
        HUGETLBFS => Ok(rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size)?),
        _ => Ok(()),
    });
    if let Err(error) = sized {
        // Best effort: the file is not needed any more.
        let _ = fs::remove_file(&path);
        return Err(making()(error));
    }
    open_dir(name, dir, node, Access::Change)
}

fn magic(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::fstatfs(file)?.f_type as u64)
}

fn open_dir(name: &Path, dir: &Path, node: Option<u32>, access: Access) -> Result<PoolMedium, Error> {
    let path = dir.join(POOL_FILE);
    let (file, is_writable) = match access.open(&path, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::NoPool { path: name.to_path_buf() });
        }
        opened => opened.map_err(Error::io("open", &path))?,
    };
    let metadata = file.metadata().map_err(Error::io("inspect", &path))?;
    if !metadata.is_file() {
        return Err(Error::NoPool { path: name.to_path_buf() });
    }
    let magic = magic(&file).map_err(Error::io("inspect", &path))?;
    let len = metadata.len();
    let hugetlb = magic == HUGETLBFS;
    let facts = Facts {
        kind: if node.is_some() { "numa" } else { "dir" },
        align: if hugetlb { HUGE_PAGE_SIZE } else { PAGE_SIZE },
        // A copy would take a huge page that is not reserved; without a free one the guest would be killed.
        copy_on_write: !hugetlb,
        huge: hugetlb || mounted_huge(metadata.dev(), magic == TMPFS),
        readable: true,
        shared_between_hosts: false,
    };
    let map = hugetlb.then(|| SharedMap::new(&file, len, is_writable)).transpose().map_err(Error::io("map", &path))?;
    Ok(PoolMedium { name: name.to_path_buf(), file, len, facts, map, node, is_writable, made: Vec::new() })
}

/// Returns whether the file system with this device number consists of huge pages: a tmpfs mounted so (`huge=` of
/// tmpfs(5)), or one on persistent memory (`dax`). Other file systems promise nothing about the folios of their page
/// cache.
fn mounted_huge(device: u64, is_tmpfs: bool) -> bool {
    let wanted = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut mounts = mounts.lines().filter(|line| line.split(' ').nth(2) == Some(&wanted));
    mounts.any(|line| {
        if is_tmpfs { line.contains("huge=always") || line.contains("huge=within_size") } else { line.contains(",dax") }
    })
}

/// Opens a device-DAX device: its properties in sysfs, and a mapping of all of it.
fn open_dax(name: &Path, device: &Path, access: Access) -> Result<PoolMedium, Error> {
    let bad = |problem: String| Error::Dax { path: name.to_path_buf(), problem };
    let number = fs::metadata(device).map_err(Error::io("look at", device))?.rdev();
    let sysfs = PathBuf::from(format!("/sys/dev/char/{}:{}", rustix::fs::major(number), rustix::fs::minor(number)));
    let is_dax = fs::canonicalize(sysfs.join("subsystem")).is_ok_and(|subsystem| subsystem.ends_with("dax"));
    if !is_dax {
        return Err(bad("it is a character device, but no device-DAX".to_string()));
    }
    let attribute = |attribute: &str| {
        let text =
            fs::read_to_string(sysfs.join(attribute)).map_err(Error::io("read the size and alignment of", device))?;
        text.trim().parse::<u64>().map_err(|_| bad(format!("its {attribute} is {:?}", text.trim())))
    };
    let len = attribute("size")?;
    let align = attribute("align")?;
    if !align.is_power_of_two() || !(PAGE_SIZE..=HUGE_PAGE_SIZE).contains(&align) {
        return Err(bad(format!("its alignment is {align} bytes; tvmm maps 4 KiB and 2 MiB")));
    }
    let (file, is_writable) = access.open(device, true).map_err(Error::io("open", device))?;
    let map = SharedMap::new(&file, len, is_writable).map_err(Error::io("map", device))?;
    let facts =
        Facts { kind: "dax", align, copy_on_write: false, huge: true, readable: false, shared_between_hosts: true };
    Ok(PoolMedium {
        name: name.to_path_buf(),
        file,
        len,
        facts,
        map: Some(map),
        node: None,
        is_writable,
        made: Vec::new(),
    })
}

impl PoolMedium {
    /// Removes what [`create`] made, after formatting it has failed.
    pub fn abandon(&self) {
        if let Ok(Place::Dir(dir)) = Place::of(&self.name) {
            // A file that stays is marked as no pool.
            let _ = fs::remove_file(dir.join(POOL_FILE));
        }
        remove_dirs(&self.made);
    }

    /// Makes whole blocks huge pages if the medium should consist of them.
    fn settle(&self, offset: u64, len: u64) -> io::Result<()> {
        let start = offset.next_multiple_of(HUGE_PAGE_SIZE);
        let end = (offset + len) / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE;
        if !self.facts.huge || magic(&self.file)? != TMPFS || start >= end {
            return Ok(());
        }
        let small = make_huge(&self.file, start, end - start)?;
        if small > 0 {
            let pool = self.name.display();
            tracing::warn!(
                %pool, blocks = small, "The host has no memory in one piece for 2 MiB pages: blocks stay in small pages"
            );
        }
        Ok(())
    }
}

impl Medium for PoolMedium {
    fn path(&self) -> &Path {
        &self.name
    }

    fn facts(&self) -> Facts {
        self.facts
    }

    fn size(&self) -> u64 {
        self.len
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        match &self.map {
            Some(map) => {
                if self.facts.shared_between_hosts {
                    map.flush_lines(offset, bytes.len() as u64)?;
                }
                map.read(offset, bytes)
            }
            None => self.file.read_exact_at(bytes, offset),
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // Bound by this thread's policy: a policy of the mount would also hold for the pages that guests copy on write.
        let _bound = self.node.map(mempolicy::bind).transpose()?;
        match &self.map {
            Some(map) => map.write(offset, bytes),
            None => self.file.write_all_at(bytes, offset),
        }
    }

    fn flush(&self, offset: u64, len: u64) -> io::Result<()> {
        match &self.map {
            Some(map) => map.flush_lines(offset, len),
            None => {
                self.settle(offset, len)?;
                Ok(rustix::fs::fdatasync(&self.file)?)
            }
        }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // Reserved memory is not given back: hugetlbfs must have it at the next write.
        if self.map.is_some() {
            return Ok(());
        }
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, how, offset, len) {
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    fn is_writable(&self) -> bool {
        self.is_writable
    }

    fn try_lock_shared(&self, byte: u64) -> io::Result<bool> {
        locks::try_lock_shared(&self.file, byte)
    }

    fn locked_in(&self, bytes: &Range<u64>) -> io::Result<Option<u64>> {
        locks::locked_in(&self.file, bytes)
    }

    fn try_lock(&self, byte: u64) -> io::Result<bool> {
        locks::try_lock(&self.file, byte)
    }

    fn unlock(&self, byte: u64) -> io::Result<()> {
        locks::unlock(&self.file, byte)
    }

    fn is_locked(&self, byte: u64) -> io::Result<bool> {
        locks::is_locked(&self.file, byte)
    }
}
