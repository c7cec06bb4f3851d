//! What can go wrong while a machine is built, run, captured or restored.

use std::io;
use std::path::PathBuf;

use super::media;
use crate::{devices, snapshot, tiering};

/// The one error of the vmm room. Each says what was being done to what; causes are chained.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "Cannot open /dev/kvm: it does not exist. Load the module for this CPU (`modprobe kvm_intel` or `modprobe kvm_amd`); inside a VM, its host must allow nested virtualisation"
    )]
    KvmMissing,
    #[error(
        "Cannot open /dev/kvm: permission denied. Add this user to the group that owns it (`usermod -aG kvm USER`, then log in again), or run as root"
    )]
    KvmDenied,
    #[error(
        "/dev/kvm is {0}, not KVM's device. Remove it and make the device (`mknod /dev/kvm c 10 232`), or give the container the host's (`--device /dev/kvm`)"
    )]
    KvmNoDevice(&'static str),
    #[error("Cannot {doing}")]
    Kvm { doing: &'static str, source: kvm_ioctls::Error },
    #[error("This host's KVM has API version {0}, tvmm needs 12")]
    KvmVersion(i32),
    #[error("Cannot {doing} of vCPU {vcpu}")]
    Vcpu { doing: &'static str, vcpu: u8, source: kvm_ioctls::Error },
    #[error("KVM refuses to set MSR {index:#x} of vCPU {vcpu} to {value:#x}")]
    MsrRefused { vcpu: u8, index: u32, value: u64 },
    #[error(
        "vCPU {0} did not stop in time: it waits in the kernel, most likely for memory that does not come (a file system that hangs, a page-fault handler that does not answer)"
    )]
    VcpuStuck(u8),
    #[error("The {0} did not stop in time: it waits for memory from a file that hangs")]
    Stuck(&'static str),
    #[error("Cannot start the thread of vCPU {vcpu}")]
    VcpuThread { vcpu: u8, source: io::Error },
    #[error("Cannot reserve {mib} MiB of address space for guest memory")]
    Reserve { mib: u64, source: io::Error },
    #[error("Cannot map {pages} pages of guest memory at {gpa:#x}")]
    Map { gpa: u64, pages: u64, source: io::Error },
    #[error("Guest memory was no longer served while the machine was restored: {0}")]
    Unserved(String),
    #[error("{0}")]
    Lost(String),
    #[error("{pages} pages at {gpa:#x} are not guest memory")]
    OutsideRam { gpa: u64, pages: u64 },
    #[error("Cannot build the view of guest memory: {0}")]
    MemoryView(String),
    #[error("Cannot access guest memory at {gpa:#x} to write the {what}")]
    GuestAccess { what: &'static str, gpa: u64, source: vm_memory::GuestMemoryError },
    #[error("Cannot open the kernel image {path}")]
    KernelOpen { path: PathBuf, source: io::Error },
    #[error("Cannot load the kernel image {name}: {what}")]
    KernelLoad { name: String, what: String },
    #[error("The kernel {name} does not fit into guest memory: it ends at {end:#x}, memory already at {ram_end:#x}")]
    KernelTooLarge { name: String, end: u64, ram_end: u64 },
    #[error("The kernel command line is {len} bytes long, at most {max} fit", max = super::arch::layout::CMDLINE_MAX - 1)]
    CmdlineTooLong { len: usize },
    #[error("The kernel command line cannot be used: {0}")]
    Cmdline(String),
    #[error("Cannot use the initrd {path}: {what}")]
    Initrd { path: PathBuf, what: String },
    #[error("The initrd {path} does not fit into guest memory: it has {len} bytes, above the kernel are {room}")]
    InitrdTooLarge { path: PathBuf, len: u64, room: u64 },
    #[error("The kernel command line has a NUL byte or a character outside ASCII")]
    CmdlineCharacters,
    #[error("The kernel image {name} cannot be entered by {protocol}: {what}")]
    BootProtocol { name: String, protocol: &'static str, what: &'static str },
    #[error("Guest memory of {mib} MiB is too small: boot parameters and kernel need at least 2 MiB")]
    TooSmall { mib: u64 },
    #[error("The CPU template (cpu-config) cannot be used: {0}")]
    CpuTemplate(String),
    #[error("A device failed")]
    Device(#[from] devices::Error),
    #[error(
        "The snapshot has a device that this build of tvmm does not have (number {index}, virtio device type {device_type}); restore with the version that wrote it"
    )]
    DeviceMissing { index: usize, device_type: u32 },
    #[error("The snapshot has no {kind} `{id}` to override; it has: {has}")]
    NoSuchDevice { kind: &'static str, id: String, has: String },
    #[error(
        "The snapshot has copies of its drives ({ids}): say where this VM's own copies of them are to be made (--drive-dir DIR, tvmm.drive_dir), or name other images (--drive ID=PATH, tvmm.drive_overrides)"
    )]
    DriveDirNeeded { ids: String },
    #[error("The snapshot has no copy of a drive that would go to the drive directory; leave it out")]
    DriveDirUseless,
    #[error("The request is to be made over vsock, but the machine has no vsock device")]
    NoVsock,
    #[error("A page-fault handler serves all memory, and so does a pool, cold or not: give one of them")]
    PoolAndHandler,
    #[error("Cannot keep plans and working-set images in {path}", path = path.display())]
    PlanDir { path: PathBuf, source: io::Error },
    #[error("`{text}` is no cold pool: {problem}")]
    ColdSpec { text: String, problem: String },
    #[error(transparent)]
    Otlp(#[from] super::otlp::Unusable),
    #[error("The page-fault handler cannot go on: {0}")]
    Handler(String),
    #[error("Cannot listen at {address}")]
    Listen { address: String, source: io::Error },
    #[error(
        "Cannot trust pool {path}: {bytes} bytes for guest-physical {gpa:#x} do not match their checksums. Restore without the pool, or remove the snapshot from it and add it again (`tvmm pool fsck` tells what is damaged)"
    )]
    PoolMemory { path: PathBuf, gpa: u64, bytes: u64 },
    #[error("Cannot {doing}")]
    Os { doing: &'static str, source: io::Error },
    #[error("Cannot {doing} {path}")]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    #[error(transparent)]
    Medium(#[from] media::Error),
    #[error(transparent)]
    Policy(#[from] tiering::Error),
    #[error("Section {section} of the snapshot's state is not valid: {what}")]
    State { section: String, what: String },
    #[error("This host cannot run the snapshot: {}", .0.join("; "))]
    Host(Vec<String>),
    #[error(
        "Cannot move the guest's clock on to the present: the host of the snapshot could not tell the guest's clock and its own together (KVM_CLOCK_REALTIME)"
    )]
    NoRealtime,
    #[error("Cannot take a diff snapshot: {0}")]
    Diff(String),
    #[error("The run cannot be recorded: {0}")]
    Record(String),
    #[error("Cannot take a snapshot: memory that the guest reads from an image {0}")]
    Uncompared(&'static str),
    #[error("Another snapshot of this VM is still being sealed")]
    SnapshotInProgress,
    #[error(
        "Cannot use userfaultfd. Run as root, or give this user access to /dev/userfaultfd (it is enough that the file can be opened); on kernels without that file set vm.unprivileged_userfaultfd=1"
    )]
    Userfaultfd(#[source] io::Error),
}

impl Error {
    pub(super) fn kvm(doing: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
        move |source| Error::Kvm { doing, source }
    }

    pub(super) fn os(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Os { doing, source }
    }
}
