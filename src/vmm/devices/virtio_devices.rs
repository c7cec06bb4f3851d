//! The virtio devices that are attached to a machine, and the thread that works for them.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use kvm_ioctls::{IoEventAddress, VmFd};

use super::saved::SavedDevice;
use super::thread;
use crate::config::{DeviceConfigs, MAX_DEVICES};
use crate::devices::Bus;
use crate::devices::virtio::{MmioDevice, VirtioDevice, id};
use crate::memory;
use crate::sys::guest_memory::Memory;
use crate::sys::worker::Worker;
use crate::vmm::arch::VirtioMmioSlot;
use crate::vmm::error::Error;
use crate::vmm::interrupts::connect;
use crate::vmm::restore::StateError;

/// The virtio devices of a machine. Dropped before VM and memory, which its thread uses.
#[derive(Default)]
pub struct VirtioDevices {
    thread: Option<Worker>,
    devices: Vec<Arc<MmioDevice>>,
    /// The configs of the devices, with later changes.
    pub(super) configs: DeviceConfigs,
}

impl VirtioDevices {
    /// Attaches devices in their order: registers on the bus, kicks as ioeventfds, interrupts as lines.
    pub fn attach(
        vm: &Arc<VmFd>,
        bus: &mut Bus,
        memory: &Memory,
        devices: Vec<Box<dyn VirtioDevice>>,
        configs: DeviceConfigs,
    ) -> Result<Self, Error> {
        let too_many = || {
            let what = format!("there are more than {MAX_DEVICES} devices");
            StateError::Section { section: "Virtio".into(), what }
        };
        let mut attached = Vec::with_capacity(devices.len());
        for (index, device) in devices.into_iter().enumerate() {
            let slot = VirtioMmioSlot::of(index).ok_or_else(too_many)?;
            let device = Arc::new(MmioDevice::new(device, memory.clone())?);
            bus.insert(slot.gpa, slot.len, device.clone())?;
            let notify = IoEventAddress::Mmio(slot.gpa + MmioDevice::NOTIFY_OFFSET);
            let events = device.queue_events().map_err(Error::os("copy an eventfd"))?;
            for (queue, event) in events.iter().enumerate() {
                vm.register_ioevent(event, &notify, queue as u32).map_err(Error::kvm("register an ioeventfd"))?;
            }
            connect(device.interrupt_line(), vm, slot.gsi);
            attached.push(device);
        }
        Ok(VirtioDevices { thread: None, devices: attached, configs })
    }

    /// The places of all devices, for the tables that describe them to the guest.
    pub fn slots(&self) -> Vec<VirtioMmioSlot> {
        (0..self.devices.len()).map_while(VirtioMmioSlot::of).collect()
    }

    /// Type and number of queues of each device.
    pub fn kinds(&self) -> Vec<(u32, usize)> {
        self.devices.iter().map(|device| (device.device_type(), device.queue_count())).collect()
    }

    pub fn configs(&self) -> &DeviceConfigs {
        &self.configs
    }

    pub fn configs_mut(&mut self) -> &mut DeviceConfigs {
        &mut self.configs
    }

    /// Starts the thread that works for the devices, if there are any. They stay quiet until [`go_on`](Self::go_on).
    pub fn start(&mut self) -> Result<(), Error> {
        if !self.devices.is_empty() && self.thread.is_none() {
            self.thread = Some(thread::start(&self.devices)?);
        }
        Ok(())
    }

    /// The descriptors that become readable when a program connects to the guest, also while the devices are quiet.
    pub fn connection_sources(&self) -> Vec<RawFd> {
        let vsock = self.devices.iter().filter(|device| device.device_type() == id::VSOCK);
        vsock.flat_map(|device| device.sources()).map(|source| source.fd).collect()
    }

    /// Finishes requests in flight; afterwards no device touches guest memory. Called after the vCPUs have stopped.
    pub fn quiesce(&self) {
        self.devices.iter().for_each(|device| device.quiesce());
    }

    /// Lets devices work. Called before vCPUs go on.
    pub fn go_on(&self) {
        self.devices.iter().for_each(|device| device.go_on());
    }

    /// Ends the thread that works for the devices; it may wait for guest memory until `deadline`.
    pub fn finish(&self, deadline: Instant) -> Result<(), Error> {
        if self.thread.as_ref().is_none_or(|thread| thread.finish(deadline)) {
            return Ok(());
        }
        Err(memory::Error::Stuck("device thread").into())
    }

    /// The state of all devices. Called after `quiesce`.
    pub fn save(&self) -> Result<Vec<SavedDevice>, Error> {
        self.devices.iter().map(|device| SavedDevice::of(device)).collect()
    }

    /// Restores the transports' saved state. The devices themselves were made from their own.
    pub fn restore(&self, saved: &[SavedDevice]) -> Result<(), Error> {
        self.devices.iter().zip(saved).try_for_each(|(device, saved)| Ok(device.restore(&saved.transport)?))
    }

    /// Takes all devices back to the saved state that they were restored from, and their configs to `configs`. Called
    /// after `quiesce`.
    ///
    /// # Errors
    /// A device cannot go back; none may be used afterwards.
    pub fn rewind(&mut self, saved: &[SavedDevice], configs: &DeviceConfigs) -> Result<(), Error> {
        self.configs = configs.clone();
        self.devices.iter().zip(saved).try_for_each(|(device, saved)| {
            device.rewind(&saved.transport, &saved.device)?;
            Ok(())
        })
    }

    /// Ends all devices, so that their files, sockets and taps are free again. Called after `quiesce`.
    ///
    /// # Errors
    /// The thread of the devices does not end until `deadline`; it still uses them.
    pub fn retire(&mut self, deadline: Instant) -> Result<(), Error> {
        self.finish(deadline)?;
        self.thread = None;
        self.devices.iter().for_each(|device| device.retire());
        Ok(())
    }

    /// Puts `devices`, which were made from `saved` for `memory`, in the places of those that [`retire`](Self::retire)
    /// has ended, and starts their thread. They stay quiet until [`go_on`](Self::go_on).
    ///
    /// # Errors
    /// A device has another type or other queues than the former one.
    pub fn renew(
        &mut self,
        devices: Vec<Box<dyn VirtioDevice>>,
        memory: &Memory,
        saved: &[SavedDevice],
        configs: DeviceConfigs,
    ) -> Result<(), Error> {
        for ((transport, device), saved) in self.devices.iter().zip(devices).zip(saved) {
            transport.renew(device, memory, &saved.transport)?;
        }
        self.configs = configs;
        self.start()
    }

    /// Passes the device called `name`, if it is a `D`, to `work`, which returns whether its configuration space has
    /// changed.
    pub fn with<D: VirtioDevice, R>(&self, name: &str, work: impl FnOnce(&mut D) -> (R, bool)) -> Option<R> {
        let mut work = Some(work);
        self.devices.iter().filter(|device| device.name() == name).find_map(|device| {
            device.with_device(|device: &mut D| match work.take() {
                Some(work) => {
                    let (result, changed) = work(device);
                    (Some(result), changed)
                }
                None => (None, false),
            })?
        })
    }

    /// Counters of all devices by name.
    pub fn metrics(&self) -> serde_json::Value {
        self.devices.iter().map(|device| (device.name(), device.metrics())).collect()
    }
}
