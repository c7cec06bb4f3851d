//! The parts of a machine that a process keeps when it becomes another VM.

/// Machines of the same shape can follow each other in one process, as far as the service can tell. The VMM compares
/// the rest (docs/lifecycle.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub vcpus: u8,
    pub memory_mib: u64,
    pub track_dirty_pages: bool,
    pub has_drive: bool,
    pub has_vsock: bool,
}

/// The place that a VM needs.
#[derive(Clone, Copy, Debug)]
pub struct Need<'a> {
    /// The function of the VM.
    pub func_name: &'a str,
    pub memory_mib: u64,
    /// The shape of its machine; `None` if only a process of its own can make it.
    pub shape: Option<Shape>,
}
