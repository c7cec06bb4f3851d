//! The source itself: rooms, imports, style.

pub mod architecture;
mod arrows;
mod circles;
mod style;
mod tokens;
