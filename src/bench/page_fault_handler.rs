//! The handler's side of Firecracker's page-fault protocol
//! (`docs/snapshotting/handling-page-faults-on-snapshot-resume.md`, with its two example handlers): a VMM connects,
//! sends the addresses of guest memory and its userfaultfd, and its faults are answered from the memory file. Used to
//! measure another VMM's `Uffd` back end.

use crate::sys::handshake::Mapping;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::bench::Error;
use crate::snapshot::PAGE_SIZE;
use crate::sys::mapping::Reservation;
use crate::sys::uffd::{Message, Uffd};
use crate::sys::wait::either_readable;

const PAGE: usize = PAGE_SIZE as usize;
/// Longest message with the addresses of memory.
const MAX_MESSAGE: usize = 64 << 10;

/// The answer to a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Its page (Firecracker's on-demand example).
    Page,
    /// All of guest memory (Firecracker's fault-all example).
    All,
}

/// Counts of a handler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    pub faults: u64,
    pub pages: u64,
}

/// A handler for one VMM. Its thread ends when this is dropped.
#[derive(Debug)]
pub struct Handler {
    stop: EventFd,
    thread: Option<JoinHandle<Result<Served, Error>>>,
}

impl Handler {
    /// Listens at `socket`, which must be free, and serves the memory file to the first VMM that connects.
    pub fn start(socket: &Path, memory: &Path, answer: Answer) -> Result<Handler, Error> {
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| Error::File { doing, path, source }
        };
        let file = File::open(memory).map_err(failed("open the memory file", memory))?;
        let len = file.metadata().map_err(failed("look at the memory file", memory))?.len() as usize / PAGE * PAGE;
        let source = Reservation::new(len.max(PAGE)).map_err(failed("map the memory file", memory))?;
        if len > 0 {
            source.map_file_private(0, len, &file, 0).map_err(failed("map the memory file", memory))?;
        }
        let zeros = Reservation::new(PAGE).map_err(Error::os("reserve a page"))?;
        zeros.map_anon(0, PAGE).map_err(Error::os("map a page"))?;
        let listener = UnixListener::bind(socket).map_err(failed("listen for a VMM at", socket))?;
        let stop = EventFd::new(EFD_NONBLOCK).map_err(Error::os("make an eventfd"))?;
        let asked = stop.try_clone().map_err(Error::os("copy an eventfd"))?;
        let removed = Vec::new();
        let served = Served::default();
        let memory = Memory { source, zeros, len, answer, is_all_there: false, removed, served };
        let socket = socket.to_owned();
        let thread = std::thread::Builder::new()
            .name("handler".into())
            .spawn(move || run(&listener, &socket, &asked, memory))
            .map_err(Error::os("start the page-fault handler"))?;
        Ok(Handler { stop, thread: Some(thread) })
    }

    /// Ends the handler. Returns its counts, or the reason for its failure.
    pub fn finish(mut self) -> Result<Served, Error> {
        // The counter is written once, or the thread is gone.
        let _ = self.stop.write(1);
        let lost = || Error::Handler("its thread has panicked".to_string());
        self.thread.take().map_or_else(|| Err(lost()), |thread| thread.join().unwrap_or_else(|_| Err(lost())))
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // See `finish`.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // The handler was dropped without `finish`: its result is not wanted.
            let _ = thread.join();
        }
    }
}

fn run(listener: &UnixListener, socket: &Path, stop: &EventFd, mut memory: Memory) -> Result<Served, Error> {
    let failed = |doing, path: &Path| {
        let path: PathBuf = path.to_owned();
        move |source| Error::File { doing, path, source }
    };
    either_readable(listener, stop).map_err(failed("wait for a VMM at", socket))?;
    if stop.read().is_ok() {
        return Ok(memory.served);
    }
    let (stream, _) = listener.accept().map_err(failed("accept a VMM at", socket))?;
    either_readable(&stream, stop).map_err(failed("wait for a VMM at", socket))?;
    if stop.read().is_ok() {
        return Ok(memory.served);
    }
    let mut message = vec![0; MAX_MESSAGE];
    let (count, fd) = stream
        .recv_with_fd(&mut message)
        .map_err(|errno| failed("hear from the VMM at", socket)(io::Error::from(errno)))?;
    let fd = fd.ok_or_else(|| Error::Handler("the VMM has sent no userfaultfd".to_string()))?;
    let mappings = understand(&message[..count], memory.len).map_err(Error::Handler)?;
    let uffd = Uffd::received(OwnedFd::from(fd)).map_err(Error::os("use the VMM's userfaultfd"))?;
    memory.serve(&uffd, &mappings, stop)?;
    Ok(memory.served)
}

/// Parses the addresses of guest memory, checked against the length of the memory file.
fn understand(message: &[u8], len: usize) -> Result<Vec<Mapping>, String> {
    let mappings: Vec<Mapping> = serde_json::from_slice(message)
        .map_err(|error| format!("what the VMM says of its memory is not understood: {error}"))?;
    for mapping in &mappings {
        let end = usize::try_from(mapping.offset).ok().and_then(|offset| offset.checked_add(mapping.size));
        let is_aligned = [mapping.base_host_virt_addr, mapping.offset, mapping.size as u64]
            .iter()
            .all(|number| number.is_multiple_of(PAGE as u64));
        let last = mapping.base_host_virt_addr.checked_add(mapping.size as u64);
        // Firecracker before 1.10 omits the first field, before 1.7 both.
        let is_small = [mapping.page_size, mapping.page_size_kib].iter().all(|size| [0, PAGE].contains(size));
        if !is_small || !is_aligned || last.is_none() || end.is_none_or(|end| end > len) {
            let message =
                format!("the VMM maps memory that is not the file's {len} bytes in pages of 4 KiB: {mapping:?}");
            return Err(message);
        }
    }
    Ok(mappings)
}

/// The memory that faults are answered from.
struct Memory {
    source: Reservation,
    zeros: Reservation,
    /// Bytes of the memory file.
    len: usize,
    answer: Answer,
    /// True once a fault has been answered with all of memory.
    is_all_there: bool,
    /// Addresses that the VMM has given back; they are answered with zeros.
    removed: Vec<Range<usize>>,
    served: Served,
}

impl Memory {
    /// Answers faults until told to stop.
    fn serve(&mut self, uffd: &Uffd, mappings: &[Mapping], stop: &EventFd) -> Result<(), Error> {
        let mut waiting: Vec<usize> = Vec::new();
        loop {
            // A fault that could not be answered is tried again once the VMM has gone on with its removal.
            if waiting.is_empty() {
                either_readable(uffd, stop).map_err(Error::os("wait for page faults"))?
            } else {
                std::thread::yield_now()
            }
            if stop.read().is_ok() {
                return Ok(());
            }
            for message in uffd.messages().map_err(Error::os("read page faults"))? {
                match message {
                    Message::Fault(fault) => waiting.push(fault.address),
                    Message::Removed(range) => self.removed.push(range),
                }
            }
            for address in std::mem::take(&mut waiting) {
                if !self.answer(uffd, mappings, address)? {
                    waiting.push(address);
                }
            }
        }
    }

    /// Returns whether the fault could be answered now.
    fn answer(&mut self, uffd: &Uffd, mappings: &[Mapping], address: usize) -> Result<bool, Error> {
        let place = mappings.iter().find(|mapping| {
            address.checked_sub(mapping.base_host_virt_addr as usize).is_some_and(|offset| offset < mapping.size)
        });
        let Some(place) = place else {
            return Err(Error::Handler(format!("a fault at {address:#x} is in no memory that the VMM has told")));
        };
        let offset = place.offset as usize + (address - place.base_host_virt_addr as usize);
        let is_answered = if self.is_removed(address) {
            self.install(uffd, address, None, PAGE)?
        } else if self.answer == Answer::Page || self.is_all_there {
            self.install(uffd, address, Some(offset), PAGE)?
        } else {
            self.is_all_there = self.install_all(uffd, mappings)?;
            self.is_all_there
        };
        self.served.faults += u64::from(is_answered);
        Ok(is_answered)
    }

    fn install_all(&mut self, uffd: &Uffd, mappings: &[Mapping]) -> Result<bool, Error> {
        for mapping in mappings {
            let base = mapping.base_host_virt_addr as usize;
            if !self.install_range(uffd, base, mapping.offset as usize, mapping.size)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn is_removed(&self, address: usize) -> bool {
        self.removed.iter().any(|range| range.contains(&address))
    }

    /// Installs `[address, address + len)` without the removed parts. Returns whether that could be done now.
    fn install_range(&mut self, uffd: &Uffd, address: usize, offset: usize, len: usize) -> Result<bool, Error> {
        let mut done = 0;
        while done < len {
            let run = |removed: bool| {
                (done..len).step_by(PAGE).take_while(|at| self.is_removed(address + at) == removed).count() * PAGE
            };
            let (kept, gone) = if self.removed.is_empty() { (len - done, 0) } else { (run(false), run(true)) };
            if kept > 0 && !self.install(uffd, address + done, Some(offset + done), kept)? {
                return Ok(false);
            }
            done += kept + gone;
        }
        Ok(true)
    }

    /// Installs bytes of the memory file, or zeros. Returns whether that could be done now.
    fn install(&mut self, uffd: &Uffd, address: usize, offset: Option<usize>, len: usize) -> Result<bool, Error> {
        let (source, offset) = offset.map_or((&self.zeros, 0), |offset| (&self.source, offset));
        match uffd.install_from(address, source, offset, len) {
            Ok(pages) => {
                self.served.pages += pages;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            // The VMM has ended or unmapped the memory: no thread waits.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => Ok(true),
            Err(source) => Err(Error::Os { doing: "install pages in the VMM", source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::sys::uffd::FaultKinds;

    #[test]
    fn handler_answers_from_the_file_and_with_zeros_what_was_given_back() {
        for (answer, pages) in [(Answer::Page, 5), (Answer::All, 6)] {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("memory");
            let socket = dir.path().join("socket");
            std::fs::write(&file, (1..=4).flat_map(|page| [page; PAGE]).collect::<Vec<u8>>()).unwrap();
            let handler = Handler::start(&socket, &file, answer).unwrap();
            let memory = Reservation::new(4 * PAGE).unwrap();
            memory.map_anon(0, 4 * PAGE).unwrap();
            let uffd = Uffd::open_telling_removals().unwrap();
            uffd.register(&memory, 0, 4 * PAGE, FaultKinds::Missing).unwrap();
            let base_host_virt_addr = memory.base() as u64;
            let offset = 0;
            let page_size = PAGE;
            let page_size_kib = PAGE;
            let mapping = Mapping { base_host_virt_addr, size: 4 * PAGE, offset, page_size, page_size_kib };
            let stream = UnixStream::connect(&socket).unwrap();
            stream.send_with_fd(&serde_json::to_vec(&[mapping]).unwrap()[..], uffd.as_raw_fd()).unwrap();
            // SAFETY: only this thread uses the memory; the handler answers its faults.
            let first = |page: usize| unsafe { memory.bytes(page * PAGE, 1) }.unwrap()[0];
            assert_eq!([first(0), first(2)], [1, 3]);
            memory.discard(2 * PAGE, 2 * PAGE).unwrap();
            assert_eq!([first(0), first(1), first(2), first(3)], [1, 2, 0, 0]);
            assert_eq!(handler.finish().unwrap().pages, pages);
        }
    }

    #[test]
    fn memory_that_is_not_the_files_is_refused() {
        let mapping = |base: u64, size: u64, offset: u64, page: u64| {
            format!(r#"[{{"base_host_virt_addr":{base},"size":{size},"offset":{offset},"page_size":{page}}}]"#)
        };
        assert_eq!(understand(mapping(8192, 4096, 4096, 4096).as_bytes(), 8192).unwrap().len(), 1);
        let old = r#"[{"base_host_virt_addr":8192,"size":4096,"offset":0}]"#;
        assert_eq!(understand(old.as_bytes(), 8192).unwrap().len(), 1);
        for bad in [
            "[".to_string(),
            mapping(8192, 4096, 8192, 4096),
            mapping(8192, 4096, 4096, 2 << 20),
            mapping(8193, 4096, 0, 4096),
            mapping(8192, u64::MAX - 4095, 4096, 4096),
            mapping(u64::MAX - 4095, 8192, 0, 4096),
        ] {
            assert!(understand(bad.as_bytes(), 8192).is_err(), "{bad}");
        }
    }
}
