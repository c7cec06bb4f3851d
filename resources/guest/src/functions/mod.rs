//! The functions a host can run: one file per family, one table.
//!
//! To add one, write `fn(&Args, &mut Ctx) -> Result<Reply, Message>` in a file here and name it in
//! [`FUNCTIONS`] with the keys it takes; names, keys and duplicates are checked before it is called.

mod balloon;
mod blk;
mod memory;
mod net;
mod pages;
mod pmem;
mod rng;
mod spin;
mod stores;
mod system;
mod vsock;
#[cfg(feature = "functions")]
mod workloads;

use crate::alloc::Pages;
use crate::boot::{BootInfo, Protocol};
use crate::smp::Cpus;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};
use tvmm_guest::args::{Args, Key, Message, optional, required};
use tvmm_guest::cmdline::Config;
use tvmm_guest::digest::Digest;
use tvmm_guest::frames;
use tvmm_guest::text::Text;

/// The result of a function.
pub struct Reply {
    pub digest: u64,
    /// `key=value` pairs with a space between.
    pub keys: Text<512>,
}

impl Reply {
    /// A reply with these keys.
    pub fn new(digest: u64, keys: core::fmt::Arguments<'_>) -> Self {
        Self { digest, keys: Text::of(keys) }
    }

    /// For functions whose result is in their keys: the digest of their name.
    pub fn named(name: &str, keys: core::fmt::Arguments<'_>) -> Self {
        let mut digest = Digest::new();
        digest.bytes(name.as_bytes());
        Self::new(digest.finish(), keys)
    }
}

/// An entry of the table.
pub struct Function {
    pub name: &'static str,
    pub keys: &'static [Key],
    pub run: fn(&Args, &mut Ctx) -> Result<Reply, Message>,
}

const fn function(
    name: &'static str,
    keys: &'static [Key],
    run: fn(&Args, &mut Ctx) -> Result<Reply, Message>,
) -> Function {
    Function { name, keys, run }
}

const PAGES: Key = required("pages");
const SEED: Key = optional("seed");
const CPU: Key = optional("cpu");

static FUNCTIONS: &[Function] = &[
    // The functions guest has another.
    #[cfg(not(feature = "functions"))]
    function("hello", &[], system::hello),
    function("clock", &[], system::clock),
    function("info", &[], system::info),
    function("fill", &[PAGES, SEED, CPU], memory::fill),
    function("touch", &[PAGES, SEED, CPU, optional("write"), optional("stride")], memory::touch),
    function("scan", &[PAGES, optional("lines"), optional("passes"), optional("line_ns"), CPU], memory::scan),
    function("march", &[PAGES, required("ms")], memory::march),
    function("check", &[CPU], memory::check),
    function("alloc", &[PAGES], pages::alloc),
    function("free", &[optional("handle"), optional("filled")], pages::free),
    function("blk", blk::KEYS, blk::blk),
    function("metadata", &[], system::metadata),
    function("murmur", &[required("times"), required("ms")], system::murmur),
    function("balloon", &[required("op"), optional("pages"), optional("filled")], balloon::balloon),
    function("pmem", &[optional("nth"), optional("first"), optional("pages"), optional("write")], pmem::pmem),
    function("net_answer", &[required("ip"), optional("frames"), optional("ms"), optional("irq")], net::answer),
    function("net_info", &[], net::info),
    function("net_receive", &[required("count"), optional("ms"), optional("irq"), SEED], net::receive),
    function("net_send", &[required("count"), optional("size"), optional("batch"), SEED], net::send),
    function("rng", &[optional("bytes"), optional("irq")], rng::rng),
    function("rng_break", &[required("rounds")], rng::rng_break),
    function(
        "vsock_connect",
        &[required("port"), optional("bytes"), SEED, optional("window"), optional("irq")],
        vsock::connect,
    ),
    function(
        "vsock_serve",
        &[required("port"), optional("lines"), optional("closed"), optional("window"), optional("irq")],
        vsock::serve,
    ),
    function("stores", &[optional("op")], stores::stores),
    function("spin", &[required("ms"), optional("cpus"), optional("timer_us")], spin::spin),
];

pub fn find(name: &str) -> Option<&'static Function> {
    #[cfg(feature = "functions")]
    let more = workloads::FUNCTIONS;
    #[cfg(not(feature = "functions"))]
    let more = &[];
    FUNCTIONS.iter().chain(more).find(|f| f.name == name)
}

/// Resources that functions share, and state that stays between calls.
pub struct Ctx {
    pub pages: Pages,
    pub cpus: Cpus,
    pub filled: memory::Filled,
    pub handles: pages::Handles,
    pub spin: spin::State,
    pub stores: stores::State,
    pub net: net::State,
    pub rng: rng::State,
    pub balloon: balloon::State,
    pub blk: blk::State,
    pub vsock: vsock::State,
    #[cfg(feature = "functions")]
    pub workloads: tvmm_guest::workloads::State,
    pub config: Config,
    pub protocol: Protocol,
    pub mem_mib: u64,
}

impl Ctx {
    const fn new() -> Self {
        Self {
            pages: Pages::new(),
            cpus: Cpus::new(),
            filled: memory::Filled::new(),
            handles: pages::Handles::new(),
            spin: spin::State::new(),
            stores: stores::State::new(),
            net: net::State::new(),
            rng: rng::State::new(),
            balloon: balloon::State::new(),
            blk: blk::State::new(),
            vsock: vsock::State::new(),
            #[cfg(feature = "functions")]
            workloads: tvmm_guest::workloads::State::new(),
            config: Config::DEFAULT,
            protocol: Protocol::Linux,
            mem_mib: 0,
        }
    }

    pub fn init(&mut self, boot: &BootInfo) -> Result<(), frames::Error> {
        self.config = boot.config;
        self.protocol = boot.protocol;
        self.mem_mib = boot.map.mib();
        self.pages.init(&boot.map, boot.config.init_on_free)?;
        #[cfg(feature = "functions")]
        self.init_heap()?;
        Ok(())
    }

    /// Gives the heap seven eighths of the longest run of free pages, its beginning.
    #[cfg(feature = "functions")]
    fn init_heap(&mut self) -> Result<(), frames::Error> {
        let run = self.pages.alloc(self.pages.longest() / 8 * 7)?;
        // SAFETY: once, on the boot CPU; the pages were just taken out of the books of all others. They are mapped:
        // now, or when the page tables are complete, before anything is allocated.
        unsafe { crate::heap::HEAP.init(run, self.config.init_on_free) }
    }

    /// Runs `job` on the CPU that `cpu=` names (default 0) and waits for it; the job is given its
    /// CPU's slot, for the clock.
    pub fn on_cpu(&mut self, args: &Args, job: &mut (dyn FnMut(usize) + Send)) -> Result<(), Message> {
        let last = self.cpus.count() as u64 - 1;
        let cpu = args.number_in("cpu", 0..=last, 0)?;
        self.cpus.run_on(cpu as usize, job);
        Ok(())
    }
}

struct Once(UnsafeCell<Ctx>);
// SAFETY: `context` gives it to one caller only.
unsafe impl Sync for Once {}

/// The one context, for the boot CPU. It is static because it is too large for a stack.
pub fn context() -> &'static mut Ctx {
    static CONTEXT: Once = Once(UnsafeCell::new(Ctx::new()));
    static TAKEN: AtomicBool = AtomicBool::new(false);
    assert!(!TAKEN.swap(true, Ordering::Relaxed));
    // SAFETY: taken once, so this is the only reference.
    unsafe { &mut *CONTEXT.0.get() }
}
