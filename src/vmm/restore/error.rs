//! Errors of making a machine from a snapshot's state.

use crate::config::overrides::NoSuchDevice;

/// A machine cannot be made of a snapshot's state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error(
        "The snapshot has a device that this build of tvmm does not have (number {index}, virtio device type \
         {device_type}); restore with the version that wrote it"
    )]
    DeviceMissing { index: usize, device_type: u32 },
    #[error(
        "The snapshot has copies of its drives ({ids}): say where this VM's own copies of them are to be made \
         (--drive-dir DIR, tvmm.drive_dir), or name other images (--drive ID=PATH, tvmm.drive_overrides)"
    )]
    DriveDirNeeded { ids: String },
    #[error("The snapshot has no copy of a drive that would go to the drive directory; leave it out")]
    DriveDirUseless,
    #[error("Section {section} of the snapshot's state is not valid: {what}")]
    Section { section: String, what: String },
    #[error("This host cannot run the snapshot: {}", .0.join("; "))]
    Host(Vec<String>),
    #[error(
        "Cannot move the guest's clock on to the present: the host of the snapshot could not tell the guest's clock \
         and its own together (KVM_CLOCK_REALTIME)"
    )]
    NoRealtime,
    #[error(transparent)]
    NoSuchDevice(#[from] NoSuchDevice),
}
