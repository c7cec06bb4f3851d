//! The message of Firecracker's page-fault protocol that says where guest memory is mapped.

use serde::{Deserialize, Serialize};

/// One range of guest memory, in Firecracker's words.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mapping {
    pub base_host_virt_addr: u64,
    pub size: usize,
    /// Of the range in the memory file.
    pub offset: u64,
    #[serde(default)]
    pub page_size: usize,
    /// Deprecated name of the same; older handlers read it.
    #[serde(default)]
    pub page_size_kib: usize,
}
