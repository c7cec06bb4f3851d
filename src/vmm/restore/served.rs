//! Bringing in a page that somebody else serves, who may fail or die meanwhile.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::snapshot::{Extent, PAGE_SIZE};
use crate::vmm::error::Error;
use crate::vmm::memory::GuestRam;
use crate::vmm::sys::uffd::{Install, Uffd};
use crate::vmm::vcpu::{Ending, EndingSignal};

/// Longer than any handler needs for one page that means to serve it.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often it is asked whether whoever serves the memory is still there.
const CHECK: Duration = Duration::from_millis(10);

/// Makes the page of `page` writable without a fault. An error if whoever serves `uffd` gives up, ends, or does not answer:
/// a plain access would wait for ever.
pub fn bring_in(ram: &GuestRam, page: Extent, uffd: &Uffd, ending: &EndingSignal) -> Result<(), Error> {
    let unserved = |why: String| Error::Unserved { gpa: page.gpa(), why };
    let populator = ram.populator(page)?;
    let (done, is_done) = channel();
    let touch = move || {
        // The receiver waits for this, whatever happens.
        let _ = done.send(populator.populate_write());
    };
    let thread = std::thread::Builder::new().name("bring-in".into()).spawn(touch);
    let thread = thread.map_err(Error::os("start a thread"))?;
    let deadline = Instant::now() + TIMEOUT;
    let result = loop {
        let why = match is_done.recv_timeout(CHECK) {
            Ok(result) => break result.map_err(|source| Error::Map { gpa: page.gpa(), pages: 1, source }),
            Err(RecvTimeoutError::Disconnected) => break Err(unserved("its thread panicked".into())),
            Err(RecvTimeoutError::Timeout) => match ending.take() {
                Some(Ending::Failed(what)) => what,
                Some(other) => format!("{other:?}"),
                None if Instant::now() > deadline => format!("nobody served it within {} seconds", TIMEOUT.as_secs()),
                None => continue,
            },
        };
        // Nobody else answers the fault any more, and the thread cannot be left behind. The machine is given up: what
        // the page holds does not matter, nor that somebody may have been faster.
        let _ =
            uffd.install(populator.address(), &[0; PAGE_SIZE as usize], Install { wake: true, ..Install::default() });
        break Err(unserved(why));
    };
    // A panic of the thread has been reported by the panic hook.
    let _ = thread.join();
    result
}
