//! `vsock_connect` and `vsock_serve`: a virtio socket device from both ends of its connections.

use super::{Ctx, Reply};
use crate::alloc::address;
use crate::vsock::{
    CREDIT_REQUEST, CREDIT_UPDATE, Came, Header, PAYLOAD_MAX, REQUEST, RESPONSE, RST, RW, SHUT_BOTH, SHUT_SEND,
    SHUTDOWN, Vsock,
};
use crate::{protocol, virtio};
use tvmm_guest::args::{Args, Message};
use tvmm_guest::digest::{Digest, mix2};
use tvmm_guest::frames::Run;
use tvmm_guest::line::LineReader;
use tvmm_guest::{PAGE_SIZE, message};

const CONNECTIONS_MAX: usize = 1024;
const KIB: u64 = 1024;

/// The driver, once it was found, and the ports used so far.
pub struct State {
    driver: Option<Vsock>,
    next_port: u32,
    served: [Connection; CONNECTIONS_MAX],
}

impl State {
    pub const fn new() -> Self {
        Self { driver: None, next_port: 50000, served: [Connection::FREE; CONNECTIONS_MAX] }
    }

    /// The driver for the time of a function.
    fn take(ctx: &mut Ctx) -> Result<Vsock, Message> {
        match ctx.vsock.driver.take() {
            Some(driver) => Ok(driver),
            None => Vsock::find(&mut ctx.pages),
        }
    }
}

/// One end of a connection.
#[derive(Clone, Copy)]
struct Connection {
    open: bool,
    host: u32,
    guest: u32,
    /// Keeps received bytes until they were sent back.
    ring: Run,
    /// Bytes received, and bytes of them that were handled.
    received: u64,
    done: u64,
    told: u64,
    sent: u64,
    peer_alloc: u32,
    peer_done: u32,
    /// The host sends no more.
    ended: bool,
    /// The host was told that this end sends no more.
    shut: bool,
}

impl Connection {
    const FREE: Self = Self {
        open: false,
        host: 0,
        guest: 0,
        ring: Run { first: 0, pages: 0 },
        received: 0,
        done: 0,
        told: 0,
        sent: 0,
        peer_alloc: 0,
        peer_done: 0,
        ended: false,
        shut: false,
    };

    fn window(&self) -> u64 {
        self.ring.pages * PAGE_SIZE
    }

    fn header(&mut self, op: u16, len: u64, flags: u32) -> Header {
        self.told = self.done;
        let (buf_alloc, fwd_cnt) = (self.window() as u32, self.done as u32);
        Header { host: self.host, guest: self.guest, len: len as u32, op, flags, buf_alloc, fwd_cnt }
    }

    fn send(&mut self, driver: &mut Vsock, op: u16, flags: u32) -> Result<(), Message> {
        driver.send(&self.header(op, 0, flags), |_| ())
    }

    /// Sends `len` bytes that `fill` writes; the credit must be there.
    fn send_data(&mut self, driver: &mut Vsock, len: u64, fill: impl FnOnce(&mut [u8])) -> Result<(), Message> {
        self.sent += len;
        driver.send(&self.header(RW, len, 0), fill)
    }

    fn hear(&mut self, header: &Header) {
        (self.peer_alloc, self.peer_done) = (header.buf_alloc, header.fwd_cnt);
    }

    /// Bytes that the host has room for.
    fn credit(&self) -> u64 {
        u64::from(self.peer_alloc.saturating_sub((self.sent as u32).wrapping_sub(self.peer_done)))
    }

    fn update_credit(&mut self, driver: &mut Vsock) -> Result<(), Message> {
        match self.done - self.told >= self.window() / 2 {
            true => self.send(driver, CREDIT_UPDATE, 0),
            false => Ok(()),
        }
    }

    /// Sends received bytes back.
    fn echo(&mut self, driver: &mut Vsock) -> Result<(), Message> {
        while self.done < self.received {
            let offset = self.done % self.window();
            let len = (self.received - self.done).min(self.window() - offset).min(PAYLOAD_MAX).min(self.credit());
            if len == 0 {
                return Ok(());
            }
            let from = address(self.ring) + offset;
            self.done += len;
            // SAFETY: inside the ring, which only this connection has.
            let bytes = unsafe { core::slice::from_raw_parts(from as *const u8, len as usize) };
            self.send_data(driver, len, |to| to.copy_from_slice(bytes))?;
        }
        if self.ended && !self.shut {
            self.shut = true;
            self.send(driver, SHUTDOWN, SHUT_BOTH)?;
        }
        Ok(())
    }

    /// Keeps `bytes` in the ring.
    fn keep(&mut self, bytes: &[u8]) -> Result<(), Message> {
        if self.received - self.done + bytes.len() as u64 > self.window() {
            return Err(message!("the host sent more than there is room for"));
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let offset = self.received % self.window();
            let (now, later) = rest.split_at(rest.len().min((self.window() - offset) as usize));
            let to = (address(self.ring) + offset) as *mut u8;
            // SAFETY: inside the ring, which only this connection has.
            unsafe { core::ptr::copy_nonoverlapping(now.as_ptr(), to, now.len()) };
            self.received += now.len() as u64;
            rest = later;
        }
        Ok(())
    }
}

/// A digest that does not depend on the sizes of the packets.
struct Stream {
    digest: Digest,
    word: u64,
    count: u64,
}

impl Stream {
    fn new() -> Self {
        Self { digest: Digest::new(), word: 0, count: 0 }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while self.count.is_multiple_of(8)
            && let Some((word, more)) = rest.split_first_chunk()
        {
            self.word = u64::from_le_bytes(*word);
            self.digest.word(self.word);
            self.count += 8;
            rest = more;
        }
        for &byte in rest {
            self.word = self.word >> 8 | u64::from(byte) << 56;
            self.count += 1;
            if self.count.is_multiple_of(8) {
                self.digest.word(self.word);
            }
        }
    }

    fn finish(mut self) -> u64 {
        self.digest.word(self.word);
        self.digest.word(self.count);
        self.digest.finish()
    }
}

/// The bytes of a packet's payload.
fn payload(at: u64, len: u32) -> &'static [u8] {
    // SAFETY: inside a receive buffer (the driver has bounded `len`), which is not recycled before the bytes were used.
    unsafe { core::slice::from_raw_parts(at as *const u8, len as usize) }
}

/// `vsock_connect port=P bytes=N`: connects to the host, sends N bytes, receives until the host is done.
pub fn connect(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let port = args.number_in("port", 0..=u64::from(u32::MAX), 0)? as u32;
    let bytes = args.number_in("bytes", 0..=1 << 40, 0)?;
    let seed = args.number("seed")?.unwrap_or(0);
    let window = args.number_in("window", 4..=1024, 64)? * KIB;
    let irq = args.number_in("irq", 0..=1, 0)? == 1;
    let mut driver = State::take(ctx)?;
    let guest = ctx.vsock.next_port;
    ctx.vsock.next_port += 1;
    let result = virtio::buffers(&mut ctx.pages, window.div_ceil(PAGE_SIZE)).and_then(|ring| {
        let mut connection = Connection { host: port, guest, ring, ..Connection::FREE };
        let before = (driver.kicks(), driver.interrupts);
        let result = exchange(&mut driver, &mut connection, bytes, seed, irq);
        // SAFETY: only the connection knew the pages.
        let _ = unsafe { ctx.pages.free(ring) };
        let (sent, received) = result?;
        let (kicks, interrupts) = (driver.kicks() - before.0, driver.interrupts - before.1);
        Ok(Reply::new(
            received,
            format_args!(
                "sent={} received={} sent_digest={sent:016x} kicks={kicks} interrupts={interrupts}",
                connection.sent, connection.received
            ),
        ))
    });
    ctx.vsock.driver = Some(driver);
    result
}

/// Sends and receives; returns the digests of both.
fn exchange(
    driver: &mut Vsock,
    connection: &mut Connection,
    bytes: u64,
    seed: u64,
    irq: bool,
) -> Result<(u64, u64), Message> {
    let (mut out, mut back) = (Stream::new(), Stream::new());
    connection.send(driver, REQUEST, 0)?;
    loop {
        let mut idle = true;
        match driver.receive() {
            Came::TransportReset => return Err(message!("transport reset after sent={}", connection.sent)),
            Came::Packet(header, at, buffer) => {
                idle = false;
                if (header.host, header.guest) == (connection.host, connection.guest) {
                    connection.hear(&header);
                    match header.op {
                        RESPONSE => connection.open = true,
                        RW => {
                            back.bytes(payload(at, header.len));
                            connection.received += u64::from(header.len);
                            connection.done = connection.received;
                            connection.update_credit(driver)?;
                        }
                        CREDIT_REQUEST => connection.send(driver, CREDIT_UPDATE, 0)?,
                        SHUTDOWN => connection.ended |= header.flags & SHUT_SEND != 0,
                        RST if connection.ended && connection.sent == bytes => connection.shut = true,
                        RST if !connection.open => return Err(message!("connection refused")),
                        RST => return Err(message!("connection reset after sent={}", connection.sent)),
                        _ => {}
                    }
                }
                driver.recycle(buffer);
            }
            Came::Nothing => {}
        }
        let (left, credit) = (bytes - connection.sent, connection.credit());
        // Whole words of the pattern, but for the last one.
        let len = if left < 8 && left <= credit { left } else { left.min(credit).min(PAYLOAD_MAX) & !7 };
        if connection.open && len > 0 {
            idle = false;
            let first = connection.sent / 8;
            connection.send_data(driver, len, |to| {
                for (i, chunk) in to.chunks_mut(8).enumerate() {
                    chunk.copy_from_slice(&mix2(seed, first + i as u64).to_le_bytes()[..chunk.len()]);
                }
                out.bytes(to);
            })?;
        }
        if connection.open && connection.sent == bytes {
            if !connection.shut && !connection.ended {
                connection.shut = true;
                connection.send(driver, SHUTDOWN, SHUT_SEND)?;
            }
            if connection.ended {
                // The host answers with a reset, which is not waited for.
                connection.send(driver, SHUTDOWN, SHUT_BOTH)?;
                return Ok((out.finish(), back.finish()));
            }
        }
        if idle {
            driver.wait(irq);
        }
    }
}

/// The service of a server to its connections.
struct Server {
    port: u32,
    window: u64,
    lines: bool,
    accepted: u64,
    closed: u64,
    resets: u64,
    bytes: u64,
}

/// `vsock_serve port=P`: sends the bytes of connections back, or (`lines=1`) answers their requests one at a time,
/// until `closed` of them are over (0: for ever).
pub fn serve(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let port = args.number_in("port", 0..=u64::from(u32::MAX), 0)? as u32;
    let window = args.number_in("window", 4..=1024, 64)? * KIB;
    let irq = args.number_in("irq", 0..=1, 1)? == 1;
    let lines = args.number_in("lines", 0..=1, 0)? == 1;
    let until = args.number("closed")?.unwrap_or(0);
    let mut driver = State::take(ctx)?;
    let mut server = Server { port, window, lines, accepted: 0, closed: 0, resets: 0, bytes: 0 };
    let before = (driver.kicks(), driver.interrupts);
    let mut reader = LineReader::new();
    let result = loop {
        if until > 0 && server.closed >= until {
            break Ok(());
        }
        match driver.receive() {
            Came::TransportReset => {
                server.resets += 1;
                (0..CONNECTIONS_MAX).for_each(|index| server.close(index, ctx));
            }
            Came::Packet(header, at, buffer) => {
                let result = server.packet(&header, at, &mut driver, &mut reader, ctx);
                driver.recycle(buffer);
                if result.is_err() {
                    break result;
                }
            }
            Came::Nothing => driver.wait(irq),
        }
    };
    (0..CONNECTIONS_MAX).for_each(|index| server.close(index, ctx));
    let (kicks, interrupts) = (driver.kicks() - before.0, driver.interrupts - before.1);
    ctx.vsock.driver = Some(driver);
    result?;
    let Server { accepted, closed, resets, bytes, .. } = server;
    let keys = format_args!(
        "accepted={accepted} closed={closed} transport_resets={resets} bytes={bytes} kicks={kicks} \
         interrupts={interrupts}"
    );
    Ok(Reply::named("vsock_serve", keys))
}

impl Server {
    fn packet(
        &mut self,
        header: &Header,
        at: u64,
        driver: &mut Vsock,
        reader: &mut LineReader,
        ctx: &mut Ctx,
    ) -> Result<(), Message> {
        let ends = (header.host, header.guest);
        let found = ctx.vsock.served.iter().position(|c| c.open && (c.host, c.guest) == ends);
        let Some(index) = found else {
            return match header.op {
                REQUEST if header.guest == self.port => self.accept(header, driver, reader, ctx),
                RST => Ok(()),
                _ => refuse(header, driver),
            };
        };
        let mut connection = ctx.vsock.served[index];
        connection.hear(header);
        match header.op {
            RW if self.lines => {
                connection.received += u64::from(header.len);
                connection.done = connection.received;
                for byte in payload(at, header.len) {
                    if reader.push(*byte)
                        && let Some(answer) = protocol::answer(reader, ctx)
                    {
                        let answer = answer.as_str().as_bytes();
                        connection.send_data(driver, answer.len() as u64, |to| to.copy_from_slice(answer))?;
                    }
                }
            }
            RW => {
                self.bytes += u64::from(header.len);
                connection.keep(payload(at, header.len))?;
            }
            CREDIT_REQUEST => connection.send(driver, CREDIT_UPDATE, 0)?,
            SHUTDOWN => connection.ended |= header.flags & SHUT_SEND != 0,
            RST => {
                ctx.vsock.served[index] = connection;
                self.close(index, ctx);
                return Ok(());
            }
            _ => {}
        }
        connection.echo(driver)?;
        connection.update_credit(driver)?;
        ctx.vsock.served[index] = connection;
        Ok(())
    }

    fn accept(
        &mut self,
        header: &Header,
        driver: &mut Vsock,
        reader: &mut LineReader,
        ctx: &mut Ctx,
    ) -> Result<(), Message> {
        let most = if self.lines { 1 } else { CONNECTIONS_MAX };
        let free = ctx.vsock.served[..most].iter().position(|c| !c.open);
        let ring = ctx.pages.alloc(self.window.div_ceil(PAGE_SIZE));
        let (Some(index), Ok(ring)) = (free, ring) else {
            if let Ok(ring) = ring {
                let _ = ctx.pages.free_untouched(ring);
            }
            return refuse(header, driver);
        };
        *reader = LineReader::new();
        let mut connection =
            Connection { open: true, host: header.host, guest: header.guest, ring, ..Connection::FREE };
        connection.hear(header);
        connection.send(driver, RESPONSE, 0)?;
        ctx.vsock.served[index] = connection;
        self.accepted += 1;
        Ok(())
    }

    fn close(&mut self, index: usize, ctx: &mut Ctx) {
        let connection = ctx.vsock.served[index];
        if connection.open {
            // SAFETY: only the connection knew the pages.
            let _ = unsafe { ctx.pages.free(connection.ring) };
            ctx.vsock.served[index] = Connection::FREE;
            self.closed += 1;
        }
    }
}

fn refuse(header: &Header, driver: &mut Vsock) -> Result<(), Message> {
    let reset = Header { host: header.host, guest: header.guest, op: RST, ..Header::default() };
    driver.send(&reset, |_| ())
}
