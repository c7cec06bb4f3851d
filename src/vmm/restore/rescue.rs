//! While a machine is restored, tvmm and KVM touch its memory on the thread that everything else waits for. Should who
//! serves that memory fail or die then, the touch must not wait for ever.

use std::sync::Arc;

use crate::memory;
use crate::memory::ending::{Ending, EndingSignal};
use crate::memory::guest_ram::Backing;
use crate::snapshot::{Extent, Gfn};
use crate::sys::uffd::Uffd;
use crate::vmm::error::Error;
use crate::vmm::machine::Core;

/// As long as it lives, the end of the machine lets go of whoever waits for lazy memory: they find zeros and come to
/// [`finish`](Self::finish), which refuses the machine. Afterwards only the guest waits, and the end stops that.
pub struct Rescue {
    ending: Arc<EndingSignal>,
}

impl Rescue {
    /// Before `uffd` is served. Without one nothing is to be done.
    pub fn prepare(uffd: Option<&Arc<Uffd>>, core: &Core) -> Self {
        if let Some(uffd) = uffd.cloned() {
            let lazy = lazy_memory(core);
            core.ending.on_end(Some(Box::new(move || {
                for &(address, len) in &lazy {
                    // Memory that cannot be let go keeps its waiters, as it would have without this.
                    let _ = uffd.unregister(address, len);
                }
            })));
        }
        Rescue { ending: core.ending.clone() }
    }

    /// The guest may run, unless who serves its memory has ended.
    pub fn finish(self) -> Result<(), Error> {
        self.ending.on_end(None);
        match self.ending.take() {
            None => Ok(()),
            Some(Ending::Failed(why) | Ending::MemoryLost(why)) => Err(memory::Error::Unserved(why).into()),
            Some(other) => Err(memory::Error::Unserved(format!("{other:?}")).into()),
        }
    }
}

impl Drop for Rescue {
    fn drop(&mut self) {
        self.ending.on_end(None);
    }
}

/// `(address, len)` of the runs of lazy pieces.
fn lazy_memory(core: &Core) -> Vec<(usize, usize)> {
    let mut runs: Vec<Extent> = Vec::new();
    for piece in core.ram.pieces().iter().filter(|piece| piece.backing == Backing::Lazy) {
        match runs.last_mut() {
            Some(last) if last.end() == piece.extent.first => last.pages += piece.extent.pages,
            _ => runs.push(piece.extent),
        }
    }
    let split = runs.into_iter().flat_map(|run| core.ram.layout().split(run));
    let address = |first: Gfn| core.ram.host_address(first).map(|address| address as usize);
    split.filter_map(|run| Some((address(run.first).ok()?, run.bytes() as usize))).collect()
}
