//! The twelve functions of docs/functions.md in the protocol: `prepare` before the snapshot, then each by its name.

use super::{Ctx, Function, Reply, function};
use crate::heap::HEAP;
use tvmm_guest::args::{Args, Key, Message, optional, required, short};
use tvmm_guest::message;
use tvmm_guest::workloads::{Input, RUNTIME_MIB, WORKLOADS, Workload, find};

const MIB: u64 = 1 << 20;
const RUNTIME_MIB_MAX: u64 = 64 << 10;
const KEYS: &[Key] = &[optional("input"), optional("size")];

pub static FUNCTIONS: &[Function] = &[
    function("prepare", &[required("function"), optional("runtime"), optional("size")], prepare),
    function(WORKLOADS[0].name, KEYS, invoke::<0>),
    function(WORKLOADS[1].name, KEYS, invoke::<1>),
    function(WORKLOADS[2].name, KEYS, invoke::<2>),
    function(WORKLOADS[3].name, KEYS, invoke::<3>),
    function(WORKLOADS[4].name, KEYS, invoke::<4>),
    function(WORKLOADS[5].name, KEYS, invoke::<5>),
    function(WORKLOADS[6].name, KEYS, invoke::<6>),
    function(WORKLOADS[7].name, KEYS, invoke::<7>),
    function(WORKLOADS[8].name, KEYS, invoke::<8>),
    function(WORKLOADS[9].name, KEYS, invoke::<9>),
    function(WORKLOADS[10].name, KEYS, invoke::<10>),
    function(WORKLOADS[11].name, KEYS, invoke::<11>),
];

/// `prepare function=NAME [runtime=MiB] [size=N]`
fn prepare(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let name = args.get("function").unwrap_or("");
    let workload = find(name).ok_or_else(|| message!("prepare: no function {}", short(name)))?;
    let runtime = match args.get("runtime") {
        Some(_) => Some(args.number_in("runtime", 0..=RUNTIME_MIB_MAX, RUNTIME_MIB)?),
        None => None,
    };
    let size = args.number("size")?;
    workload.check_size(size)?;
    check_memory(ctx.workloads.prepare_needs(workload, runtime, size))?;
    ctx.workloads.prepare(workload, runtime, size)?;
    let keys = format_args!("kept={} free={}", ctx.workloads.bytes(), HEAP.longest_free());
    Ok(Reply::named("prepare", keys))
}

/// `NAME [input=a|b | size=N]`
fn invoke<const INDEX: usize>(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let workload: &Workload = &WORKLOADS[INDEX];
    let input = match (args.get("input"), args.number("size")?) {
        (Some(_), Some(_)) => return Err(message!("input and size exclude each other")),
        (_, Some(size)) => Input::Size(size),
        (None | Some("a"), None) => Input::A,
        (Some("b"), None) => Input::B,
        (Some(other), None) => return Err(message!("input={} is not a or b", short(other))),
    };
    if let Input::Size(size) = input {
        workload.check_size(Some(size))?;
    }
    check_memory(ctx.workloads.invoke_needs(workload, input))?;
    let before = HEAP.watch();
    let outcome = ctx.workloads.invoke(workload, input)?;
    let (read, written) = outcome.runtime;
    let heap_kib = (HEAP.peak() - before) / 1024;
    let keys =
        format_args!("result={} runtime_read={read} runtime_written={written} heap_kib={heap_kib}", outcome.result);
    Ok(Reply::new(outcome.digest, keys))
}

/// Refuses a request that the heap has no room for: running out of it in the middle ends the guest.
fn check_memory(bytes: u64) -> Result<(), Message> {
    let free = HEAP.longest_free();
    if bytes > free {
        return Err(message!("needs up to {} MiB of heap, {} are free", bytes.div_ceil(MIB), free / MIB));
    }
    Ok(())
}
