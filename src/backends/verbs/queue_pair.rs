//! libibverbs objects that a device may refuse to destroy, when it is reset or unplugged. Nothing panics then: memory
//! that a device may still reach stays allocated, and everything else goes with the device's descriptor.

use std::error::Error;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use rdma_mummy_sys::*;
use sideway::ibverbs::device_context::DeviceContext;
use sideway::ibverbs::protection_domain::ProtectionDomain;

/// An error with its causes in the text, because the kernel's error number alone says too little.
pub(super) fn told(doing: &str, error: &dyn Error) -> io::Error {
    let causes = std::iter::successors(error.source(), |cause| (*cause).source()).map(|cause| format!(": {cause}"));
    io::Error::other(format!("{doing}: {error}{}", causes.collect::<String>()))
}

/// The result of a call that gives an error number.
fn checked(doing: &str, number: i32) -> io::Result<()> {
    if number == 0 { Ok(()) } else { Err(told(doing, &io::Error::from_raw_os_error(number))) }
}

/// The result of a call that gives an object.
fn made<T>(what: &str, object: *mut T) -> io::Result<NonNull<T>> {
    NonNull::new(object).ok_or_else(|| told(&format!("make a {what}"), &io::Error::last_os_error()))
}

/// The entries of the GID tables of a device's ports that are in use.
pub fn addresses(context: &DeviceContext) -> io::Result<Vec<ibv_gid_entry>> {
    let doing = "ask for its addresses";
    let device = context.query_device().map_err(|error| told(doing, &error))?;
    let mut room = 0;
    for number in 1..=device.phys_port_cnt() {
        let port = context.query_port(number).map_err(|error| told(doing, &error))?;
        room += usize::try_from(port.gid_tbl_len()).unwrap_or(0);
    }
    let unused =
        ibv_gid_entry { gid: ibv_gid { raw: [0; 16] }, gid_index: 0, port_num: 0, gid_type: 0, ndev_ifindex: 0 };
    let mut entries = vec![unused; room];
    if room == 0 {
        return Ok(entries);
    }
    // SAFETY: the context is open as long as it is borrowed; there is room for so many entries.
    let found = unsafe { ibv_query_gid_table(context.context().as_ptr(), entries.as_mut_ptr(), room, 0) };
    let found = usize::try_from(found).map_err(|_| told(doing, &io::Error::from_raw_os_error(-found as i32)))?;
    entries.truncate(found);
    Ok(entries)
}

/// A non-blocking channel that reports completions in a queue.
pub struct Channel {
    channel: NonNull<ibv_comp_channel>,
    context: Arc<DeviceContext>,
}

// SAFETY: functions of libibverbs can be called by any thread, and by several at once (ibv_get_cq_event(3), rdma-core's
// Documentation/libibverbs.md).
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    pub fn new(context: &Arc<DeviceContext>) -> io::Result<Channel> {
        // SAFETY: the context is open as long as it is borrowed, and kept as long as the channel.
        let channel = unsafe { ibv_create_comp_channel(context.context().as_ptr()) };
        let channel = Channel { channel: made("completion channel", channel)?, context: context.clone() };
        rustix::io::ioctl_fionbio(&channel, true)?;
        Ok(channel)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel, with its descriptor, is there as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.channel.as_ref().fd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the channel any more. If the device refuses, it stays until the device is closed.
        unsafe { ibv_destroy_comp_channel(self.channel.as_ptr()) };
    }
}

/// A completion queue.
pub struct Queue {
    queue: NonNull<ibv_cq>,
    channel: Option<Channel>,
    _context: Arc<DeviceContext>,
}

// SAFETY: as for `Channel`.
unsafe impl Send for Queue {}
// SAFETY: as for `Channel`.
unsafe impl Sync for Queue {}

impl Queue {
    /// A queue of `len` completions without notification.
    pub fn silent(context: &Arc<DeviceContext>, len: u32) -> io::Result<Queue> {
        Queue::make(context, len, None)
    }

    /// A queue of `len` completions that `channel` reports.
    pub fn told_by(channel: Channel, len: u32) -> io::Result<Queue> {
        Queue::make(&channel.context.clone(), len, Some(channel))
    }

    fn make(context: &Arc<DeviceContext>, len: u32, channel: Option<Channel>) -> io::Result<Queue> {
        let by = channel.as_ref().map_or(null_mut(), |channel| channel.channel.as_ptr());
        // SAFETY: the context is open and the channel there as long as the queue is, which keeps both.
        let queue = unsafe { ibv_create_cq(context.context().as_ptr(), len as i32, null_mut(), by, 0) };
        Ok(Queue { queue: made("completion queue", queue)?, channel, _context: context.clone() })
    }

    /// Asks the channel to report the next completion.
    pub fn request(&self) -> io::Result<()> {
        // SAFETY: the queue lives as long as `self`.
        checked("ask to be told of reads", unsafe { ibv_req_notify_cq(self.queue.as_ptr(), 0) })
    }

    /// The descriptor of the channel: readable when it has an event.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.channel.as_ref().map(Channel::as_fd)
    }

    /// Takes the channel's event, if there is one. It says only that this queue has a completion.
    pub fn take_event(&self) {
        let Some(channel) = &self.channel else { return };
        let mut queue = null_mut();
        let mut context = null_mut();
        // SAFETY: the channel lives as long as `self` and does not block; both pointers are this function's own.
        if unsafe { ibv_get_cq_event(channel.channel.as_ptr(), &mut queue, &mut context) } == 0 {
            // SAFETY: one event of the only queue of this channel was just taken.
            unsafe { ibv_ack_cq_events(self.queue.as_ptr(), 1) };
        }
    }

    /// The number and the status (`ibv_wc_status`) of the next completed request, if there is one.
    pub fn poll(&self) -> io::Result<Option<(u64, u32)>> {
        // SAFETY: integers, which may all be 0.
        let mut completion: ibv_wc = unsafe { std::mem::zeroed() };
        // SAFETY: the queue lives as long as `self`; there is room for one completion.
        match unsafe { ibv_poll_cq(self.queue.as_ptr(), 1, &mut completion) } {
            0 => Ok(None),
            1 => Ok(Some((completion.wr_id, completion.status))),
            error => Err(io::Error::other(format!("completed reads cannot be asked for ({error})"))),
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the queue any more: pairs keep theirs. If the device refuses, it stays until the
        // device is closed.
        unsafe { ibv_destroy_cq(self.queue.as_ptr()) };
    }
}

/// A queue pair of a reliable connection, and the memory that is reached through it. If the device refuses to destroy
/// the pair, it may still write to the memory, which is then never freed.
pub struct Pair<M> {
    pair: NonNull<ibv_qp>,
    memory: ManuallyDrop<M>,
    _domain: Arc<ProtectionDomain>,
    _queue: Arc<Queue>,
}

// SAFETY: as for `Channel`.
unsafe impl<M: Send> Send for Pair<M> {}
// SAFETY: as for `Channel`.
unsafe impl<M: Sync> Sync for Pair<M> {}

impl<M> Pair<M> {
    /// A pair in the state RESET, for up to `depth` concurrent requests.
    pub fn new(domain: &Arc<ProtectionDomain>, queue: &Arc<Queue>, depth: u32, memory: M) -> io::Result<Pair<M>> {
        let cq = queue.queue.as_ptr();
        let srq = null_mut();
        let cap =
            ibv_qp_cap { max_send_wr: depth, max_recv_wr: 1, max_send_sge: 1, max_recv_sge: 1, max_inline_data: 0 };
        let qp_context = null_mut();
        let qp_type = ibv_qp_type::IBV_QPT_RC;
        let mut wanted = ibv_qp_init_attr { qp_context, send_cq: cq, recv_cq: cq, srq, cap, qp_type, sq_sig_all: 0 };
        // SAFETY: domain and queue are there as long as the pair, which keeps both.
        let pair = made("queue pair", unsafe { ibv_create_qp(domain.pd().as_ptr(), &mut wanted) })?;
        Ok(Pair { pair, memory: ManuallyDrop::new(memory), _domain: domain.clone(), _queue: queue.clone() })
    }

    pub fn number(&self) -> u32 {
        // SAFETY: the pair is there as long as `self`; its number never changes.
        unsafe { (*self.pair.as_ptr()).qp_num }
    }

    /// Sets the attributes that `set` fills in and names.
    pub fn modify(&mut self, doing: &str, set: impl FnOnce(&mut ibv_qp_attr) -> ibv_qp_attr_mask) -> io::Result<()> {
        // SAFETY: integers, and a union of such, which may all be 0.
        let mut attributes: ibv_qp_attr = unsafe { std::mem::zeroed() };
        let named = set(&mut attributes).0;
        // SAFETY: the pair is there as long as `self`; the attributes are only read.
        checked(doing, unsafe { ibv_modify_qp(self.pair.as_ptr(), &mut attributes, named as i32) })
    }

    /// Begins request `id`: reads from the peer's address `from`, of the region `key`, into `to`.
    ///
    /// # Safety
    /// `to` is registered memory that is in `M` and not otherwise used until the request is complete.
    pub unsafe fn read(&mut self, id: u64, key: u32, from: u64, mut to: ibv_sge) -> io::Result<()> {
        // SAFETY: integers, unions of such and null pointers, which may all be 0.
        let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
        (request.wr_id, request.sg_list, request.num_sge) = (id, &mut to, 1);
        request.opcode = ibv_wr_opcode::IBV_WR_RDMA_READ;
        request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        request.wr.rdma = rdma_t { remote_addr: from, rkey: key };
        let mut refused = null_mut();
        // SAFETY: the pair is there as long as `self`; request and list are copied by the call; the caller vouches for
        // `to`.
        checked("begin a read", unsafe { ibv_post_send(self.pair.as_ptr(), &mut request, &mut refused) })
    }
}

impl<M> Deref for Pair<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.memory
    }
}

impl<M> DerefMut for Pair<M> {
    fn deref_mut(&mut self) -> &mut M {
        &mut self.memory
    }
}

impl<M> Drop for Pair<M> {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the pair any more.
        let refused = unsafe { ibv_destroy_qp(self.pair.as_ptr()) };
        if refused == 0 {
            // SAFETY: it is not used again.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        } else {
            let error = io::Error::from_raw_os_error(refused);
            tracing::warn!(%error, "An RDMA device does not end a connection: what it could reach stays in memory");
        }
    }
}
