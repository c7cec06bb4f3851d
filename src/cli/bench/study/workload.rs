//! The functions that are measured: what is done before the snapshot, and the requests.

use serde_json::{Value, json};

use crate::vmm::guest;

/// A function of the built-in guest, with its inputs.
#[derive(Debug)]
pub struct Workload {
    pub name: &'static str,
    /// Guest memory, MiB.
    pub mem_mib: u64,
    /// The request before the snapshot; empty if there is none.
    pub prepare: &'static str,
    /// The smaller input, which is recorded.
    pub a: &'static str,
    /// The larger one, which is asked for.
    pub b: &'static str,
    /// Requests of six sizes, ascending; empty where size means nothing.
    pub sizes: &'static [&'static str],
}

impl Workload {
    /// The machine, as Firecracker's `machine-config` has it.
    pub fn machine(&self) -> Value {
        json!({ "vcpu_count": 1, "mem_size_mib": self.mem_mib })
    }

    /// The whole configuration.
    pub fn config(&self) -> Value {
        json!({ "boot-source": {}, "machine-config": self.machine() })
    }

    /// The kernel that other VMMs boot.
    pub fn kernel(&self) -> &'static [u8] {
        guest::ELF
    }
}

pub static WORKLOADS: [Workload; 1] = [Workload {
    name: "hello",
    mem_mib: 512,
    prepare: "fill pages=24576 seed=1",
    a: "touch pages=2000 write=10 seed=5",
    b: "touch pages=2000 write=10 seed=5",
    sizes: &[],
}];
