//! A descriptor chain, parsed and checked once into the buffers that the device may read and those it may write.

use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, BitmapSlice, RefSlice};
use vm_memory::{Address, ByteValued, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use super::{Broken, Memory};
use crate::snapshot::PAGE_SIZE;

/// A piece of guest memory that marks its page when it is written.
pub type Slice<'m> = VolatileSlice<'m, RefSlice<'m, AtomicBitmap>>;

/// No device has a request larger than this; a driver that asks for more is lying (or a loop of descriptors is).
const MAX_BYTES: usize = 1 << 30;

/// Touches each page of `slices`, for which the kernel has returned EFAULT. A lost page (its file was cut, its disk
/// fails) thereby ends the guest with the reason, instead of passing for an error of the device.
pub fn touch<'m, B: BitmapSlice>(slices: impl Iterator<Item = VolatileSlice<'m, B>>) {
    const PAGE: usize = PAGE_SIZE as usize;
    for slice in slices {
        // From the end of one page to that of the next, wherever the slice begins.
        let ends = (0..slice.len()).step_by(PAGE).chain(slice.len().checked_sub(1));
        for byte in ends.filter_map(|at| slice.offset(at).ok()) {
            byte.copy_to(&mut [0_u8]);
        }
    }
}

/// The buffers of one direction, as one run of bytes.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<Slice<'m>>,
    len: usize,
}

impl<'m> Buffers<'m> {
    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn slices(&self) -> &[Slice<'m>] {
        &self.slices
    }

    fn add(&mut self, slice: Slice<'m>) -> Result<(), Broken> {
        self.len = self.len.saturating_add(slice.len());
        if self.len > MAX_BYTES {
            return Err(Broken::Chain("it is larger than 1 GiB"));
        }
        self.slices.push(slice);
        Ok(())
    }

    /// The part `[offset, offset + len)`, or as much of it as there is.
    pub fn part(&self, offset: usize, len: usize) -> Buffers<'m> {
        let mut skip = offset;
        let mut left = len;
        let mut part = Buffers::default();
        for slice in &self.slices {
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            let take = (slice.len() - skip).min(left);
            if take == 0 {
                break;
            }
            if let Ok(piece) = slice.subslice(skip, take) {
                part.len += take;
                part.slices.push(piece);
            }
            (skip, left) = (0, left - take);
        }
        part
    }

    /// Copies bytes from `offset` on into `data`; returns the number copied.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.part(offset, data.len()).slices {
            done += slice.copy_to(&mut data[done..]);
        }
        done
    }

    /// Copies `data` to `offset`; returns the number of bytes that fitted.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.part(offset, data.len()).slices {
            let len = slice.len();
            slice.copy_from(&data[done..done + len]);
            done += len;
        }
        done
    }

    /// An object at `offset`.
    pub fn read_obj<T: ByteValued + Default>(&self, offset: usize) -> Result<T, Broken> {
        let mut object = T::default();
        let wanted = size_of::<T>();
        match self.read_at(offset, object.as_mut_slice()) {
            got if got == wanted => Ok(object),
            _ => Err(Broken::Chain("it is too short for its header")),
        }
    }

    /// Marks the first `len` bytes as written, after the kernel wrote through [`slices`](Self::slices).
    pub fn mark_written(&self, len: usize) {
        let mut left = len;
        for slice in &self.slices {
            let part = slice.len().min(left);
            slice.bitmap().mark_dirty(0, part);
            left -= part;
        }
    }
}

/// A chain: its head, which gives it back, and its buffers.
#[derive(Debug)]
pub struct Chain<'m> {
    pub head: u16,
    /// The driver's bytes for the device.
    pub readable: Buffers<'m>,
    /// The buffers that the device fills.
    pub writable: Buffers<'m>,
    /// The last byte of `writable`, where some devices report their status.
    pub last_writable: Option<GuestAddress>,
}

impl<'m> Chain<'m> {
    /// Walks a chain. A buffer outside RAM, a writable one before a readable one (VIRTIO 1.2, 2.7.4.2), or more bytes
    /// than any request has are errors. A loop ends after as many descriptors as the queue has entries.
    pub(super) fn parse(chain: DescriptorChain<&'m Memory>, memory: &'m Memory) -> Result<Self, Broken> {
        let readable = Buffers::default();
        let writable = Buffers::default();
        let mut parsed = Chain { head: chain.head_index(), readable, writable, last_writable: None };
        for descriptor in chain {
            if descriptor.is_write_only() && descriptor.len() > 0 {
                parsed.last_writable = descriptor.addr().checked_add(u64::from(descriptor.len()) - 1);
            }
            let (buffers, access) = if descriptor.is_write_only() {
                (&mut parsed.writable, Permissions::Write)
            } else if parsed.writable.is_empty() {
                (&mut parsed.readable, Permissions::Read)
            } else {
                return Err(Broken::Chain("a readable buffer follows a writable one"));
            };
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize, access)? {
                buffers.add(slice?)?;
            }
        }
        Ok(parsed)
    }
}

/// A chain as guest-physical ranges, which need not lie in RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    pub head: u16,
    /// Address and length of the buffers that the device may read.
    pub readable: Vec<(u64, u32)>,
    /// Address and length of the buffers that the device may write.
    pub writable: Vec<(u64, u32)>,
}

impl Ranges {
    pub(super) fn parse(chain: DescriptorChain<&Memory>) -> Self {
        let mut parsed = Ranges { head: chain.head_index(), ..Ranges::default() };
        for descriptor in chain {
            let ranges = if descriptor.is_write_only() { &mut parsed.writable } else { &mut parsed.readable };
            ranges.push((descriptor.addr().0, descriptor.len()));
        }
        parsed
    }
}
