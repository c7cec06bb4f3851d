//! `alloc`, `free`: memory that is in use, or was, and holds nothing.

use super::{Ctx, Reply};
use crate::alloc::address;
use tvmm_guest::args::{Args, Message};
use tvmm_guest::frames::Run;
use tvmm_guest::message;

const HANDLES_MAX: usize = 256;

/// Runs that `alloc` gave out, by handle. A handle is never used twice.
pub struct Handles {
    slots: [Option<(u64, Run)>; HANDLES_MAX],
    last: u64,
}

impl Handles {
    pub const fn new() -> Self {
        Self { slots: [None; HANDLES_MAX], last: 0 }
    }
}

/// `alloc pages=N`: contiguous pages, not touched.
pub fn alloc(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let count = args.number("pages")?.unwrap_or(0);
    let handles = &mut ctx.handles;
    let slot = handles.slots.iter_mut().find(|s| s.is_none());
    let slot = slot.ok_or_else(|| message!("more than {HANDLES_MAX} handles"))?;
    let free = ctx.pages.free_pages();
    let run = ctx.pages.alloc(count).map_err(|e| message!("{e}: {free} pages are free"))?;
    handles.last += 1;
    let handle = handles.last;
    *slot = Some((handle, run));
    Ok(Reply::named("alloc", format_args!("handle={handle} gpa={:#x}", address(run))))
}

/// `free handle=H | filled=1`
pub fn free(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let before = ctx.pages.free_pages();
    match (args.number("handle")?, args.number("filled")?) {
        (Some(handle), None) => {
            let slots = &mut ctx.handles.slots;
            let slot = slots.iter_mut().find(|s| s.is_some_and(|(h, _)| h == handle));
            let slot = slot.ok_or_else(|| message!("no handle {handle}"))?;
            if let Some((_, run)) = *slot {
                // SAFETY: the handle is the only way to these pages, and it goes.
                unsafe { ctx.pages.free(run) }.map_err(|e| message!("{e}"))?;
            }
            *slot = None;
        }
        (None, Some(1)) => ctx.filled.free(&mut ctx.pages).map_err(|e| message!("{e}"))?,
        _ => return Err(message!("free needs either handle= or filled=1")),
    }
    let freed = ctx.pages.free_pages() - before;
    Ok(Reply::named("free", format_args!("pages={freed}")))
}
