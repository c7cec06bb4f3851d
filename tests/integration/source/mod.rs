//! The source itself: rooms, imports, style.

pub mod architecture;
mod style;
