//! `rng`: random bytes from a virtio entropy device.

use super::{Ctx, Reply};
use crate::alloc::address;
use crate::virtio::{self, Buffer, Device, Queue};
use tvmm_guest::PAGE_SIZE;
use tvmm_guest::args::{Args, Message};
use tvmm_guest::digest::Digest;

const ENTROPY: u32 = 4;
const BYTES_MAX: u64 = 1 << 20;

/// The device, once it was found.
pub struct State {
    device: Option<(Device, Queue)>,
}

impl State {
    pub const fn new() -> Self {
        Self { device: None }
    }
}

/// `rng bytes=N irq=0`: the digest is that of the bytes.
pub fn rng(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let wanted = args.number_in("bytes", 1..=BYTES_MAX, 64)?;
    let irq = args.number_in("irq", 0..=1, 0)? == 1;
    if ctx.rng.device.is_none() {
        let device = Device::find(ENTROPY, 0, 0)?;
        let queue = device.queue(0, 16, &mut ctx.pages)?;
        device.start();
        ctx.rng.device = Some((device, queue));
    }
    let run = virtio::buffers(&mut ctx.pages, wanted.div_ceil(PAGE_SIZE))?;
    let result = fill(ctx, address(run), wanted, irq);
    let mut digest = Digest::new();
    if result.is_ok() {
        // SAFETY: `wanted` bytes of `run`, which is mapped; the device has given them back.
        digest.bytes(unsafe { core::slice::from_raw_parts(address(run) as *const u8, wanted as usize) });
        // SAFETY: the device has given the buffer back, and only this function knows it.
        let _ = unsafe { ctx.pages.free(run) };
    }
    let kicks = result?;
    Ok(Reply::new(digest.finish(), format_args!("bytes={wanted} kicks={kicks}")))
}

fn fill(ctx: &mut Ctx, mut at: u64, mut left: u64, irq: bool) -> Result<u64, Message> {
    let Some((device, queue)) = &mut ctx.rng.device else { return Ok(0) };
    let before = queue.kicks;
    while left > 0 {
        queue.add(&[Buffer { at, len: left as u32, write: true }]);
        queue.kick(1);
        let (_, len) = queue.wait(device, irq)?;
        let got = u64::from(len).clamp(1, left);
        (at, left) = (at + got, left - got);
    }
    Ok(queue.kicks - before)
}

/// `rng_break rounds=N`: resets the device and breaks it, again and again, as a hostile driver may.
pub fn rng_break(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let rounds = args.number_in("rounds", 1..=u64::MAX, 1)?;
    ctx.rng.device = None;
    let mut broken = 0;
    for _ in 0..rounds {
        let device = Device::find(ENTROPY, 0, 0)?;
        device.start_broken();
        broken += u64::from(device.is_broken());
    }
    Ok(Reply::named("rng_break", format_args!("rounds={rounds} broken={broken}")))
}
