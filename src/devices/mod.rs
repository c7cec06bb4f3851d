//! The devices room.
