//! The thread that serves all virtio devices of a machine: it waits for kicks and for the devices' own descriptors.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::virtio::{MmioDevice, Source};
use crate::sys::raw_descriptor::RawDescriptor;
use crate::sys::worker::Worker;
use crate::vmm::error::Error;

/// Event numbers: `KICK`, a queue above `QUEUE`, or a source's token above `SOURCE`.
const KICK: u32 = 0;
const QUEUE: u32 = 1;
const SOURCE: u32 = 1 << 16;
const STOP: u32 = u32::MAX;

/// Starts the thread of `devices`.
pub fn start(devices: &[Arc<MmioDevice>]) -> Result<Worker, Error> {
    let stop = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(Error::os("make an eventfd"))?);
    let stopped = Arc::new(AtomicBool::new(false));
    let mut manager = EventManager::<Subscriber>::new().map_err(|error| failed(&error))?;
    manager.add_subscriber(Subscriber::Stop { event: stop.clone(), stopped: stopped.clone() });
    for device in devices {
        let queues = device.queue_events().map_err(Error::os("copy an eventfd"))?;
        let sources = device.sources();
        manager.add_subscriber(Subscriber::Device { device: device.clone(), queues, sources });
    }
    let work = move || {
        while !stopped.load(Ordering::Relaxed) {
            if let Err(error) = manager.run() {
                tracing::error!(%error, "The thread of the devices cannot wait for events");
                return;
            }
        }
    };
    let worker = Worker::start(Builder::new().name("devices".into()), move || drop(stop.write(1)), work);
    worker.map_err(Error::os("start the thread of the devices"))
}

fn failed(error: &event_manager::Error) -> Error {
    Error::Os { doing: "wait for the devices' events", source: std::io::Error::other(error.to_string()) }
}

enum Subscriber {
    Device { device: Arc<MmioDevice>, queues: Vec<EventFd>, sources: Vec<Source> },
    Stop { event: Arc<EventFd>, stopped: Arc<AtomicBool> },
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        match (self, events.data()) {
            (Subscriber::Stop { stopped, .. }, _) => stopped.store(true, Ordering::Relaxed),
            (Subscriber::Device { device, .. }, KICK) => device.look_at_all(),
            (Subscriber::Device { device, .. }, token @ SOURCE..) => device.source_ready(token - SOURCE),
            (Subscriber::Device { device, .. }, queue) => device.queue_kicked((queue - QUEUE) as usize),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let mut watch = |fd: RawFd, token: u32, events: EventSet| {
            if let Err(error) = ops.add(Events::with_data(&RawDescriptor(fd), token, events)) {
                tracing::error!(%error, "A device's events cannot be waited for");
            }
        };
        match self {
            Subscriber::Stop { event, .. } => watch(event.as_raw_fd(), STOP, EventSet::IN),
            Subscriber::Device { device, queues, sources } => {
                watch(device.kick_event().as_raw_fd(), KICK, EventSet::IN);
                for (index, queue) in queues.iter().enumerate() {
                    watch(queue.as_raw_fd(), QUEUE + index as u32, EventSet::IN);
                }
                for source in sources {
                    watch(source.fd, SOURCE + source.token, EventSet::IN | EventSet::EDGE_TRIGGERED);
                }
            }
        }
    }
}
