//! The vmm room.
