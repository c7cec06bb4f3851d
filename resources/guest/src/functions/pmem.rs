//! `pmem`: an image of the host as memory (VIRTIO 1.2, 5.19).

use super::{Ctx, Reply};
use crate::alloc::address;
use crate::paging;
use crate::virtio::{self, Buffer, Device};
use tvmm_guest::args::{Args, Message};
use tvmm_guest::digest::{PageDigest, page_key, pattern};
use tvmm_guest::{PAGE_SIZE, PAGE_WORDS, message};

const PMEM: u32 = 27;
const FLUSH: u32 = 0;
const UNANSWERED: u32 = u32::MAX;

type Page = [u64; PAGE_WORDS as usize];

/// `pmem nth=0 [first=0] [pages=all] [write=SEED]`: the digest is that of the pages. With `write=` the pages are
/// written and flushed first: `ret` is the host's answer.
pub fn pmem(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let device = Device::find(PMEM, args.number_in("nth", 0..=18, 0)? as u32, 0)?;
    let field = |at| u64::from(device.config(at)) | u64::from(device.config(at + 4)) << 32;
    let (start, size) = (field(0), field(8));
    let all = size / PAGE_SIZE;
    let first = args.number_in("first", 0..=all - 1, 0)?;
    let count = args.number_in("pages", 1..=all - first, all - first)?;
    paging::map(start, size, &mut ctx.pages).map_err(|e| message!("{e}"))?;
    let page = |index: u64| (start + (first + index) * PAGE_SIZE) as *mut Page;
    let mut answer = FLUSH;
    if let Some(seed) = args.number("write")? {
        for index in 0..count {
            let key = page_key(seed, index);
            // SAFETY: mapped just now, without any other user.
            unsafe { page(index).write_volatile(core::array::from_fn(|word| pattern(key, word as u64))) };
        }
        answer = flush(device, ctx)?;
    }
    let mut digest = PageDigest::new();
    for index in 0..count {
        // SAFETY: as above, and nothing writes it now.
        digest.page(unsafe { &*page(index) });
    }
    Ok(Reply::new(digest.finish(), format_args!("gpa={start:#x} size={size} pages={count} ret={answer}")))
}

/// Asks the host to make the writes durable; returns its answer.
fn flush(device: Device, ctx: &mut Ctx) -> Result<u32, Message> {
    let mut queue = device.queue(0, 8, &mut ctx.pages)?;
    device.start();
    let run = virtio::buffers(&mut ctx.pages, 1)?;
    let at = address(run);
    // SAFETY: just allocated, without any other user.
    unsafe {
        (at as *mut u32).write_volatile(FLUSH);
        ((at + 8) as *mut u32).write_volatile(UNANSWERED);
    }
    queue.add(&[Buffer { at, len: 4, write: false }, Buffer { at: at + 8, len: 4, write: true }]);
    queue.kick(1);
    queue.wait(&device, false)?;
    // SAFETY: as above; the host has given it back.
    Ok(unsafe { ((at + 8) as *const u32).read_volatile() })
}
