//! The message of Firecracker's page-fault protocol that tells a handler where guest memory is mapped.

use serde::{Deserialize, Serialize};

/// One range of guest memory, with Firecracker's field names.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mapping {
    pub base_host_virt_addr: u64,
    pub size: usize,
    /// Offset of the range in the memory file.
    pub offset: u64,
    #[serde(default)]
    pub page_size: usize,
    /// Deprecated name of `page_size`; older handlers read it.
    #[serde(default)]
    pub page_size_kib: usize,
}
