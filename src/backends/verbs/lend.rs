//! Lends a file for RDMA: its pages, pinned in the page cache, can be read by the peer.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_mummy_sys::ibv_access_flags;
use sideway::ibverbs::AccessFlags;
use sideway::ibverbs::memory_region::MemoryRegion;
use sideway::ibverbs::protection_domain::ProtectionDomain;

use super::connection::{accept, new_sequence, queue_pair};
use super::port::Port;
use super::queue_pair::{Pair, Queue, told};
use crate::backends::cold::wire::{Attached, Endpoint};

/// A read-only mapping that this process does not touch.
struct View {
    base: NonNull<libc::c_void>,
    len: usize,
}

impl View {
    fn of(file: &File, len: u64) -> io::Result<View> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        match NonNull::new(base).filter(|base| base.as_ptr() != libc::MAP_FAILED) {
            Some(base) => Ok(View { base, len }),
            None => Err(io::Error::last_os_error()),
        }
    }
}

// SAFETY: this process never reads or writes through the address: it is only named to the device.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `of`, nothing refers to it, and its registration has ended (see `Lent`).
        unsafe { libc::munmap(self.base.as_ptr(), self.len) };
    }
}

/// A file whose bytes connected peers may read. It has its own protection domain: a reader of one file cannot read
/// another, whatever key it guesses.
pub struct Lent {
    port: Port,
    /// Dropped before the mapping that it registers.
    region: Arc<MemoryRegion>,
    domain: Arc<ProtectionDomain>,
    /// Never gets a completion: a lender only answers.
    queue: Arc<Queue>,
    view: View,
}

impl Lent {
    /// Lends the first `len` bytes of `file`, which stay in memory from now on.
    ///
    /// # Errors
    /// The limit for locked memory, no free region, or a file system whose pages cannot be pinned (DAX).
    pub fn new(port: &Port, file: &File, len: u64) -> io::Result<Lent> {
        let view = View::of(file, len)?;
        let domain = port.context.alloc_pd().map_err(|error| told("make a protection domain", &error))?;
        let queue = Arc::new(Queue::silent(&port.context, 1)?);
        // SAFETY: the region ends before the mapping does, which is read-only, as is what the region allows.
        let region = unsafe { domain.reg_mr(view.base.as_ptr() as usize, view.len, AccessFlags::RemoteRead) };
        let doing = "register it with the device (RLIMIT_MEMLOCK limits that without CAP_IPC_LOCK)";
        let region = region.map_err(|error| told(doing, &error))?;
        Ok(Lent { port: port.clone(), region, domain, queue, view })
    }

    /// Connects the reader at `address` until the result is dropped. Also returns the answer for it.
    pub fn lend(self: &Arc<Lent>, address: IpAddr, reader: Endpoint) -> io::Result<(Loan, Attached)> {
        let allows = ibv_access_flags::IBV_ACCESS_REMOTE_READ;
        let mut pair = queue_pair(&self.domain, &self.queue, &self.port, allows, 1, self.clone())?;
        accept(&mut pair, &self.port, address, reader)?;
        let mtu = self.port.mtu;
        let reads = self.port.answers.min(reader.reads);
        let endpoint = Endpoint { queue_pair: pair.number(), sequence: new_sequence()?, mtu, reads };
        let address = self.view.base.as_ptr() as u64;
        let len = self.view.len as u64;
        Ok((Loan(pair), Attached { endpoint, address, len, key: self.region.rkey() }))
    }
}

/// One reader's connection, and the file lent to it.
pub struct Loan(#[expect(dead_code, reason = "it is there to be dropped")] Pair<Arc<Lent>>);
