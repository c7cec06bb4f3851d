//! The observation of a restored machine, which a recording asks for.

use crate::tiering::fault::FaultObserver;

/// The observation of a restored machine from its first touch of memory on.
#[derive(Default)]
pub struct Watch {
    /// Told of every first touch.
    pub observer: Option<Box<dyn FaultObserver>>,
    /// True: the kernel maps only pages that are touched, not their neighbours, if it can.
    pub single_pages: bool,
}
