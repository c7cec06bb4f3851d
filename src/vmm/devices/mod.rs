//! The virtio devices of a machine: their places, their connection to KVM, and the thread that works for them.

mod balloon;
mod build;
mod drives;
mod host_places;
mod limits;
mod patch;
mod pmem;
mod saved;
mod thread;
mod virtio_devices;

pub use balloon::none as no_balloon;
pub use build::{check_saved, from_configs, from_saved};
pub use drives::{WritableDrive, root_args};
pub use host_places::of_snapshot as host_places;
pub use pmem::{images as pmem_images, pmem_root_args};
pub use saved::SavedDevice;
pub use virtio_devices::VirtioDevices;
