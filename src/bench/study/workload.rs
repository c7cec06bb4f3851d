//! The measured functions: the requests before the snapshot, and those after. docs/functions.md says what they compute;
//! the sizes are those of FaaSnap's six inputs.

use serde_json::{Value, json};

/// Guest memory, MiB: the largest functions have 600 MiB of their own.
const MEM_MIB: u64 = 1024;

/// A function of the built-in functions guest.
#[derive(Debug)]
pub struct Workload {
    pub name: &'static str,
    /// Five or six sizes of input, ascending, in the function's own unit; empty if it has no size.
    pub sizes: &'static [u64],
    input: Input,
}

/// The time at which the guest makes a function's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    /// Before the snapshot, by a request of its own.
    MadeBefore,
    /// In the request that uses it.
    MadeInRequest,
}

/// The inputs that a workload's guest is prepared for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inputs {
    /// A and B.
    Two,
    /// Also those of all sizes.
    Sizes,
}

const fn workload(name: &'static str, input: Input, sizes: &'static [u64]) -> Workload {
    Workload { name, sizes, input }
}

const JSON_BYTES: &[u64] = &[200_000, 400_000, 750_000, 759_000, 1_500_000, 3_000_000];
const IMAGE_BYTES: &[u64] = &[100_000, 200_000, 400_000, 409_000, 800_000, 1_600_000];

/// All of them, in the order of FaaSnap's list. If two of the six inputs have one size, five are left.
pub static WORKLOADS: [Workload; 12] = [
    workload("hello", Input::MadeInRequest, &[]),
    workload("readlist", Input::MadeInRequest, &[]),
    workload("mmap", Input::MadeInRequest, &[]),
    workload("image", Input::MadeBefore, IMAGE_BYTES),
    workload("json", Input::MadeBefore, JSON_BYTES),
    workload("pyaes", Input::MadeInRequest, &[5_000, 10_000, 20_000, 40_000, 80_000]),
    workload("chameleon", Input::MadeInRequest, &[10_000, 20_000, 40_000, 80_000, 160_000]),
    workload("matmul", Input::MadeInRequest, &[500, 700, 1000, 1400, 2000]),
    workload("ffmpeg", Input::MadeBefore, &[100_000, 200_000, 399_000, 400_000, 800_000, 1_500_000]),
    workload("compression", Input::MadeBefore, JSON_BYTES),
    workload("recognition", Input::MadeBefore, IMAGE_BYTES),
    workload("pagerank", Input::MadeInRequest, &[25_000, 50_000, 100_000, 200_000, 400_000]),
];

impl Workload {
    /// The machine in the form of Firecracker's `machine-config`.
    pub fn machine(&self) -> Value {
        json!({ "vcpu_count": 1, "mem_size_mib": MEM_MIB })
    }

    /// The requests before the snapshot, an invocation among them as in FaaSnap's harness: the snapshot is of an
    /// instance that has run. `runtime_mib` is the size of the runtime image; `None`: the guest's default.
    pub fn prepare(&self, inputs: Inputs, runtime_mib: Option<u64>) -> Vec<String> {
        let runtime = runtime_mib.map(|mib| format!(" runtime={mib}")).unwrap_or_default();
        let mut requests = vec![format!("prepare function={}{runtime}", self.name), self.a()];
        if inputs == Inputs::Sizes && self.input == Input::MadeBefore {
            requests.extend(self.sizes.iter().map(|size| format!("prepare function={} size={size}", self.name)));
        }
        requests
    }

    /// A function whose VM may become that of `workload`: `json`, or for itself `hello`.
    pub fn other_than(workload: &Workload) -> &'static Workload {
        let name = if workload.name == "json" { "hello" } else { "json" };
        WORKLOADS.iter().find(|other| other.name == name).unwrap_or(&WORKLOADS[0])
    }

    /// The smaller input, for the recorded run.
    pub fn a(&self) -> String {
        format!("{} input=a", self.name)
    }

    /// The larger input, for the measured run.
    pub fn b(&self) -> String {
        format!("{} input=b", self.name)
    }

    /// The request with an input of a size.
    pub fn of_size(&self, size: u64) -> String {
        format!("{} size={size}", self.name)
    }
}
