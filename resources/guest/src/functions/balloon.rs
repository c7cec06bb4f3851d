//! `balloon`: memory given back to the host through a virtio balloon (VIRTIO 1.2, 5.5), by each of its ways.

use super::{Ctx, Reply};
use crate::alloc::{Pages, address, frames};
use crate::virtio::{self, Buffer, Device, Queue};
use tvmm_guest::args::{Args, Message};
use tvmm_guest::frames::Run;
use tvmm_guest::{PAGE_SIZE, message};

const BALLOON: u32 = 5;
const STATISTICS: u64 = 1 << 1;
const HINTS: u64 = 1 << 3;
const REPORTS: u64 = 1 << 5;

const CONFIG_TARGET: u64 = 0;
const CONFIG_ACTUAL: u64 = 4;
const CONFIG_HINT_CMD: u64 = 8;
const HINT_STOP: u32 = 0;
const HINT_FIRST: u32 = 2;

/// Page numbers in one request, as Linux has it.
const NUMBERS: u64 = 256;
const RUNS_MAX: usize = 128;
/// Reported at once: a block of 2 MiB.
const BLOCK: u64 = 512;

/// The device, once it was found.
struct Balloon {
    device: Device,
    inflate: Queue,
    deflate: Queue,
    statistics: Option<Queue>,
    hints: Option<Queue>,
    reports: Option<Queue>,
    /// A page for page numbers and commands, one for statistics.
    numbers: u64,
    values: u64,
    /// The host has the page with the statistics.
    values_out: bool,
    runs: [Run; RUNS_MAX],
    len: usize,
}

pub struct State {
    balloon: Option<Balloon>,
}

impl State {
    pub const fn new() -> Self {
        Self { balloon: None }
    }
}

impl Balloon {
    fn find(pages: &mut Pages) -> Result<Self, Message> {
        let device = Device::find(BALLOON, 0, STATISTICS | HINTS | REPORTS)?;
        let mut next = 2;
        // Queues that are there follow each other without gaps.
        let mut optional = |feature: u64, pages: &mut Pages| -> Result<Option<Queue>, Message> {
            if !device.has(feature) {
                return Ok(None);
            }
            next += 1;
            device.queue(next - 1, 64, pages).map(Some)
        };
        let statistics = optional(STATISTICS, pages)?;
        let hints = optional(HINTS, pages)?;
        let reports = optional(REPORTS, pages)?;
        let (inflate, deflate) = (device.queue(0, 64, pages)?, device.queue(1, 64, pages)?);
        let run = virtio::buffers(pages, 2)?;
        device.start();
        let (numbers, values) = (address(run), address(run) + PAGE_SIZE);
        let (runs, len, values_out) = ([Run { first: 0, pages: 0 }; RUNS_MAX], 0, false);
        Ok(Self { device, inflate, deflate, statistics, hints, reports, numbers, values, values_out, runs, len })
    }

    /// Sends the numbers of all pages of `runs`.
    fn send_numbers(&mut self, runs: &[Run], deflate: bool) -> Result<(), Message> {
        let queue = if deflate { &mut self.deflate } else { &mut self.inflate };
        for run in runs {
            let mut frames = frames(*run).peekable();
            while frames.peek().is_some() {
                let mut count = 0;
                for frame in frames.by_ref().take(NUMBERS as usize) {
                    // SAFETY: below 256 numbers of four bytes in this device's own page; the host has given it back.
                    unsafe { ((self.numbers + 4 * count) as *mut u32).write_volatile(frame as u32) };
                    count += 1;
                }
                queue.add(&[Buffer { at: self.numbers, len: 4 * count as u32, write: false }]);
                queue.kick(1);
                queue.wait(&self.device, false)?;
            }
        }
        Ok(())
    }

    /// Sends all pages of `runs` as buffers, a block at a time.
    fn send_ranges(&mut self, runs: &[Run], hints: bool) -> Result<(), Message> {
        let queue = if hints { &mut self.hints } else { &mut self.reports };
        let queue = queue.as_mut().ok_or(message!("the balloon has no queue for that"))?;
        for run in runs {
            let mut at = run.first;
            while at < run.first + run.pages {
                let count = (BLOCK - at % BLOCK).min(run.first + run.pages - at);
                queue.add(&[Buffer { at: at * PAGE_SIZE, len: (count * PAGE_SIZE) as u32, write: true }]);
                queue.kick(1);
                queue.wait(&self.device, false)?;
                at += count;
            }
        }
        Ok(())
    }

    fn send_command(&mut self, command: u32) -> Result<(), Message> {
        let queue = self.hints.as_mut().ok_or(message!("the balloon has no hints"))?;
        // SAFETY: the device's own page; the host has given it back.
        unsafe { (self.numbers as *mut u32).write_volatile(command) };
        queue.add(&[Buffer { at: self.numbers, len: 4, write: false }]);
        queue.kick(1);
        queue.wait(&self.device, false).map(|_| ())
    }

    /// One round: the number that the host gave, the pages, the end.
    fn hint(&mut self, runs: &[Run]) -> Result<(), Message> {
        let command = self.device.config(CONFIG_HINT_CMD);
        if command < HINT_FIRST {
            return Err(message!("the host has not begun a round of hints: {command}"));
        }
        self.send_command(command)?;
        self.send_ranges(runs, true)?;
        self.send_command(HINT_STOP)
    }

    /// Sends free (tag 4) and total (tag 5) memory if the host has no statistics or has asked for new ones.
    fn send_statistics(&mut self, free: u64, total: u64) -> Result<bool, Message> {
        let queue = self.statistics.as_mut().ok_or(message!("the balloon has no statistics"))?;
        if self.values_out && queue.pop().is_none() {
            return Ok(false);
        }
        for (i, (tag, value)) in [(4u16, free), (5, total)].into_iter().enumerate() {
            let at = self.values + 10 * i as u64;
            // SAFETY: the device's own page; the host has given it back.
            unsafe {
                (at as *mut u16).write_unaligned(tag);
                ((at + 2) as *mut u64).write_unaligned(value);
            }
        }
        queue.add(&[Buffer { at: self.values, len: 20, write: false }]);
        queue.kick(1);
        self.values_out = true;
        Ok(true)
    }

    fn held(&self) -> u64 {
        self.runs[..self.len].iter().map(|run| run.pages).sum()
    }

    fn inflate(&mut self, count: u64, pages: &mut Pages) -> Result<(), Message> {
        let begin = self.len;
        let mut left = count;
        while left > 0 {
            if self.len == RUNS_MAX {
                return Err(message!("more than {RUNS_MAX} runs are in the balloon"));
            }
            let run = pages.alloc_up_to(left).map_err(|e| message!("{e}"))?;
            self.runs[self.len] = run;
            (self.len, left) = (self.len + 1, left - run.pages);
        }
        let runs = self.runs;
        self.send_numbers(&runs[begin..self.len], false)?;
        self.tell_actual();
        Ok(())
    }

    /// The newest runs first.
    fn deflate(&mut self, count: u64, pages: &mut Pages) -> Result<(), Message> {
        let mut left = count.min(self.held());
        while left > 0 {
            let last = &mut self.runs[self.len - 1];
            let back = last.pages.min(left);
            (last.pages, left) = (last.pages - back, left - back);
            let run = Run { first: last.first + last.pages, pages: back };
            self.len -= usize::from(last.pages == 0);
            self.send_numbers(&[run], true)?;
            pages.free_untouched(run).map_err(|e| message!("{e}"))?;
        }
        self.tell_actual();
        Ok(())
    }

    fn tell_actual(&self) {
        self.device.set_config(CONFIG_ACTUAL, self.held() as u32);
    }
}

/// `balloon op=status|inflate|deflate|follow|report|hint|statistics [pages=N | filled=1]`: with `filled=1`, the host is
/// told to take the filled pages, which the guest goes on using.
pub fn balloon(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let op = args.get("op").unwrap_or("");
    let filled = args.number_in("filled", 0..=1, 0)? == 1;
    let count = args.number("pages")?.unwrap_or(0);
    if ctx.balloon.balloon.is_none() {
        ctx.balloon.balloon = Some(Balloon::find(&mut ctx.pages)?);
    }
    let free = ctx.pages.free_pages();
    let Some(balloon) = &mut ctx.balloon.balloon else { return Err(message!("no balloon")) };
    let mut sent = false;
    match (op, filled) {
        ("status", _) => {}
        ("inflate", true) => balloon.send_numbers(ctx.filled.runs(), false)?,
        ("inflate", false) => balloon.inflate(count, &mut ctx.pages)?,
        ("deflate", _) => balloon.deflate(if count == 0 { u64::MAX } else { count }, &mut ctx.pages)?,
        ("follow", _) => {
            let (target, held) = (u64::from(balloon.device.config(CONFIG_TARGET)), balloon.held());
            match target > held {
                true => balloon.inflate(target - held, &mut ctx.pages)?,
                false => balloon.deflate(held - target, &mut ctx.pages)?,
            }
        }
        ("report", true) => balloon.send_ranges(ctx.filled.runs(), false)?,
        ("hint", true) => balloon.hint(ctx.filled.runs())?,
        ("report" | "hint", false) => {
            let run = ctx.pages.alloc(count).map_err(|e| message!("{e}"))?;
            let done = if op == "hint" { balloon.hint(&[run]) } else { balloon.send_ranges(&[run], false) };
            ctx.pages.free_untouched(run).map_err(|e| message!("{e}"))?;
            done?;
        }
        ("statistics", _) => sent = balloon.send_statistics(free * PAGE_SIZE, ctx.mem_mib << 20)?,
        _ => return Err(message!("balloon has no such op")),
    }
    balloon.device.acknowledge();
    let (target, command) = (balloon.device.config(CONFIG_TARGET), balloon.device.config(CONFIG_HINT_CMD));
    let keys = format_args!("target={target} held={} cmd={command} sent={}", balloon.held(), u8::from(sent));
    Ok(Reply::named("balloon", keys))
}
