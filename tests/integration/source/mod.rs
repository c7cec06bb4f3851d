//! The source itself: rooms, imports, style.

pub mod architecture;
mod arrows;
mod circles;
mod shapes;
mod style;
mod tokens;
