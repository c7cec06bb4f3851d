//! Guest memory as devices see it.

use std::num::NonZeroUsize;

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

/// Guest memory whose pages are marked when a device writes them: KVM's dirty log does not see that.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// The marks of a region of `len` bytes, one bit per page.
pub fn region_bitmap(len: usize) -> AtomicBitmap {
    AtomicBitmap::new(len, PAGE)
}
