//! Releases the main thread if its memory server dies during a restore. While a machine is restored, tvmm and KVM touch
//! its memory on the main thread. If the fault service or the handler fails then, that touch must not wait for ever.

use std::sync::Arc;

use crate::memory;
use crate::memory::ending::{Ending, EndingSignal};
use crate::memory::guest_ram::Backing;
use crate::snapshot::{Extent, Gfn};
use crate::sys::uffd::Uffd;
use crate::vmm::error::Error;
use crate::vmm::machine::Core;

/// While it lives, an ending signal releases all threads that wait for lazy memory. They read zeros and come to
/// [`finish`](Self::finish), which refuses the machine. Afterwards only the guest waits, and the ending stops that
/// wait.
pub struct Rescue {
    ending: Arc<EndingSignal>,
}

impl Rescue {
    /// Called before `uffd` is served. Without a userfaultfd it does nothing.
    pub fn prepare(uffd: Option<&Arc<Uffd>>, core: &Core) -> Self {
        if let Some(uffd) = uffd.cloned() {
            let lazy = lazy_memory(core);
            core.ending.on_end(Some(Box::new(move || {
                for &(address, len) in &lazy {
                    // Memory that cannot be unregistered keeps its waiters, as it would without this call.
                    let _ = uffd.unregister(address, len);
                }
            })));
        }
        Rescue { ending: core.ending.clone() }
    }

    /// Lets the guest run, unless the server of its memory has failed.
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
