//! A record of the pages that faults asked for, kept by the threads that answer them.

use std::sync::{Mutex, PoisonError};

use crate::snapshot::{Gfn, PageSet};
use crate::sys::uffd::Touch;

/// Pages that were touched, by the kinds of their faults. A page may be in both sets.
#[derive(Clone, Debug, Default)]
pub struct Touched {
    pub read: PageSet,
    pub written: PageSet,
}

/// The record. Shared by the thread that answers faults and those that ask which pages were touched.
#[derive(Debug, Default)]
pub struct TouchLog(Mutex<Touched>);

impl TouchLog {
    /// Notes a fault on `gfn`.
    pub fn note(&self, gfn: Gfn, touch: Touch) {
        let mut touched = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match touch {
            Touch::Read => touched.read.insert(gfn),
            Touch::Write | Touch::WriteProtected => touched.written.insert(gfn),
        }
    }

    /// Takes the pages noted since the last call.
    pub fn take(&self) -> Touched {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
