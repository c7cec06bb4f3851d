//! Processes of VMs that have finished. They are kept for a moment, paused, for VMs of the same shape.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::capacity::VmPermit;
use super::shape::Shape;
use super::shells::Shell;

/// The most processes that are kept.
const MOST: usize = 8;

/// The place of a VM, and perhaps the process of a finished one.
#[derive(Debug)]
pub struct Place {
    pub permit: VmPermit,
    /// The process to repurpose; `None`: the VM needs a process of its own.
    pub used: Option<Shell>,
}

/// The process of a VM that has finished.
#[derive(Debug)]
pub struct Spare {
    pub shell: Shell,
    pub permit: VmPermit,
    pub shape: Shape,
}

impl Spare {
    fn place(self) -> Place {
        Place { permit: self.permit, used: Some(self.shell) }
    }

    /// Ends the process, and then gives back its place.
    pub async fn end(self) {
        self.shell.process.stop().await;
    }
}

/// The kept processes.
#[derive(Debug, Default)]
pub struct Spares(Mutex<Queue>);

/// Kept processes with the number of each keeping, the one that was kept first at the front.
#[derive(Debug, Default)]
struct Queue {
    kept: VecDeque<(u64, Spare)>,
    /// A process that was taken and is kept again has another number.
    next: u64,
}

impl Spares {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn len(&self) -> usize {
        self.lock().kept.len()
    }

    pub fn is_full(&self) -> bool {
        self.len() >= MOST
    }

    /// Returns the number of this keeping, for [`take_kept`](Self::take_kept).
    ///
    /// # Errors
    /// The process, if as many are kept as may be.
    pub fn keep(&self, spare: Spare) -> Result<u64, Box<Spare>> {
        let mut queue = self.lock();
        if queue.kept.len() >= MOST {
            return Err(Box::new(spare));
        }
        let number = queue.next;
        queue.next += 1;
        queue.kept.push_back((number, spare));
        Ok(number)
    }

    /// Returns whether [`take`](Self::take) has a process of this shape.
    pub fn has(&self, shape: Shape) -> bool {
        self.lock().kept.iter().any(|(_, spare)| is_usable(spare, shape))
    }

    /// Takes a process of this shape that lives.
    pub fn take(&self, shape: Shape) -> Option<Place> {
        let mut queue = self.lock();
        let found = queue.kept.iter().position(|(_, spare)| is_usable(spare, shape))?;
        queue.kept.remove(found).map(|(_, spare)| spare.place())
    }

    /// Takes the process that was kept first.
    pub fn take_first(&self) -> Option<Spare> {
        self.lock().kept.pop_front().map(|(_, spare)| spare)
    }

    /// Takes the process of this keeping, unless it was taken.
    pub fn take_kept(&self, number: u64) -> Option<Spare> {
        let mut queue = self.lock();
        let found = queue.kept.iter().position(|(kept, _)| *kept == number)?;
        queue.kept.remove(found).map(|(_, spare)| spare)
    }

    /// Ends all.
    pub fn clear(&self) {
        self.lock().kept.clear();
    }
}

fn is_usable(spare: &Spare, shape: Shape) -> bool {
    spare.shape == shape && spare.shell.process.ended().is_none()
}
