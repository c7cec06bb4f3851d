//! Lost memory: mapped pages that cannot be read any more, because the file was cut, its disk fails, or the host's
//! memory is broken.
//!
//! The kernel has two answers. A thread of this process that touches such a page gets SIGBUS; a system call that works
//! on it, KVM_RUN included, fails with EFAULT (or EHWPOISON). A table lists every mapping of a file, so that both paths
//! find the same sentence: guest page, file, offset, and cause.
//!
//! ```text
//! thread touches page ─► SIGBUS ─► on_sigbus: reason, eventfd of the main loop ─► sleep until the process ends
//! KVM_RUN or read(2) ──► EFAULT ─► at_gpa: probe the page (MADV_POPULATE_READ) ─► reason ─► Ending::MemoryLost
//! ```
//!
//! The handler calls only functions that signal-safety(7) allows. It reads the tables without a lock; a table is freed
//! only while no handler reads one. A thread that has touched lost memory never goes on: other bytes would have unknown
//! effects.

use std::cell::UnsafeCell;
use std::fmt::{self, Write};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::handler_text::Text;
use super::terminal;
use crate::snapshot::{Extent, PAGE_SIZE};

/// The exit code of a process whose guest's memory was lost, or differs from the captured memory.
pub const EXIT_CODE: u8 = 3;

/// The first words of the message when a guest ends for a reason of the host's.
pub const CANNOT_GO_ON: &str = "The guest cannot go on";

/// Time for the main loop to take the reason, write its report and end the process.
const GRACE: Duration = Duration::from_secs(5);

/// Tables at once: guest RAM, pmem images, pools.
const SLOTS: usize = 128;

/// One mapping of a file.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// Host address and length in bytes.
    pub address: usize,
    pub len: usize,
    /// Index in the table's files, and offset in the file.
    pub file: usize,
    pub offset: u64,
    /// Guest-physical address, if the guest sees the mapping.
    pub gpa: Option<u64>,
}

/// A mapped file, kept open so that its length can be read.
#[derive(Debug)]
pub struct MappedFile {
    file: File,
    name: String,
}

impl MappedFile {
    pub fn new(file: &File, path: &Path) -> io::Result<Self> {
        Ok(MappedFile { file: file.try_clone()?, name: path.display().to_string() })
    }

    /// As [`new`](Self::new), for a file whose path only the kernel knows.
    pub fn unnamed(file: &File) -> io::Result<Self> {
        let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        MappedFile::new(file, &path)
    }
}

struct Table {
    files: Vec<MappedFile>,
    /// Ascending by address.
    mappings: Vec<Mapping>,
}

static TABLES: [AtomicPtr<Table>; SLOTS] = [const { AtomicPtr::new(null_mut()) }; SLOTS];
/// The number of threads that read tables now.
static READERS: AtomicUsize = AtomicUsize::new(0);
/// The eventfd of the main loop; -1: nothing listens.
static LISTENER: AtomicI32 = AtomicI32::new(-1);

static REASON: Reason = Reason { state: AtomicU8::new(Reason::NONE), text: UnsafeCell::new(Text::EMPTY) };

/// Mappings in the table, until dropped.
#[derive(Debug)]
pub struct Watched(usize);

/// Lists mappings of files. If all slots are taken, the mappings stay unlisted, and an error about them names no file.
pub fn watch(files: Vec<MappedFile>, mut mappings: Vec<Mapping>) -> Option<Watched> {
    mappings.sort_unstable_by_key(|mapping| mapping.address);
    let table = Box::into_raw(Box::new(Table { files, mappings }));
    let free =
        |slot: &AtomicPtr<Table>| slot.compare_exchange(null_mut(), table, Ordering::SeqCst, Ordering::Relaxed).is_ok();
    let slot = TABLES.iter().position(free);
    if slot.is_none() {
        // SAFETY: the pointer was just made from a box and is in no slot.
        drop(unsafe { Box::from_raw(table) });
    }
    slot.map(Watched)
}

impl Drop for Watched {
    fn drop(&mut self) {
        let table = TABLES[self.0].swap(null_mut(), Ordering::SeqCst);
        // Readers that came before the swap may still read the table; later ones do not find it. Reading takes
        // microseconds.
        while READERS.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
        if !table.is_null() {
            // SAFETY: `watch` made the pointer from a box; only this object takes it out of its slot, and no reader is
            // left.
            drop(unsafe { Box::from_raw(table) });
        }
    }
}

/// Looks into all tables; the first result counts. Safe in a signal handler if `find` is.
fn find_in_tables<T>(mut find: impl FnMut(&Table) -> Option<T>) -> Option<T> {
    READERS.fetch_add(1, Ordering::SeqCst);
    let found = TABLES.iter().find_map(|slot| {
        // SAFETY: a table in a slot is not freed while `READERS` counts this reader (see `Watched::drop`), and never
        // changes.
        unsafe { slot.load(Ordering::SeqCst).as_ref() }.and_then(&mut find)
    });
    READERS.fetch_sub(1, Ordering::SeqCst);
    found
}

/// The cause of a loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// The file ends before it.
    Cut { len: u64 },
    /// The page is a hole of a file on a tmpfs without free pages: even reading it needs one.
    NoSpace,
    /// Reading the file fails.
    Unreadable,
    /// The host's memory has a hardware error (hwpoison).
    Hardware,
}

/// A lost page.
struct Lost<'t> {
    name: &'t str,
    offset: u64,
    gpa: Option<u64>,
    cause: Cause,
}

impl Lost<'_> {
    fn describe(&self, out: &mut impl Write) -> fmt::Result {
        describe(out, self.gpa, self.name, self.offset, &self.cause)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Cut { len } => write!(out, "the file was cut to {len} bytes while it was in use"),
            Cause::NoSpace => out.write_str(
                "the tmpfs it lies on is full, where even reading a hole takes a page (ENOSPC); free some of it",
            ),
            Cause::Unreadable => out.write_str("its disk, or what serves the file, reports an error (EIO)"),
            Cause::Hardware => out.write_str("the host's memory has a hardware error there"),
        }
    }
}

/// Writes the sentence that every way to find lost memory uses.
fn describe(out: &mut impl Write, gpa: Option<u64>, name: &str, offset: u64, cause: &dyn fmt::Display) -> fmt::Result {
    match gpa {
        Some(gpa) => write!(out, "Cannot read guest memory at guest-physical {gpa:#x} from {name}")?,
        None => write!(out, "Cannot read {name}")?,
    }
    write!(out, " at offset {offset:#x}: {cause}. Restore again from an intact copy")
}

/// The cause of a failed read of a file, in the words of these messages.
pub fn cause_of(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the file was cut while it was in use".to_string(),
        _ => error.to_string(),
    }
}

/// The sentence for a page at `gpa` that cannot be read from `offset` of the file `name`.
pub fn sentence(gpa: u64, name: &Path, offset: u64, cause: &dyn fmt::Display) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = describe(&mut text, Some(gpa), &name.display().to_string(), offset, cause);
    text
}

impl Table {
    fn file(&self, mapping: &Mapping) -> Option<&MappedFile> {
        self.files.get(mapping.file)
    }

    fn name(&self, mapping: &Mapping) -> &str {
        self.file(mapping).map_or("", |file| &file.name)
    }

    /// The length of a mapping's file, if it is a regular one. Safe in a signal handler.
    fn file_len(&self, mapping: &Mapping) -> Option<u64> {
        let fd = self.file(mapping)?.file.as_raw_fd();
        let mut stat = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: the table keeps the descriptor open; the kernel fills the structure or fails.
        if unsafe { libc::fstat(fd, stat.as_mut_ptr()) } != 0 {
            return None;
        }
        // SAFETY: fstat(2) succeeded, so the structure is filled.
        let stat = unsafe { stat.assume_init() };
        (stat.st_mode & libc::S_IFMT == libc::S_IFREG).then_some(stat.st_size as u64)
    }

    /// True if a mapping's file lies on a tmpfs that has no page left. Safe in a signal handler.
    fn is_on_full_tmpfs(&self, mapping: &Mapping) -> bool {
        let Some(file) = self.file(mapping) else { return false };
        let mut stat = MaybeUninit::<libc::statfs>::uninit();
        // SAFETY: the table keeps the descriptor open; the kernel fills the structure or fails.
        if unsafe { libc::fstatfs(file.file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
            return false;
        }
        // SAFETY: fstatfs(2) succeeded, so the structure is filled.
        let stat = unsafe { stat.assume_init() };
        // A tmpfs without a limit has no blocks at all.
        stat.f_type == libc::TMPFS_MAGIC && stat.f_blocks > 0 && stat.f_bavail == 0
    }

    /// Describes the lost page at `address`.
    fn lost(&self, address: usize, is_hardware: bool) -> Option<Lost<'_>> {
        let at = self.mappings.partition_point(|mapping| mapping.address <= address).checked_sub(1)?;
        let mapping = &self.mappings[at];
        let inside = (address - mapping.address) / PAGE_SIZE as usize * PAGE_SIZE as usize;
        if inside >= mapping.len {
            return None;
        }
        let offset = mapping.offset + inside as u64;
        let cause = match self.file_len(mapping) {
            _ if is_hardware => Cause::Hardware,
            Some(len) if len <= offset => Cause::Cut { len },
            _ if self.is_on_full_tmpfs(mapping) => Cause::NoSpace,
            _ => Cause::Unreadable,
        };
        Some(Lost { name: self.name(mapping), offset, gpa: mapping.gpa.map(|gpa| gpa + inside as u64), cause })
    }

    /// The first page of guest memory behind the end of its file.
    fn first_cut(&self) -> Option<Lost<'_>> {
        self.mappings.iter().filter(|mapping| mapping.gpa.is_some()).find_map(|mapping| {
            let len = self.file_len(mapping)?;
            let first = len.next_multiple_of(PAGE_SIZE).max(mapping.offset);
            let inside = first - mapping.offset;
            (inside < mapping.len as u64).then(|| Lost {
                name: self.name(mapping),
                offset: first,
                gpa: mapping.gpa.map(|gpa| gpa + inside),
                cause: Cause::Cut { len },
            })
        })
    }

    fn address_of(&self, gpa: u64) -> Option<usize> {
        self.mappings.iter().find_map(|mapping| {
            let inside = gpa.checked_sub(mapping.gpa?)?;
            (inside < mapping.len as u64).then(|| mapping.address + inside as usize)
        })
    }
}

/// The reason why the page of guest memory at `gpa` is lost; `None` if it is not, or comes from no file.
pub fn at_gpa(gpa: u64) -> Option<String> {
    let address = find_in_tables(|table| table.address_of(gpa / PAGE_SIZE * PAGE_SIZE))?;
    // Outside of the tables, because it may take long.
    let is_hardware = match probe(address) {
        Some(libc::EFAULT) => false,
        Some(libc::EHWPOISON) => true,
        _ => return None,
    };
    find_in_tables(|table| table.lost(address, is_hardware).map(text_of))
}

/// As [`at_gpa`], for the first lost page of `extent`.
pub fn within(extent: Extent) -> Option<String> {
    (0..extent.pages).find_map(|page| at_gpa(extent.gpa() + page * PAGE_SIZE))
}

/// The reason why the first page of guest memory behind the end of its file is lost; `None` if there is no such page.
pub fn behind_an_end() -> Option<String> {
    find_in_tables(|table| table.first_cut().map(text_of))
}

fn text_of(lost: Lost<'_>) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = lost.describe(&mut text);
    text
}

/// The error of a touch of the page at `address`, if one fails (madvise(2), `MADV_POPULATE_READ`, Linux 5.14).
fn probe(address: usize) -> Option<i32> {
    let page = address as *mut libc::c_void;
    let len = PAGE_SIZE as usize;
    // SAFETY: populating for reading changes no contents of whatever is mapped there, and fails where nothing is.
    let result = unsafe { libc::madvise(page, len, libc::MADV_POPULATE_READ) };
    if result == 0 { None } else { io::Error::last_os_error().raw_os_error() }
}

/// The reason that the first handler found, written once.
struct Reason {
    state: AtomicU8,
    text: UnsafeCell<Text>,
}

// SAFETY: `text` is written only by the thread that moved `state` from NONE to BEING_WRITTEN, and read only once
// `state` is WRITTEN, after which it never changes.
unsafe impl Sync for Reason {}

impl Reason {
    const NONE: u8 = 0;
    const BEING_WRITTEN: u8 = 1;
    const WRITTEN: u8 = 2;

    /// Lets `write` write the reason, unless there is one. Returns whether this call did.
    fn set(&self, write: impl FnOnce(&mut Text)) -> bool {
        let none = Self::NONE;
        let writing = Self::BEING_WRITTEN;
        if self.state.compare_exchange(none, writing, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return false;
        }
        // SAFETY: this thread alone moved the state, see above.
        write(unsafe { &mut *self.text.get() });
        self.state.store(Self::WRITTEN, Ordering::SeqCst);
        true
    }

    fn get(&self) -> Option<&[u8]> {
        if self.state.load(Ordering::SeqCst) != Self::WRITTEN {
            return None;
        }
        // SAFETY: the text is written and does not change any more.
        let text = unsafe { &*self.text.get() };
        Some(text.bytes())
    }
}

/// The reason of the first touch of lost memory by a thread of this process, if there was one.
pub fn touched() -> Option<String> {
    REASON.get().map(|text| String::from_utf8_lossy(text).into_owned())
}

/// Makes a touch of lost memory wake `event` until the result is dropped. `event` must stay open as long.
pub fn listen(event: &EventFd) -> Listening {
    LISTENER.store(event.as_raw_fd(), Ordering::SeqCst);
    Listening(event.as_raw_fd())
}

/// The main loop's registration for touches of lost memory.
#[derive(Debug)]
pub struct Listening(RawFd);

impl Drop for Listening {
    fn drop(&mut self) {
        // Another machine of this process may have registered by now.
        let _ = LISTENER.compare_exchange(self.0, -1, Ordering::SeqCst, Ordering::SeqCst);
    }
}

/// Installs the handler of SIGBUS. Call before anything is mapped that may be lost.
pub fn install_handler() -> io::Result<()> {
    // SAFETY: sigaction is plain data for which zeros are a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the structure is initialised, and the handler has the signature that SA_SIGINFO requires.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    const BUS_ADRALN: libc::c_int = 1;
    const BUS_MCEERR_AR: libc::c_int = 4;
    const BUS_MCEERR_AO: libc::c_int = 5;
    // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO, and SIGBUS by the kernel has an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code == BUS_MCEERR_AO {
        // A warning about memory that no thread has touched yet.
        return;
    }
    if code <= BUS_ADRALN {
        die_by(signal);
        return;
    }
    let is_hardware = code == BUS_MCEERR_AR;
    let mut is_known = true;
    let first = REASON.set(|text| {
        is_known = find_in_tables(|table| table.lost(address, is_hardware).map(|lost| lost.describe(text))).is_some();
        if !is_known {
            let _ =
                write!(text, "Memory at host address {address:#x} cannot be had (SIGBUS), and no mapped file is there");
        }
    });
    if first && !is_known {
        terminal::restore_in_handler();
        say();
        die_by(signal);
        return;
    }
    let listener = LISTENER.load(Ordering::SeqCst);
    // SAFETY: both calls have no preconditions. (`libc::gettid`: see `kick::Alarm`.)
    let is_main = unsafe { libc::syscall(libc::SYS_gettid) == libc::c_long::from(libc::getpid()) };
    if listener >= 0 && !is_main {
        let one = 1_u64;
        // SAFETY: the kernel reads the eight bytes of a local; the listener's descriptor is open.
        unsafe { libc::write(listener, (&raw const one).cast(), size_of::<u64>()) };
        sleep(GRACE);
    }
    terminal::restore_in_handler();
    say();
    // SAFETY: ends the process without running any of its destructors.
    unsafe { libc::_exit(libc::c_int::from(EXIT_CODE)) }
}

/// Gives the signal its default effect, which it has when the handler returns and the touch is repeated.
fn die_by(signal: libc::c_int) {
    // SAFETY: both calls are safe in a handler; the signal is blocked while its handler runs, and comes after it.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// Sleeps the whole time, despite signals.
fn sleep(time: Duration) {
    let mut left =
        libc::timespec { tv_sec: time.as_secs() as libc::time_t, tv_nsec: libc::c_long::from(time.subsec_nanos()) };
    let rest = &raw mut left;
    // SAFETY: nanosleep(2) reads and writes a local.
    while unsafe { libc::nanosleep(rest, rest) } != 0 {}
}

/// Writes the reason to standard error, if that takes it at once.
fn say() {
    let mut line = Text::EMPTY;
    let _ = write!(line, "tvmm: {CANNOT_GO_ON}: ");
    line.push(REASON.get().unwrap_or_default());
    line.end_line();
    line.write_at_once(libc::STDERR_FILENO);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::Reservation;

    const PAGE: usize = PAGE_SIZE as usize;
    /// Far above any guest of the other tests, which may run in this process.
    const GPA: u64 = 1 << 50;

    #[test]
    fn page_behind_the_end_of_a_file_that_was_cut_is_named_and_others_are_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 * PAGE_SIZE).unwrap();
        let memory = Reservation::new(4 * PAGE).unwrap();
        memory.map_file_private(0, 4 * PAGE, file.as_file(), 4 * PAGE_SIZE).unwrap();
        let mapping =
            Mapping { address: memory.base() as usize, len: 4 * PAGE, file: 0, offset: 4 * PAGE_SIZE, gpa: Some(GPA) };
        let watched = watch(vec![MappedFile::new(file.as_file(), file.path()).unwrap()], vec![mapping]).unwrap();
        assert_eq!(at_gpa(GPA + 3 * PAGE_SIZE), None);
        file.as_file().set_len(6 * PAGE_SIZE + 1).unwrap();
        // The last page that the file has in part is zeros behind the end.
        assert_eq!(at_gpa(GPA + 2 * PAGE_SIZE), None);
        let said = at_gpa(GPA + 3 * PAGE_SIZE + 17).unwrap();
        for part in [&format!("{:#x} from {} at", GPA + 3 * PAGE_SIZE, file.path().display()), "0x7000", "24577 bytes"]
        {
            assert!(said.contains(part), "{said}");
        }
        assert_eq!(within(Extent { first: crate::snapshot::Gfn(GPA / PAGE_SIZE), pages: 9 }), Some(said.clone()));
        assert_eq!(at_gpa(GPA + 4 * PAGE_SIZE), None, "it is not mapped");
        drop(watched);
        assert_eq!(at_gpa(GPA + 3 * PAGE_SIZE), None);
    }
}
