//! The tiering room.
