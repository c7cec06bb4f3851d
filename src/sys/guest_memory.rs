//! Guest memory as devices see it.
//!
//! Pages may lie in place on a tier that many VMs share: mapped read-only, or under a copy that this VM may not have
//! made yet. A thread that writes gets its slices with [`Permissions::Write`], which goes through the [`WriteGate`].
//! There is no other way to a slice of guarded memory: this type gives out neither its regions nor its host addresses.

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap,
    Permissions,
};

use crate::snapshot::{Extent, PAGE_SIZE};

/// Makes read-only guest memory writable.
pub trait WriteGate: Send + Sync + fmt::Debug {
    /// Called by [`Memory`] before it gives out a slice to write `[gpa, gpa + len)`, which need not be RAM. On return
    /// its RAM must be writable until the machine ends, with the same bytes.
    fn open(&self, gpa: u64, len: u64) -> io::Result<()>;
}

/// Guest memory without a gate. Its pages are marked when a device writes them: KVM's dirty log does not see that.
pub type UnguardedMemory = GuestMemoryMmap<AtomicBitmap>;

/// Guest memory.
#[derive(Clone, Debug)]
pub struct Memory {
    regions: UnguardedMemory,
    gate: Option<Arc<dyn WriteGate>>,
}

impl Memory {
    /// Memory without a gate. The regions ascend and do not overlap.
    pub fn from_regions(
        regions: Vec<GuestRegionMmap<AtomicBitmap>>,
    ) -> std::result::Result<Self, GuestRegionCollectionError> {
        Ok(Memory { regions: UnguardedMemory::from_regions(regions)?, gate: None })
    }

    /// The same memory; writes go through `gate` first.
    pub fn guarded(&self, gate: Arc<dyn WriteGate>) -> Self {
        Memory { regions: self.regions.clone(), gate: Some(gate) }
    }

    /// The same memory without a gate.
    pub fn without_gate(&self) -> Self {
        Memory { regions: self.regions.clone(), gate: None }
    }

    /// The regions themselves, for loaders of kernels, if the memory has no gate.
    pub fn unguarded(&self) -> Option<&UnguardedMemory> {
        self.gate.is_none().then_some(&self.regions)
    }

    /// Takes the marks of written pages, per region, a bit per page, and clears them.
    pub fn take_marks(&self) -> impl Iterator<Item = Vec<u64>> + '_ {
        self.regions.iter().map(|region| vm_memory::MmapRegion::bitmap(region).get_and_reset())
    }
}

impl GuestMemory for Memory {
    type PhysicalMemory = UnguardedMemory;
    type Bitmap = AtomicBitmap;

    fn check_range(&self, addr: GuestAddress, count: usize, _: Permissions) -> bool {
        GuestMemoryBackend::check_range(&self.regions, addr, count)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        if let Some(gate) = self.gate.as_ref().filter(|_| access.has_write()) {
            gate.open(addr.0, count as u64).map_err(vm_memory::GuestMemoryError::IOError)?;
        }
        Ok(GuestMemoryBackend::get_slices(&self.regions, addr, count))
    }
}

const PAGE: NonZeroUsize = NonZeroUsize::new(PAGE_SIZE as usize).unwrap();

/// The marks of a region of `len` bytes, one bit per page.
pub fn region_bitmap(len: usize) -> AtomicBitmap {
    AtomicBitmap::new(len, PAGE)
}

/// The result of giving pages back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Pages that are zero now and cost the host nothing.
    pub released: u64,
    /// Pages that are not RAM.
    pub outside: u64,
    /// Pages left as they are, because giving them back would cost more than it saves, or failed.
    pub refused: u64,
}

/// Gives guest pages back to the host. Called on the device thread, or on the thread of a vCPU that makes the driver
/// ready.
pub trait ReleasePages: Send {
    /// Must give back the RAM of `pages`, which may be any pages; leaves others alone and counts them.
    fn release(&mut self, pages: Extent) -> Outcome;

    /// Called before guest memory is taken back to the snapshot: each page will have its first backing again.
    fn rewind(&mut self);
}
