//! The end of a session: its reason.

use crate::memory::ending::Ending;

/// The way in which a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest ended.
    Guest(GuestEnd),
    /// The machine could not go on, for this reason.
    Failed(String),
    /// Guest memory was lost, or differs from what was captured.
    MemoryLost(String),
    /// A signal ended the session.
    Signal(i32),
    /// Ctrl-A X was typed.
    Quit,
    /// The scripted request was answered.
    Answered,
    /// The scripted request cannot be answered.
    NoAnswer(String),
    /// The scripted request was not answered in time.
    TimedOut,
}

/// The way in which a guest ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    Reset,
    PowerOff,
    TripleFault,
}

impl From<Ending> for Outcome {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::Failed(what) => Outcome::Failed(what),
            Ending::MemoryLost(what) => Outcome::MemoryLost(what),
            Ending::Reset => Outcome::Guest(GuestEnd::Reset),
            Ending::PowerOff => Outcome::Guest(GuestEnd::PowerOff),
            Ending::TripleFault => Outcome::Guest(GuestEnd::TripleFault),
        }
    }
}
