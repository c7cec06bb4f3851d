//! userfaultfd (kernel `Documentation/admin-guide/mm/userfaultfd.rst`): reports touches of guest memory before they are
//! answered, and answers them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use userfaultfd::{Error, Event, EventBuffer, FaultKind, FeatureFlags, ReadWrite, RegisterMode, UffdBuilder};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use super::held;
use super::mapping::Reservation;
use super::wait::either_readable;
use crate::snapshot::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;

/// `struct uffdio_copy`. The crate's `copy` has neither write protection nor the length of a partial copy.
#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

const _: () = assert!(size_of::<UffdioCopy>() == 40);
ioctl_iowr_nr!(UFFDIO_COPY, 0xaa, 0x03, UffdioCopy);

/// `struct uffdio_api`: the handshake that begins the use of a userfaultfd.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24);
ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, UffdioApi);
ioctl_io_nr!(USERFAULTFD_IOC_NEW, 0xaa, 0x00);
/// The version of the interface.
const UFFD_API: u64 = 0xaa;

const COPY_MODE_DONTWAKE: u64 = 1;
const COPY_MODE_WP: u64 = 2;

/// The access that faulted on a page that is missing or not writable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    Read,
    Write,
    /// A write to a page that was installed write-protected.
    WriteProtected,
}

/// One fault that waits for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Host address of the page.
    pub address: usize,
    pub touch: Touch,
}

/// A message of a userfaultfd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    Fault(Fault),
    /// These addresses were given back, and hold zeros when they are touched again.
    Removed(Range<usize>),
}

/// The faults that a userfaultfd reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKinds {
    /// First touches.
    Missing,
    /// First touches, and writes to pages that were installed write-protected.
    MissingAndProtected,
}

/// Options of an installation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Install {
    /// Wake the threads that wait for the pages.
    pub wake: bool,
    /// Write-protect the pages, so that the first write is a fault too.
    pub write_protect: bool,
}

/// A userfaultfd of this process, for faults from KVM as well.
pub struct Uffd {
    uffd: userfaultfd::Uffd,
    events: Mutex<EventBuffer>,
}

const EVENTS: usize = 64;

/// Features the crate has no names for (Linux `include/uapi/linux/userfaultfd.h`).
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

impl Uffd {
    /// Opens one that can report `faults`.
    pub fn open(faults: FaultKinds) -> io::Result<Self> {
        Uffd::with_features(match faults {
            FaultKinds::Missing => FeatureFlags::empty(),
            FaultKinds::MissingAndProtected => FeatureFlags::PAGEFAULT_FLAG_WP,
        })
    }

    /// Opens one whose reader is told of pages that are given back (`MADV_DONTNEED`). The thread that gives them back
    /// waits until the reader has read that.
    pub fn open_telling_removals() -> io::Result<Self> {
        Uffd::with_features(FeatureFlags::EVENT_REMOVE)
    }

    /// Takes over another process's userfaultfd, which came over a socket.
    ///
    /// # Errors
    /// `InvalidInput` for a descriptor of anything else.
    pub fn received(fd: OwnedFd) -> io::Result<Self> {
        let what = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if what.as_os_str() != "anon_inode:[userfaultfd]" {
            let said = format!("{} came instead of a userfaultfd", what.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, said));
        }
        rustix::io::ioctl_fionbio(&fd, true)?;
        // SAFETY: the descriptor is a userfaultfd, and this object is its only owner from now on. Only the kernel
        // writes the events that are read from it.
        let uffd = unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) };
        Ok(Uffd { uffd, events: Mutex::new(EventBuffer::new(EVENTS)) })
    }

    fn with_features(features: FeatureFlags) -> io::Result<Self> {
        if let Some(device) = held::get(held::USERFAULTFD) {
            return Uffd::of_device(device, features);
        }
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            // KVM touches guest memory from inside the kernel.
            .user_mode_only(false)
            .require_features(features)
            .create()
            .map_err(to_io)?;
        Ok(Uffd { uffd, events: Mutex::new(EventBuffer::new(EVENTS)) })
    }

    /// Makes one by the device that makes them, open already.
    fn of_device(device: &File, features: FeatureFlags) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the argument is a number; no memory is involved.
        let fd = unsafe { ioctl_with_val(device, USERFAULTFD_IOC_NEW(), flags as libc::c_ulong) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above has made this descriptor, a userfaultfd, and this object is its only owner. Only the
        // kernel writes the events that are read from it.
        let uffd = unsafe { userfaultfd::Uffd::from_raw_fd(fd) };
        let mut api = UffdioApi { api: UFFD_API, features: features.bits(), ioctls: 0 };
        // SAFETY: the struct has the kernel's layout (asserted above) and lives through the call.
        if unsafe { ioctl_with_mut_ref(&uffd, UFFDIO_API(), &mut api) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Uffd { uffd, events: Mutex::new(EventBuffer::new(EVENTS)) })
    }

    /// Takes over `faults` of `[offset, offset + len)` of `memory`.
    pub fn register(&self, memory: &Reservation, offset: usize, len: usize, faults: FaultKinds) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > memory.len()) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let mode = match faults {
            FaultKinds::Missing => RegisterMode::MISSING,
            FaultKinds::MissingAndProtected => RegisterMode::MISSING | RegisterMode::WRITE_PROTECT,
        };
        let start = memory.base().wrapping_add(offset).cast();
        self.uffd.register_with_mode(start, len, mode).map(drop).map_err(to_io)
    }

    /// Opens one that reports nothing. Memory registered with it is mapped page by page: where writes are watched, the
    /// kernel does not fault in the neighbours of a touched page (Linux `uffd_disable_fault_around`). `None` if the
    /// kernel cannot watch writes to all kinds of memory (before Linux 6.7).
    pub fn open_silent() -> io::Result<Option<Self>> {
        let features = FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC;
        let mut builder = UffdBuilder::new();
        builder.close_on_exec(true).non_blocking(true).user_mode_only(true);
        builder.require_features(FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::from_bits_retain(features));
        match builder.create().map_err(to_io) {
            Ok(uffd) => Ok(Some(Uffd { uffd, events: Mutex::new(EventBuffer::new(1)) })),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Registers all of `memory` with a silent userfaultfd.
    pub fn register_silent(&self, memory: &Reservation) -> io::Result<()> {
        let start = memory.base().cast();
        self.uffd.register_with_mode(start, memory.len(), RegisterMode::WRITE_PROTECT).map(drop).map_err(to_io)
    }

    /// Puts `bytes` (whole pages) at `address`. Pages that are there already stay as they are. Returns the number of
    /// pages installed. The kernel writes only to missing pages of registered ranges, so any address is safe to give.
    pub fn install(&self, address: usize, bytes: &[u8], how: Install) -> io::Result<u64> {
        let mut mode = if how.wake { 0 } else { COPY_MODE_DONTWAKE };
        mode |= if how.write_protect { COPY_MODE_WP } else { 0 };
        let mut done = 0;
        let mut installed = 0;
        let mut most = bytes.len();
        while done < bytes.len() {
            let rest = &bytes[done..];
            let rest = &rest[..rest.len().min(most)];
            let error = match self.copy(address + done, rest.as_ptr() as usize, rest.len(), mode) {
                Ok(copied) => {
                    done += copied;
                    installed += (copied / PAGE) as u64;
                    continue;
                }
                Err(error) => error,
            };
            match error.raw_os_error() {
                // Another thread installed this page first; a vCPU may have begun to wait for it in between.
                Some(libc::EEXIST) => {
                    if how.wake {
                        self.wake(address + done, PAGE)?;
                    }
                    done += PAGE;
                }
                // The address space was being changed: try again.
                Some(libc::EAGAIN) => {}
                // One call takes pages of one mapping, and the kernel does not join all neighbours.
                Some(libc::ENOENT) if rest.len() > PAGE => most = PAGE,
                _ => return Err(error),
            }
        }
        Ok(installed)
    }

    /// Puts bytes of `source`, which is mapped, at `address` of the process whose userfaultfd this is (whole pages),
    /// and wakes the threads that wait for them. Pages that are there already stay as they are. Returns the number of
    /// pages installed.
    ///
    /// # Errors
    /// `WouldBlock` (EAGAIN): memory is being given back, and the message about it must be read first
    /// ([`messages`](Self::messages)).
    pub fn install_from(&self, address: usize, source: &Reservation, offset: usize, len: usize) -> io::Result<u64> {
        if offset.checked_add(len).is_none_or(|end| end > source.len()) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let from = source.base() as usize + offset;
        let mut done = 0;
        let mut installed = 0;
        while done < len {
            match self.copy(address + done, from + done, len - done, 0) {
                Ok(copied) => {
                    done += copied;
                    installed += (copied / PAGE) as u64;
                }
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    self.wake(address + done, PAGE)?;
                    done += PAGE;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(installed)
    }

    /// One UFFDIO_COPY; returns the bytes copied, which may be fewer than `len`.
    fn copy(&self, address: usize, from: usize, len: usize, mode: u64) -> io::Result<usize> {
        let mut copy = UffdioCopy { dst: address as u64, src: from as u64, len: len as u64, mode, copy: 0 };
        // SAFETY: the kernel reads the source as this process could (EFAULT where nothing is mapped), and writes only
        // pages of registered ranges that are not populated; the struct has its layout and lives through the call.
        let result = unsafe { ioctl_with_mut_ref(&self.uffd, UFFDIO_COPY(), &mut copy) };
        match (result, copy.copy) {
            (0, _) => Ok(len),
            (_, copied) if copied > 0 => Ok(copied as usize),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Puts a page of zeros at `address`, which costs no memory until it is written, and wakes the threads that wait
    /// for it. Returns whether it was missing.
    pub fn install_zero(&self, address: usize) -> io::Result<bool> {
        loop {
            // SAFETY: the kernel maps its page of zeros where a registered page is missing, and nowhere else.
            match unsafe { self.uffd.zeropage(address as *mut libc::c_void, PAGE, true) }.map_err(to_io) {
                Ok(_) => return Ok(true),
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    return self.wake(address, PAGE).map(|()| false);
                }
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Wakes the threads that wait for `[address, address + len)`: they touch it again.
    pub fn wake(&self, address: usize, len: usize) -> io::Result<()> {
        self.uffd.wake(address as *mut libc::c_void, len).map_err(to_io)
    }

    /// Gives `[address, address + len)` back to the kernel, which answers first touches with zeros, and wakes waiting
    /// threads.
    pub fn unregister(&self, address: usize, len: usize) -> io::Result<()> {
        self.uffd.unregister(address as *mut libc::c_void, len).map_err(to_io)
    }

    /// Makes write-protected pages writable and wakes the threads that wait for that.
    pub fn unprotect(&self, address: usize, len: usize) -> io::Result<()> {
        self.uffd.remove_write_protection(address as *mut libc::c_void, len, true).map_err(to_io)
    }

    /// Waits until a message can be read, or `stop` is written.
    pub fn wait(&self, stop: &EventFd) -> io::Result<()> {
        either_readable(&self.uffd, stop)
    }

    /// The number of faults that wait for their answer, already read by `messages` or not (Linux
    /// `userfaultfd_show_fdinfo`).
    pub fn waiters(&self) -> io::Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.as_raw_fd()))?;
        let total = text.lines().find_map(|line| line.strip_prefix("total:")?.trim().parse().ok());
        total.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }

    /// The faults that wait now; empty if there are none. Memory that was given back needs no answer.
    pub fn faults(&self) -> io::Result<Vec<Fault>> {
        let faults = self.messages()?.into_iter().filter_map(|message| match message {
            Message::Fault(fault) => Some(fault),
            Message::Removed(_) => None,
        });
        Ok(faults.collect())
    }

    /// The messages that can be read now; empty if there are none.
    pub fn messages(&self) -> io::Result<Vec<Message>> {
        let mut buffer = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let events = match self.uffd.read_events(&mut buffer) {
            Ok(events) => events,
            Err(error) => {
                let error = to_io(error);
                return if error.kind() == io::ErrorKind::WouldBlock { Ok(Vec::new()) } else { Err(error) };
            }
        };
        let mut messages = Vec::new();
        for event in events {
            match event.map_err(to_io)? {
                Event::Pagefault { kind, rw, addr } => {
                    let touch = match (kind, rw) {
                        (FaultKind::WriteProtected, _) => Touch::WriteProtected,
                        (_, ReadWrite::Write) => Touch::Write,
                        (_, ReadWrite::Read) => Touch::Read,
                    };
                    messages.push(Message::Fault(Fault { address: addr as usize & !(PAGE - 1), touch }));
                }
                Event::Remove { start, end } => messages.push(Message::Removed(start as usize..end as usize)),
                _ => {}
            }
        }
        Ok(messages)
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.uffd.as_raw_fd()
    }
}

fn to_io(error: Error) -> io::Error {
    match error {
        Error::SystemError(errno) | Error::CopyFailed(errno) | Error::ZeropageFailed(errno) => {
            io::Error::from_raw_os_error(errno as i32)
        }
        Error::OpenDevUserfaultfd(error) => error,
        other => io::Error::other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn registered(pages: usize) -> (Reservation, Arc<Uffd>) {
        let memory = Reservation::new(pages * PAGE).unwrap();
        memory.map_anon(0, pages * PAGE).unwrap();
        let uffd = Uffd::open(FaultKinds::MissingAndProtected).unwrap();
        uffd.register(&memory, 0, pages * PAGE, FaultKinds::MissingAndProtected).unwrap();
        (memory, Arc::new(uffd))
    }

    #[test]
    fn install_leaves_pages_that_are_there_alone() {
        let (memory, uffd) = registered(4);
        let base = memory.base() as usize;
        assert_eq!(uffd.install(base + PAGE, &[7; PAGE], Install::default()).unwrap(), 1);
        assert_eq!(uffd.install(base, &[9; 4 * PAGE], Install { wake: true, write_protect: false }).unwrap(), 3);
        // SAFETY: only this test uses the memory, and all of it is installed.
        let bytes = unsafe { memory.bytes(0, 4 * PAGE) }.unwrap();
        assert_eq!([bytes[0], bytes[PAGE], bytes[2 * PAGE], bytes[3 * PAGE]], [9, 7, 9, 9]);
    }

    #[test]
    fn read_then_write_are_two_faults() {
        let (memory, uffd) = registered(1);
        let base = memory.base() as usize;
        let toucher = std::thread::spawn(move || {
            // SAFETY: only this thread touches the bytes; the main thread answers its faults.
            let page = unsafe { memory.bytes_mut(0, PAGE) }.unwrap();
            let seen = page[5];
            page[5] = seen + 1;
            page[5]
        });
        let mut touches = Vec::new();
        while touches.len() < 2 {
            let waits = uffd.waiters().unwrap();
            assert!(waits <= 1, "one thread waits for one page");
            for fault in uffd.faults().unwrap() {
                assert_eq!(fault.address, base);
                touches.push(fault.touch);
                match fault.touch {
                    Touch::WriteProtected => uffd.unprotect(base, PAGE).unwrap(),
                    _ => {
                        uffd.install(base, &[41; PAGE], Install { wake: true, write_protect: true }).unwrap();
                    }
                }
            }
        }
        assert_eq!(toucher.join().unwrap(), 42);
        assert_eq!(touches, [Touch::Read, Touch::WriteProtected]);
        assert_eq!(uffd.waiters().unwrap(), 0);
    }

    #[test]
    fn register_outside_the_reservation_is_refused() {
        let (memory, uffd) = registered(1);
        assert!(uffd.register(&memory, 0, 2 * PAGE, FaultKinds::Missing).is_err());
        assert!(uffd.register(&memory, usize::MAX, PAGE, FaultKinds::Missing).is_err());
    }
}
