//! The MMIO transport, version 2 (VIRTIO 1.2, 4.2): registers, queue set-up, interrupt, and the device's life cycle.
//!
//! The interrupt registers are outside the lock, so that a vCPU that acknowledges an interrupt never waits for a
//! request that the device thread is working on.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::interrupt::Interrupt;
use super::io::CHAINS_PER_TURN;
use super::retired::Retired;
use super::{Broken, Io, Memory, QueueState, Source, VirtQueue, VirtioDevice};
use crate::devices::{BusDevice, Error, InterruptLine};

/// Registers (VIRTIO 1.2, table 4.1).
mod reg {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_LAST: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Device status bits (VIRTIO 1.2, 2.1).
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VENDOR: u32 = u32::from_le_bytes(*b"tvmm");

/// The transport's registers and queues, as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    status: u32,
    features: u64,
    features_sel: [u32; 2],
    queue_sel: u32,
    interrupt_status: u32,
    config_generation: u32,
    queues: Vec<QueueState>,
}

impl TransportState {
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// Returns whether this is the state `other`, but for interrupts and the changes of the configuration space that
    /// they announce.
    pub fn is_as(&self, other: &TransportState) -> bool {
        let TransportState { interrupt_status, config_generation, .. } = *other;
        TransportState { interrupt_status, config_generation, ..self.clone() } == *other
    }
}

/// The driver's settings, and the device.
struct Inner {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    queues: Vec<VirtQueue>,
    status: u32,
    features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    config_generation: u32,
    /// True between `quiesce` and `go_on`: events are ignored.
    quiet: bool,
}

/// A virtio device on the MMIO bus.
pub struct MmioDevice {
    inner: Mutex<Inner>,
    interrupt: Interrupt,
    /// Makes the device thread look at everything.
    kick: EventFd,
    device_type: u32,
}

impl MmioDevice {
    /// Puts `device` behind a transport. It is quiet until [`go_on`](Self::go_on).
    pub fn new(device: Box<dyn VirtioDevice>, memory: Memory) -> Result<Self, Error> {
        let failed = |source| Error::Event { doing: "make an eventfd", device: "virtio transport", source };
        let queues = device.queue_sizes().iter().map(|&size| VirtQueue::new(size)).collect::<io::Result<Vec<_>>>();
        let device_type = device.device_type();
        let inner = Inner {
            device,
            memory,
            queues: queues.map_err(failed)?,
            status: 0,
            features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            config_generation: 0,
            quiet: true,
        };
        let interrupt = Interrupt::default();
        let kick = EventFd::new(EFD_NONBLOCK).map_err(failed)?;
        Ok(MmioDevice { inner: Mutex::new(inner), interrupt, kick, device_type })
    }

    pub fn name(&self) -> String {
        self.lock().device.name().to_owned()
    }

    pub fn device_type(&self) -> u32 {
        self.device_type
    }

    pub fn queue_count(&self) -> usize {
        self.lock().queues.len()
    }

    pub fn interrupt_line(&self) -> &InterruptLine {
        self.interrupt.line()
    }

    /// The register by which the guest kicks queues: writes to this offset go to the queues' eventfds.
    pub const NOTIFY_OFFSET: u64 = reg::QUEUE_NOTIFY;

    /// Clones of the eventfds that kick the queues.
    pub fn queue_events(&self) -> io::Result<Vec<EventFd>> {
        self.lock().queues.iter().map(|queue| queue.event().try_clone()).collect()
    }

    /// The device thread calls [`look_at_all`](Self::look_at_all) when this is written.
    pub fn kick_event(&self) -> &EventFd {
        &self.kick
    }

    pub fn sources(&self) -> Vec<Source> {
        self.lock().device.sources()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends requests in flight and ignores events until [`go_on`](Self::go_on). The caller keeps all vCPUs stopped.
    pub fn quiesce(&self) {
        let mut inner = self.lock();
        if !inner.quiet {
            inner.with_io(self, |device, io| device.quiesce(io));
            inner.quiet = true;
        }
    }

    /// Resumes work. The device thread handles the events that came in between.
    pub fn go_on(&self) {
        let mut inner = self.lock();
        inner.quiet = false;
        // A snapshot by an older tvmm may lack an interrupt that was on its way; one too many does no harm.
        self.interrupt.raise_pending();
        if inner.is_live() {
            let _ = self.kick.write(1);
        }
    }

    /// Handles a kick of `queue`.
    pub fn queue_kicked(&self, queue: usize) {
        let mut inner = self.lock();
        if let Some(kicked) = inner.queues.get(queue) {
            let _ = kicked.event().read();
        }
        inner.process_queue(self, queue);
    }

    /// Handles a ready source of the device's own.
    pub fn source_ready(&self, token: u32) {
        let mut inner = self.lock();
        if !inner.quiet {
            inner.with_io(self, |device, io| device.process_event(token, io));
        }
    }

    /// Handles every queue and every source.
    pub fn look_at_all(&self) {
        let _ = self.kick.read();
        let mut inner = self.lock();
        if inner.quiet {
            return;
        }
        for source in inner.device.sources() {
            inner.with_io(self, |device, io| device.process_event(source.token, io));
        }
        for queue in 0..inner.queues.len() {
            inner.process_queue(self, queue);
        }
    }

    /// Lends the device to `work`, if it is a `D`; with its queues if the driver is ready. If `work` returns true,
    /// tells the guest that the configuration space has changed.
    pub fn with_device<D: VirtioDevice, R>(&self, work: impl FnOnce(&mut D) -> (R, bool)) -> Option<R> {
        let mut inner = self.lock();
        let device = &mut *inner.device as &mut dyn std::any::Any;
        let (result, config_changed) = work(device.downcast_mut::<D>()?);
        if config_changed {
            inner.config_generation = inner.config_generation.wrapping_add(1);
            if inner.is_live() {
                self.interrupt.config_change();
            }
        }
        // The change may let the device do work that it could not do before.
        let _ = self.kick.write(1);
        Some(result)
    }

    /// The saved state of transport and device. Called after `quiesce`.
    pub fn save(&self) -> Result<(TransportState, Vec<u8>), Error> {
        let inner = self.lock();
        let transport = TransportState {
            status: inner.status,
            features: inner.features,
            features_sel: [inner.device_features_sel, inner.driver_features_sel],
            queue_sel: inner.queue_sel,
            interrupt_status: self.interrupt.causes(),
            config_generation: inner.config_generation,
            queues: inner.queues.iter().map(VirtQueue::save).collect(),
        };
        let device = inner.device.save().map_err(|_| Error::State { device: "virtio device", what: "too large" })?;
        Ok((transport, device))
    }

    /// Takes over the saved registers, for a device that was made from its own saved state. The features that the
    /// device offers now must contain those that the driver had accepted.
    pub fn restore(&self, state: &TransportState) -> Result<(), Error> {
        let invalid = |what| Error::State { device: "virtio transport", what };
        let mut inner = self.lock();
        if state.queues.len() != inner.queues.len() {
            return Err(invalid("it has another number of queues"));
        }
        if state.features & !inner.offered() != 0 {
            return Err(invalid("its driver uses features that this device does not have"));
        }
        for (queue, saved) in inner.queues.iter_mut().zip(&state.queues) {
            queue.restore(saved).map_err(|_| invalid("a queue has an impossible size or address"))?;
        }
        inner.status = state.status;
        inner.features = state.features;
        [inner.device_features_sel, inner.driver_features_sel] = state.features_sel;
        inner.queue_sel = state.queue_sel;
        inner.config_generation = state.config_generation;
        self.interrupt.set_causes(state.interrupt_status);
        if inner.is_live() && !inner.queues.iter().all(|queue| !queue.is_ready() || queue.queue.is_valid(&inner.memory))
        {
            return Err(invalid("a queue lies outside guest memory"));
        }
        inner.with_io(self, |device, io| device.activate(io));
        Ok(())
    }

    /// Takes device and transport back to the saved state that they were restored from. Called after `quiesce`.
    ///
    /// # Errors
    /// As [`restore`](Self::restore) and [`VirtioDevice::rewind`]; the device must not be used afterwards.
    pub fn rewind(&self, transport: &TransportState, device: &[u8]) -> Result<(), Error> {
        let mut inner = self.lock();
        inner.device.rewind(device)?;
        for queue in &inner.queues {
            // Kicks for the chains of the former guest.
            let _ = queue.event().read();
        }
        drop(inner);
        self.restore(transport)
    }

    /// Ends the device: its files, sockets and taps are free again. Called after `quiesce`, when the device thread has
    /// ended. Nothing but [`renew`](Self::renew) may be called then.
    pub fn retire(&self) {
        let mut inner = self.lock();
        let queue_sizes = inner.device.queue_sizes().to_vec();
        inner.device = Box::new(Retired { device_type: self.device_type, queue_sizes });
    }

    /// Puts `device`, which was made from saved state, in the place of the former one, and takes over the registers
    /// that were saved with it. It works on `memory`. Interrupt line and kicks stay connected.
    ///
    /// # Errors
    /// As [`restore`](Self::restore), or the device is of another type.
    pub fn renew(
        &self,
        device: Box<dyn VirtioDevice>,
        memory: &Memory,
        transport: &TransportState,
    ) -> Result<(), Error> {
        let mut inner = self.lock();
        if device.device_type() != self.device_type || device.queue_sizes() != inner.device.queue_sizes() {
            return Err(Error::State { device: "virtio transport", what: "it is of another device" });
        }
        inner.device = device;
        inner.memory = memory.clone();
        for queue in &inner.queues {
            // Kicks for the chains of the former guest.
            let _ = queue.event().read();
        }
        drop(inner);
        self.restore(transport)
    }

    pub fn metrics(&self) -> serde_json::Value {
        self.lock().device.metrics()
    }
}

impl Inner {
    fn offered(&self) -> u64 {
        let own = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        self.device.features() | own
    }

    /// True if the driver is ready and the device is not broken.
    fn is_live(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET | status::FAILED) == status::DRIVER_OK
    }

    fn process_queue(&mut self, transport: &MmioDevice, queue: usize) {
        if self.queues.get(queue).is_some_and(VirtQueue::is_ready) && !self.quiet {
            self.with_io(transport, |device, io| device.process_queue(queue, io));
        }
    }

    /// Lends queues and memory to the device if it is live. If that breaks the device, tells the driver.
    fn with_io(
        &mut self,
        transport: &MmioDevice,
        work: impl FnOnce(&mut dyn VirtioDevice, &mut Io<'_>) -> Result<(), Broken>,
    ) {
        if !self.is_live() {
            return;
        }
        let memory = &self.memory;
        let interrupt = &transport.interrupt;
        let budget = CHAINS_PER_TURN;
        let queues = &mut self.queues;
        let config_generation = &mut self.config_generation;
        let mut io = Io { queues, memory, features: self.features, interrupt, config_generation, budget };
        let result = work(&mut *self.device, &mut io);
        if io.budget == 0 {
            let _ = transport.kick.write(1);
        }
        if let Err(broken) = result {
            tracing::warn!(device = self.device.name(), error = %broken, "A device stopped until its driver resets it");
            self.status |= status::NEEDS_RESET;
            interrupt.config_change();
        }
    }

    fn read(&self, register: u64, transport: &MmioDevice) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match register {
            reg::MAGIC => MAGIC,
            reg::VERSION => 2,
            reg::DEVICE_ID => self.device.device_type(),
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => half(self.offered(), self.device_features_sel),
            reg::QUEUE_NUM_MAX => queue.map_or(0, |queue| u32::from(queue.queue.max_size())),
            reg::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.is_ready())),
            reg::INTERRUPT_STATUS => transport.interrupt.causes(),
            reg::STATUS => self.status,
            reg::CONFIG_GENERATION => self.config_generation,
            // No shared memory regions: length -1 (VIRTIO 1.2, 4.2.2.1).
            reg::SHM_LEN_LOW..=reg::SHM_LAST => u32::MAX,
            _ => 0,
        }
    }

    fn write(&mut self, register: u64, value: u32, transport: &MmioDevice) {
        let features_open = self.status & (status::DRIVER | status::FEATURES_OK | status::FAILED) == status::DRIVER;
        match register {
            reg::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::DRIVER_FEATURES if features_open => set_half(&mut self.features, self.driver_features_sel, value),
            reg::QUEUE_SEL => self.queue_sel = value,
            // An ioeventfd takes valid kicks; a write that arrives here names a queue that does not exist, or has
            // another width.
            reg::QUEUE_NOTIFY => {
                if let Some(queue) = self.queues.get(value as usize) {
                    let _ = queue.event().write(1);
                }
            }
            reg::STATUS => self.set_status(value, transport),
            _ => self.write_queue(register, value),
        }
    }

    fn write_queue(&mut self, register: u64, value: u32) {
        let setting_up = status::FEATURES_OK | status::DRIVER_OK | status::FAILED;
        if self.status & setting_up != status::FEATURES_OK {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize).map(|queue| &mut queue.queue) else { return };
        match register {
            reg::QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            reg::QUEUE_READY => queue.set_ready(value == 1),
            reg::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            reg::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            reg::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            reg::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            reg::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            reg::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// Handles a write of the status: one bit more each time, in order, or zero (VIRTIO 1.2, 3.1.1).
    fn set_status(&mut self, value: u32, transport: &MmioDevice) {
        let added = value & !self.status;
        match added {
            _ if value == 0 => self.reset(transport),
            status::ACKNOWLEDGE => self.status |= added,
            status::DRIVER if self.status == status::ACKNOWLEDGE => self.status |= added,
            status::FEATURES_OK if self.status == status::ACKNOWLEDGE | status::DRIVER => {
                // Otherwise the bit stays clear, which the driver checks.
                let needed = 1 << VIRTIO_F_VERSION_1;
                if self.features & !self.offered() == 0 && self.features & needed != 0 {
                    self.status |= added;
                }
            }
            status::DRIVER_OK if self.status == status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK => {
                self.status |= added;
                self.activate(transport);
            }
            status::FAILED => self.status |= added,
            _ => {}
        }
    }

    fn activate(&mut self, transport: &MmioDevice) {
        let event_idx = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut valid = true;
        for queue in &mut self.queues {
            queue.queue.set_event_idx(event_idx);
            valid &= !queue.is_ready() || queue.queue.is_valid(&self.memory);
        }
        self.with_io(transport, |device, io| {
            if !valid {
                return Err(Broken::Chain("a queue lies outside guest memory"));
            }
            device.activate(io)
        });
        // Kicks may have come before: the driver may fill queues as soon as they are ready.
        let _ = transport.kick.write(1);
    }

    fn reset(&mut self, transport: &MmioDevice) {
        self.device.reset();
        for queue in &mut self.queues {
            queue.queue.reset();
            let _ = queue.event().read();
        }
        self.status = 0;
        self.features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        transport.interrupt.set_causes(0);
    }
}

impl BusDevice for MmioDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match (offset, data.len()) {
            (reg::INTERRUPT_STATUS, 4) => {
                data.copy_from_slice(&self.interrupt.causes().to_le_bytes());
            }
            (reg::CONFIG.., _) => self.lock().device.read_config(offset - reg::CONFIG, data),
            (_, 4) => data.copy_from_slice(&self.lock().read(offset, self).to_le_bytes()),
            // Registers are 32 bits wide (VIRTIO 1.2, 4.2.2.2): other accesses read zero.
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= reg::CONFIG {
            self.lock().device.write_config(offset - reg::CONFIG, data);
            return;
        }
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return };
        match offset {
            reg::INTERRUPT_ACK => {
                self.interrupt.acknowledge(value);
            }
            _ => self.lock().write(offset, value, self),
        }
    }
}

fn half(value: u64, sel: u32) -> u32 {
    match sel {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, sel: u32, half: u32) {
    match sel {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}
