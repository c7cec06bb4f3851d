//! A small language, for `pyaes`: source text is compiled to bytecode, and a stack machine with tagged values and
//! reference-counted lists runs it, as CPython runs Python.
//!
//! `fn name(a, b) { … }`, `name = …;`, `list[i] = …;`, `while … { … }`, `if … { … } else { … }`, `return …;`, integers,
//! names, calls, `list(n)` (n zeros), `len(list)`, `list[i]`, and operators by precedence: `|`, `^`, `&`, `< ==`, `<<
//! >>`, `+ -`, `* %`.

mod compile;
mod lex;
mod machine;
#[cfg(test)]
mod tests;

use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;

pub use compile::compile;

/// The value of a variable.
#[derive(Clone, Debug)]
pub enum Value {
    Number(i64),
    List(Rc<RefCell<Vec<Value>>>),
}

impl Value {
    /// A list of numbers.
    pub fn list(numbers: impl IntoIterator<Item = i64>) -> Self {
        Self::List(Rc::new(RefCell::new(numbers.into_iter().map(Self::Number).collect())))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Or,
    Xor,
    And,
    Less,
    Equal,
    ShiftLeft,
    ShiftRight,
    Add,
    Subtract,
    Multiply,
    Remainder,
}

/// One instruction of the stack machine.
#[derive(Clone, Copy, Debug)]
enum Code {
    Push(i64),
    Load(u16),
    Store(u16),
    Apply(Operator),
    /// list, index → element
    Index,
    /// list, index, value →
    SetIndex,
    /// length → list of zeros
    NewList,
    /// list → length
    Length,
    Jump(u32),
    JumpIfZero(u32),
    Call(u16),
    Return,
    Pop,
}

#[derive(Debug)]
struct Function {
    name: String,
    parameters: u16,
    /// Parameters included.
    locals: u16,
    code: Vec<Code>,
}

/// A compiled program.
#[derive(Debug)]
pub struct Program {
    functions: Vec<Function>,
}
