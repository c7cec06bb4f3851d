//! `hello`, `clock`, `info`.

use super::{Ctx, Reply};
use crate::arch::cpuid;
use crate::clock as time;
use tvmm_guest::args::{Args, Message};
use tvmm_guest::text::Text;

/// The smallest request: nothing but the protocol.
pub fn hello(_: &Args, _: &mut Ctx) -> Result<Reply, Message> {
    Ok(Reply::named("hello, world", format_args!("")))
}

/// `mono_ns wall_ns source`
pub fn clock(_: &Args, _: &mut Ctx) -> Result<Reply, Message> {
    let keys = format_args!("mono_ns={} wall_ns={} source={}", time::now_ns(0), time::wall_ns(0), time::source());
    Ok(Reply::named("clock", keys))
}

/// What this kernel is and found.
pub fn info(_: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let vendor = cpuid::vendor();
    let vendor = Text::<64>::of(format_args!("{}", vendor.trim_ascii().escape_ascii()));
    let keys = format_args!(
        "version={} mem={} vcpus={} pt={} init_on_free={} free_pages={} filled_pages={} clock={} \
         boot={} cpu={} simd={}",
        env!("CARGO_PKG_VERSION"),
        ctx.mem_mib,
        ctx.cpus.count(),
        ctx.config.page_tables.name(),
        u8::from(ctx.config.init_on_free),
        ctx.pages.free_pages(),
        ctx.filled.pages(),
        time::source(),
        ctx.protocol.name(),
        vendor,
        cpuid::Simd::detect().name(),
    );
    Ok(Reply::named("info", keys))
}
