//! The heap of the functions: what a C library and an interpreter do with memory, in short. Small blocks come from
//! pools of their size in arenas of 1 MiB and are kept for the next taker, last in, first out (pymalloc; malloc's
//! bins). Large ones are pages of their own, lowest address first, and go back at once (mmap and munmap).
//!
//! Only the first CPU allocates, and no interrupt stub does.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::null_mut;

use crate::alloc::address;
use tvmm_guest::PAGE_SIZE;
use tvmm_guest::frames::{FreeList, Run};
use tvmm_guest::size_class::{BLOCK_MAX, CLASSES, block_size, class_of, span_pages};

const ARENA_PAGES: u64 = 256;
const FREE_RUNS_MAX: usize = 2048;
/// The alignment of every block.
const ALIGN: usize = 16;

#[global_allocator]
pub static HEAP: Heap = Heap(UnsafeCell::new(State::new()));

/// See the module.
pub struct Heap(UnsafeCell<State>);

// SAFETY: only the first CPU calls any of its functions, and none of them calls another.
unsafe impl Sync for Heap {}

struct State {
    free: FreeList<FREE_RUNS_MAX>,
    /// The rest of the newest arena.
    arena: Run,
    /// First free block of each class; a free block begins with the address of the next.
    blocks: [*mut u8; CLASSES],
    /// The rest of the newest span of each class: address and blocks.
    spans: [(u64, u64); CLASSES],
    /// Bytes in use, and the most there were since [`Heap::watch`].
    used: u64,
    peak: u64,
    init_on_free: bool,
}

/// The size class, or the pages, that a layout gets.
enum Size {
    Class(usize),
    Pages(u64),
}

fn size_of(layout: Layout) -> Option<Size> {
    let size = match layout.align() {
        align if align <= ALIGN => layout.size(),
        // A block whose size is a power of two, in a span that begins with a page, is aligned to its size.
        align if align <= PAGE_SIZE as usize => layout.size().max(align).next_power_of_two(),
        _ => return None,
    };
    Some(if size <= BLOCK_MAX {
        Size::Class(class_of(size.max(1)))
    } else {
        Size::Pages((size as u64).div_ceil(PAGE_SIZE))
    })
}

impl State {
    const fn new() -> Self {
        Self {
            free: FreeList::new(),
            arena: Run { first: 0, pages: 0 },
            blocks: [null_mut(); CLASSES],
            spans: [(0, 0); CLASSES],
            used: 0,
            peak: 0,
            init_on_free: false,
        }
    }

    fn block(&mut self, class: usize) -> *mut u8 {
        let first = self.blocks[class];
        if !first.is_null() {
            // SAFETY: a free block of this heap: mapped and unused; its first word is the next one's address.
            self.blocks[class] = unsafe { first.cast::<*mut u8>().read() };
            return first;
        }
        if self.spans[class].1 == 0 {
            let Some(run) = self.span(span_pages(class)) else {
                return null_mut();
            };
            self.spans[class] = (address(run), run.pages * PAGE_SIZE / block_size(class) as u64);
        }
        let (at, left) = self.spans[class];
        self.spans[class] = (at + block_size(class) as u64, left - 1);
        at as *mut u8
    }

    /// Pages of an arena.
    fn span(&mut self, pages: u64) -> Option<Run> {
        if self.arena.pages < pages {
            let arena = self.free.alloc(ARENA_PAGES.max(pages)).ok()?;
            if self.arena.pages > 0 {
                // Cannot fail: the new arena left a run less or the same.
                let _ = self.free.free(self.arena);
            }
            self.arena = arena;
        }
        let run = Run { first: self.arena.first, pages };
        self.arena = Run { first: run.first + pages, pages: self.arena.pages - pages };
        Some(run)
    }

    fn count(&mut self, bytes: u64) {
        self.used += bytes;
        self.peak = self.peak.max(self.used);
    }
}

impl Heap {
    /// # Safety
    /// On the first CPU, and not while another reference lives.
    #[allow(clippy::mut_from_ref)]
    unsafe fn state(&self) -> &mut State {
        // SAFETY: the caller's promise.
        unsafe { &mut *self.0.get() }
    }

    /// Gives the heap its memory: RAM without any other user.
    ///
    /// # Safety
    /// Once, on the first CPU; `run` is RAM, mapped, and the heap's from now on.
    pub unsafe fn init(&self, run: Run, init_on_free: bool) -> Result<(), tvmm_guest::frames::Error> {
        // SAFETY: the first CPU (caller).
        let state = unsafe { self.state() };
        state.init_on_free = init_on_free;
        state.free.free(run)
    }

    /// Bytes of the longest free run.
    pub fn longest_free(&self) -> u64 {
        // SAFETY: functions run on the first CPU; the reference ends here.
        unsafe { self.state() }.free.longest() * PAGE_SIZE
    }

    /// Resets the peak to the bytes in use now, and returns them.
    pub fn watch(&self) -> u64 {
        // SAFETY: as in `longest_free`.
        let state = unsafe { self.state() };
        state.peak = state.used;
        state.used
    }

    /// The most bytes in use since [`Self::watch`].
    pub fn peak(&self) -> u64 {
        // SAFETY: as in `longest_free`.
        unsafe { self.state() }.peak
    }
}

// SAFETY: blocks come from runs that are this heap's alone (`init`), each is handed out once until it is given back,
// and it is as large and as aligned as its class says; nothing unwinds.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the first CPU allocates, see the module.
        let state = unsafe { self.state() };
        let (at, bytes) = match size_of(layout) {
            Some(Size::Class(class)) => (state.block(class), block_size(class) as u64),
            Some(Size::Pages(pages)) => {
                let run = state.free.alloc(pages);
                (run.map_or(null_mut(), |run| address(run) as *mut u8), pages * PAGE_SIZE)
            }
            None => (null_mut(), 0),
        };
        if !at.is_null() {
            state.count(bytes);
        }
        at
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`.
        let state = unsafe { self.state() };
        match size_of(layout) {
            Some(Size::Class(class)) => {
                // SAFETY: the block is at least 16 bytes, aligned to them, and no longer in use (caller).
                unsafe { at.cast::<*mut u8>().write(state.blocks[class]) };
                state.blocks[class] = at;
                state.used -= block_size(class) as u64;
            }
            Some(Size::Pages(pages)) => {
                if state.init_on_free {
                    // SAFETY: the pages were handed out and are not used any more (caller).
                    unsafe { at.write_bytes(0, (pages * PAGE_SIZE) as usize) };
                }
                // With the list of free runs full, the pages are lost, which only makes memory scarcer.
                let _ = state.free.free(Run { first: at as u64 / PAGE_SIZE, pages });
                state.used -= pages * PAGE_SIZE;
            }
            None => {}
        }
    }
}
