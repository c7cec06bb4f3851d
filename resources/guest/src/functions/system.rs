//! `hello`, `clock`, `info`.

use super::{Ctx, Reply};
use crate::arch::{cpuid, port};
use crate::clock as time;
use tvmm_guest::args::{Args, Message};
use tvmm_guest::digest::Digest;
use tvmm_guest::message;
use tvmm_guest::text::Text;

/// The smallest request: nothing but the protocol.
#[cfg(not(feature = "functions"))]
pub fn hello(_: &Args, _: &mut Ctx) -> Result<Reply, Message> {
    Ok(Reply::named("hello, world", format_args!("")))
}

/// `mono_ns wall_ns source`
pub fn clock(_: &Args, _: &mut Ctx) -> Result<Reply, Message> {
    let keys = format_args!("mono_ns={} wall_ns={} source={}", time::now_ns(0), time::wall_ns(0), time::source());
    Ok(Reply::named("clock", keys))
}

/// `murmur times=N ms=T`: writes a byte to the serial port and computes for T ms, N times, then ends the line. It does
/// not read the line status, nor do anything else that leaves the guest.
pub fn murmur(args: &Args, _: &mut Ctx) -> Result<Reply, Message> {
    const TRANSMIT: u16 = 0x3f8;
    let times = args.number_in("times", 1..=1000, 1)?;
    let ms = args.number_in("ms", 1..=60_000, 1)?;
    for _ in 0..times {
        port::write(TRANSMIT, b'~');
        let end_ns = time::now_ns(0) + ms * 1_000_000;
        while time::now_ns(0) < end_ns {
            core::hint::spin_loop();
        }
    }
    port::write(TRANSMIT, b'\n');
    Ok(Reply::named("murmur", format_args!("times={times}")))
}

/// The first 256 bytes of `opt/tvmm/metadata`, blanks removed; by the firmware configuration device (QEMU
/// docs/specs/fw_cfg.rst).
pub fn metadata(_: &Args, _: &mut Ctx) -> Result<Reply, Message> {
    const SELECTOR: u16 = 0x510;
    const DATA: u16 = 0x511;
    const SIGNATURE: u16 = 0;
    const FILE: u16 = 0x20;
    port::write_word(SELECTOR, SIGNATURE);
    if [0; 4].map(|_: u8| port::read(DATA)) != *b"QEMU" {
        return Err(message!("no firmware configuration device"));
    }
    port::write_word(SELECTOR, FILE);
    let mut text = [0; 256];
    let mut len = 0;
    for _ in 0..text.len() {
        let byte = port::read(DATA);
        if byte.is_ascii_graphic() {
            text[len] = byte;
            len += 1;
        }
    }
    let mut digest = Digest::new();
    digest.bytes(&text[..len]);
    Ok(Reply::new(digest.finish(), format_args!("json={}", core::str::from_utf8(&text[..len]).unwrap_or("?"))))
}

/// Facts about this kernel and its machine.
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
